// A bundle on the disk: a Core ML package, its manifest and its self-test.
//
// Knows: where the three lie, their hashes.
// Must not know: how they came there, what a package is for.

import MPGPTWire

/// The three parts of a bundle, whose files have been read and hashed.
public struct Bundle: Sendable {
    static let suffix = ".mlpackage"

    /// The bundle's name on the wire, 32 bytes.
    public let hash: [UInt8]
    public let length: UInt64
    /// The paths of the three parts.
    public let package, manifestPath, selftest: String
    public let manifest: Manifest
    /// What an offer of it says, in the order of the names.
    public let files: [Message.File]

    /// The bundle in a folder of its own, with the names that it has on the wire.
    public init(folder: String) throws(StoreError) {
        try self.init(Paths(folder: folder))
    }

    /// The package `NAME.mlpackage`, with `NAME.manifest.json` and `NAME.selftest.safetensors` beside it.
    public init(package: String) throws(StoreError) {
        try self.init(Paths(package: package))
    }

    /// A bundle in a folder, whose files are known to be those.
    init(folder: String, files: [Message.File]) throws(StoreError) {
        try self.init(Paths(folder: folder), files)
    }

    private init(_ paths: Paths) throws(StoreError) {
        guard Disk.kind(of: paths.package) == .folder else {
            throw StoreError("\(paths.package) is no Core ML package; `mpgpt convert coreml` makes one")
        }
        var named = Disk.files(below: paths.package).map { ("\(BundleFile.package)/\($0)", "\(paths.package)/\($0)") }
        named += [(BundleFile.manifest, paths.manifest), (BundleFile.selftest, paths.selftest)]
        named.sort { $0.0.utf8.lexicographicallyPrecedes($1.0.utf8) }
        var files: [Message.File] = []
        for (name, path) in named {
            let (length, sha256) = try Disk.hash(path)
            files.append(Message.File(name: name, length: length, sha256: sha256))
        }
        try self.init(paths, files)
    }

    private init(_ paths: Paths, _ files: [Message.File]) throws(StoreError) {
        manifest = try Manifest(json: Disk.read(paths.manifest, limit: Manifest.maxBytes))
        hash = Message.Offer.hash(of: files).bytes
        length = files.reduce(0) { $0 + $1.length }
        (package, manifestPath, selftest) = (paths.package, paths.manifest, paths.selftest)
        self.files = files
    }
}

/// The paths of a bundle's parts.
private struct Paths {
    let package, manifest, selftest: String

    init(folder: String) {
        package = "\(folder)/\(BundleFile.package)"
        manifest = "\(folder)/\(BundleFile.manifest)"
        selftest = "\(folder)/\(BundleFile.selftest)"
    }

    init(package: String) {
        var stem = package[...]
        while stem.hasSuffix("/") { stem.removeLast() }
        self.package = String(stem)
        if stem.hasSuffix(Bundle.suffix) { stem.removeLast(Bundle.suffix.count) }
        manifest = "\(stem).\(BundleFile.manifest)"
        selftest = "\(stem).\(BundleFile.selftest)"
    }
}
