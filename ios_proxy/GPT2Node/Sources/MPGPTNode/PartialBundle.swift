// A bundle on its way in: its bytes as they come, then file by file.
//
// Knows: `HASH.part`, in which `bytes` has one file after the other, and `files` what is checked of them.
// Must not know: which bundles there are besides.

import MPGPTWire

/// The beginning of a bundle. The table of its files was in the offer, which comes again with every attempt.
public final class PartialBundle {
    /// The number of bytes that are here.
    public private(set) var have: UInt64
    public let total: UInt64
    private let part: String
    private let folder: String
    private let offer: Message.Offer
    private let file: OpenFile

    static func bytes(in part: String) -> String { "\(part)/bytes" }

    init(part: String, folder: String, offer: Message.Offer, have: UInt64) throws(StoreError) {
        try Disk.makeFolder(part)
        file = try OpenFile(appending: PartialBundle.bytes(in: part))
        Disk.touch(part)
        (self.part, self.folder, self.offer, self.have) = (part, folder, offer, have)
        total = offer.length ?? .max
    }

    /// Appends the next bytes.
    public func write(_ piece: [UInt8]) throws(StoreError) {
        try write(piece[...])
    }

    /// Appends the next bytes.
    public func write(_ piece: ArraySlice<UInt8>) throws(StoreError) {
        guard UInt64(piece.count) <= total - have else { throw StoreError("more came than the package has bytes") }
        try file.append(piece)
        have += UInt64(piece.count)
    }

    /// Checks every file, and gives the bundle its place.
    ///
    /// Throws when it is not what was offered, when its manifest is none, or when it cannot be written; then nothing of
    /// it is kept.
    public func finish() throws(StoreError) -> Bundle {
        defer { Disk.erase(part) }
        // What the system still held back may be too much for the disk.
        guard file.shut() else { throw .system(part) }
        let fresh = "\(part)/files"
        Disk.erase(fresh)
        let bytes = try OpenFile(reading: PartialBundle.bytes(in: part))
        for file in offer.files {
            try unpack(file, from: bytes, to: "\(fresh)/\(file.name)")
        }
        _ = try Bundle(folder: fresh, files: offer.files)
        Disk.erase(folder)
        try Disk.move(fresh, to: folder)
        Disk.touch(folder)
        return try Bundle(folder: folder, files: offer.files)
    }

    /// Keeps the bytes so far for the next attempt.
    public func close() {
        file.shut()
    }

    /// Copies one file out of the bytes, and throws unless it is the one that was offered.
    private func unpack(_ file: Message.File, from bytes: OpenFile, to path: String) throws(StoreError) {
        try Disk.makeFolder(String(path[..<(path.lastIndex(of: "/") ?? path.endIndex)]))
        let out = try OpenFile(appending: path)
        var block = [UInt8](repeating: 0, count: Int(min(file.length, UInt64(Disk.blockSize))))
        var sha = SHA256()
        var left = file.length
        while left > 0 {
            let count = try bytes.fill(&block, Int(min(left, UInt64(block.count))))
            guard count > 0 else { throw StoreError("the package's \(file.name) is cut") }
            try out.append(block[..<count])
            sha.update(block[..<count])
            left -= UInt64(count)
        }
        guard out.shut() else { throw .system(path) }
        guard sha.finalize() == file.sha256 else {
            throw StoreError("the package's \(file.name) was damaged on the way: its hash does not fit")
        }
    }
}
