// The bundles that a node keeps: by hash, each in a folder of its own; one that came half is taken up again.
//
// Knows: folders, what is whole, how many there may be.
// Must not know: messages' order, what a package is for.
//
// A bundle is a folder named by its hash, and is there only when every byte has been checked. What is under way lies in
// `HASH.part` (`PartialBundle.swift`); what is being removed in `HASH.gone`, so that nothing half removed is found. What a
// compute unit makes of a bundle lies in `HASH.compiled`, also where the bundle itself lies elsewhere.

import MPGPTWire

/// A folder of bundles. It is used on one queue.
public final class Store {
    /// Bytes that must stay free on the disk.
    public static let spare: UInt64 = 64 << 20
    /// The bundles at most, those that came half included; the one that was used longest ago makes room for the next.
    public static let kept = 4
    private static let part = ".part"
    private static let gone = ".gone"
    private static let compiled = ".compiled"

    public typealias FreeSpace = (String) throws(StoreError) -> UInt64

    public let folder: String
    private let compiles: Bool
    private let freeSpace: FreeSpace

    /// Opens a folder, which is made where there is none.
    ///
    /// `compiles` says that as many bytes again are written when a package is loaded, and `freeSpace` how many the disk
    /// of a path has left.
    public init(
        folder: String, compiles: Bool = false, freeSpace: @escaping FreeSpace = Disk.freeSpace
    ) throws(StoreError) {
        (self.folder, self.compiles, self.freeSpace) = (folder, compiles, freeSpace)
        try Disk.makeFolder(folder)
        for name in Disk.names(in: folder) where name.hasSuffix(Store.gone) {
            Disk.erase("\(folder)/\(name)")
        }
    }

    /// Where to put what is compiled from a bundle. It goes when the bundle does.
    public static func compiledFolder(of hash: [UInt8], in folder: String) -> String {
        "\(folder)/\(hash.hex)\(compiled)"
    }

    /// The hashes of the bundles that are here, in hex.
    public func hashes() -> [String] {
        Disk.names(in: folder).filter { isHash($0) && Disk.kind(of: path($0)) == .folder }.sorted()
    }

    /// The bundle of that hash, if it is here; one that is damaged is removed.
    public func find(_ digest: [UInt8]) -> Bundle? {
        let path = path(digest.hex)
        guard Disk.kind(of: path) == .folder else { return nil }
        guard let bundle = try? Bundle(folder: path), bundle.hash == digest else {
            remove(path)
            return nil
        }
        Disk.touch(path)
        return bundle
    }

    /// Takes up a bundle where it was left.
    ///
    /// Throws for an offer that cannot be a bundle, and where the disk has no room for it; then nothing was written.
    public func receive(_ offer: Message.Offer) throws(StoreError) -> PartialBundle {
        do {
            try offer.check()
        } catch {
            throw StoreError(error.text)
        }
        let total = offer.length ?? .max
        let part = path("\(offer.bundle)\(Store.part)")
        makeRoom(besides: part)
        var have = Disk.size(of: PartialBundle.bytes(in: part))
        if have > total {
            Disk.erase(PartialBundle.bytes(in: part))
            have = 0
        }
        // What is still to come, and then every file once more, and what is compiled from them.
        let needed = total - have + (compiles ? 2 : 1) * total + Store.spare
        guard try freeSpace(folder) >= needed else {
            throw StoreError(
                "there is no room for a package of \(total / 1_000_000) MB; free some, or delete old packages",
                kind: .noSpace)
        }
        return try PartialBundle(part: part, folder: path(offer.bundle.description), offer: offer, have: have)
    }

    /// Removes the bundle of that hash, also where it came half.
    public func delete(_ hash: String) {
        guard isHash(hash) else { return }
        remove(path(hash))
        remove(path("\(hash)\(Store.part)"))
    }

    /// Removes what was used longest ago until there may be one bundle more, whose beginning may be in `part` already.
    private func makeRoom(besides part: String) {
        let folders = Disk.names(in: folder).map(path).filter { Disk.kind(of: $0) == .folder }
        let others = folders.filter { $0 != part && !$0.hasSuffix(Store.compiled) }
        for path in newestFirst(others).dropFirst(Store.kept - 1) {
            remove(path)
        }
        // Those of bundles that lie elsewhere.
        let strays = folders.filter {
            $0.hasSuffix(Store.compiled) && !others.contains(String($0.dropLast(Store.compiled.count)))
        }
        for path in newestFirst(strays).dropFirst(Store.kept) {
            Disk.erase(path)
        }
    }

    private func newestFirst(_ paths: [String]) -> [String] {
        paths.map { ($0, Disk.touched($0)) }.sorted { $0.1 > $1.1 }.map(\.0)
    }

    private func remove(_ path: String) {
        Disk.erase("\(path)\(Store.compiled)")
        guard Disk.kind(of: path) != .nothing else { return }
        let gone = "\(path)\(Store.gone)"
        Disk.erase(gone)
        let moved: Void? = try? Disk.move(path, to: gone)
        Disk.erase(moved == nil ? path : gone)
    }

    private func path(_ name: String) -> String { "\(folder)/\(name)" }
}

private func isHash(_ name: String) -> Bool {
    Bytes32(hex: name)?.description == name
}
