// The rules of an offered bundle, and the hash that names it.
//
// Knows: which files a bundle has, which names may be written to a disk.
// Must not know: where bundles are kept, what is in a file.

/// The files of a bundle that are no part of the package, and the package's folder.
public enum BundleFile {
    public static let manifest = "manifest.json"
    public static let selftest = "selftest.safetensors"
    public static let package = "model.mlpackage"
}

/// An offer that cannot be a bundle: BAD_BUNDLE on the wire.
public struct OfferError: Error, Sendable, Hashable {
    public let text: String
}

extension Message.Offer {
    /// The name of a bundle with these files, in the order in which they are here.
    public static func hash(of files: [Message.File]) -> Bytes32 {
        var sha = SHA256()
        for file in files {
            var length: [UInt8] = [0]
            length.append(littleEndian: file.length)
            sha.update(file.name.utf8)
            sha.update(length)
            sha.update(file.sha256.bytes)
        }
        return sha.finalize()
    }

    /// The bytes of all files; nil for more than a number can say.
    public var length: UInt64? {
        var total: UInt64 = 0
        for file in files {
            let (sum, overflow) = total.addingReportingOverflow(file.length)
            guard !overflow else { return nil }
            total = sum
        }
        return total
    }

    /// Throws what keeps these files from being the bundle that the offer names, before any of them comes.
    public func check() throws(OfferError) {
        let names = files.map { Array($0.name.utf8) }
        for name in names {
            try checkName(name)
        }
        guard zip(names, names.dropFirst()).allSatisfy({ $0.lexicographicallyPrecedes($1) }) else {
            throw OfferError(text: "the package's files are not in the order of their names")
        }
        try checkParts(Set(names))
        try checkFolders(names)
        guard let length, length <= Limits.bundle else {
            throw OfferError(text: "the package is larger than \(Limits.bundle >> 30) GiB")
        }
        guard Message.Offer.hash(of: files) == bundle else {
            throw OfferError(text: "the package is not the one that its hash names")
        }
    }
}

/// Throws unless a name can be written on every disk, and leads nowhere else.
private func checkName(_ name: [UInt8]) throws(OfferError) {
    let parts = name.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: false)
    let leadsElsewhere = parts.contains { $0.isEmpty || $0.elementsEqual(".".utf8) || $0.elementsEqual("..".utf8) }
    guard 1...Limits.name ~= name.count, name.allSatisfy(mayBeInName), !leadsElsewhere else {
        let shown = readable(name[...])
        throw OfferError(text: "the package has a file named \"\(shown)\", which it may not have")
    }
}

private func mayBeInName(_ byte: UInt8) -> Bool {
    switch byte {
    case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"): true
    case UInt8(ascii: "0")...UInt8(ascii: "9"): true
    case UInt8(ascii: "."), UInt8(ascii: "_"), UInt8(ascii: "-"), UInt8(ascii: "/"): true
    default: false
    }
}

/// Throws unless there are the manifest, the self-test, at least one file of the package, and no other.
private func checkParts(_ names: Set<[UInt8]>) throws(OfferError) {
    let folder = Array("\(BundleFile.package)/".utf8)
    let others = Set([BundleFile.manifest, BundleFile.selftest].map { Array($0.utf8) })
    guard names.isSuperset(of: others), names.count > others.count else {
        throw OfferError(text: "the package lacks its manifest, its self-test or its model")
    }
    if let other = names.subtracting(others).first(where: { !$0.starts(with: folder) }) {
        throw OfferError(text: "the package has a file named \"\(readable(other[...]))\", which it may not have")
    }
}

/// Throws where two names differ by case alone, or one is the folder of another: many disks do not tell these apart.
private func checkFolders(_ names: [[UInt8]]) throws(OfferError) {
    var seen: Set<[UInt8]> = []
    let folded = names.map { $0.map(lowercased) }
    for name in folded {
        guard seen.insert(name).inserted else {
            throw OfferError(text: "the package has \"\(readable(name[...]))\" twice, but for upper and lower case")
        }
    }
    for name in folded {
        for slash in name.indices where name[slash] == UInt8(ascii: "/") && seen.contains(Array(name[..<slash])) {
            throw OfferError(text: "the package has a file that is the folder of \"\(readable(name[...]))\"")
        }
    }
}

private func lowercased(_ byte: UInt8) -> UInt8 {
    UInt8(ascii: "A")...UInt8(ascii: "Z") ~= byte ? byte + 32 : byte
}
