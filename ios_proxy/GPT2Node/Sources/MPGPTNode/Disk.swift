// Files and folders, by the calls that Linux and Apple's systems share.
//
// Knows: paths, what the system says when a call fails.
// Must not know: bundles.

import Foundation
import MPGPTWire

/// What keeps a bundle from being kept: NO_SPACE on the wire, or BAD_BUNDLE.
public struct StoreError: Error, Sendable, Hashable {
    public enum Kind: Sendable, Hashable {
        case noSpace
        /// Its manifest is one of another version.
        case anotherFormat
        case other
    }

    public let text: String
    public let kind: Kind

    public init(_ text: String, kind: Kind = .other) {
        (self.text, self.kind) = (text, kind)
    }

    static let full = StoreError("the disk is full", kind: .noSpace)

    /// The failure of the system's last call, which was about a path.
    static func system(_ path: String) -> StoreError {
        let code = errno
        return code == ENOSPC || code == EDQUOT ? full : StoreError("\(path): \(String(cString: strerror(code)))")
    }
}

public enum Disk {
    /// The bytes that are read, hashed and written at once.
    static let blockSize = 1 << 20

    enum Kind { case file, folder, other, nothing }

    /// What is at a path; a link is what it leads to, but for one to a folder, which may lead in a circle.
    static func kind(of path: String) -> Kind {
        var (here, there) = (stat(), stat())
        guard lstat(path, &here) == 0, stat(path, &there) == 0 else { return .nothing }
        switch there.st_mode & S_IFMT {
        case S_IFREG: return .file
        case S_IFDIR: return here.st_mode & S_IFMT == S_IFDIR ? .folder : .other
        default: return .other
        }
    }

    /// The length of a file; 0 where there is none.
    static func size(of path: String) -> UInt64 {
        var info = stat()
        return stat(path, &info) == 0 ? UInt64(clamping: info.st_size) : 0
    }

    /// The bytes that may be written to the disk of a path.
    public static func freeSpace(at path: String) throws(StoreError) -> UInt64 {
        var info = statvfs()
        guard statvfs(path, &info) == 0 else { throw .system(path) }
        let (bytes, overflow) = UInt64(info.f_bavail).multipliedReportingOverflow(by: UInt64(info.f_frsize))
        return overflow ? .max : bytes
    }

    static func makeFolder(_ path: String) throws(StoreError) {
        do {
            try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
        } catch {
            let isFull = (error as? CocoaError)?.code == .fileWriteOutOfSpace
            throw isFull ? .full : StoreError("\(path): \(error.localizedDescription)")
        }
    }

    /// The names in a folder; none where it cannot be read.
    static func names(in folder: String) -> [String] {
        (try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? []
    }

    /// Every file below a folder, by its path from there.
    static func files(below folder: String) -> [String] {
        names(in: folder).flatMap { name in
            switch kind(of: "\(folder)/\(name)") {
            case .file: [name]
            case .folder: files(below: "\(folder)/\(name)").map { "\(name)/\($0)" }
            case .other, .nothing: [String]()
            }
        }
    }

    /// Removes what is at a path, and leaves what it cannot remove.
    static func erase(_ path: String) {
        try? FileManager.default.removeItem(atPath: path)
    }

    /// Has a folder left out of the device's backups: a proxy sends again what was in it.
    public static func leaveOutOfBackups(_ path: String) {
        #if canImport(Darwin)
            var (url, values) = (URL(filePath: path), URLResourceValues())
            values.isExcludedFromBackup = true
            try? url.setResourceValues(values)
        #endif
    }

    static func move(_ path: String, to other: String) throws(StoreError) {
        guard rename(path, other) == 0 else { throw .system(other) }
    }

    /// Seconds since 1970 at which a path was touched, or its entries changed.
    static func touched(_ path: String) -> Double {
        let attributes = try? FileManager.default.attributesOfItem(atPath: path)
        return (attributes?[.modificationDate] as? Date)?.timeIntervalSince1970 ?? 0
    }

    static func touch(_ path: String) {
        try? FileManager.default.setAttributes([.modificationDate: Date()], ofItemAtPath: path)
    }

    /// All bytes of a file that has no more than `limit`.
    static func read(_ path: String, limit: Int) throws(StoreError) -> [UInt8] {
        let file = try OpenFile(reading: path)
        let length = size(of: path)
        guard length <= UInt64(limit) else { throw StoreError("\(path) has \(length) bytes; \(limit) are possible") }
        var bytes = [UInt8](repeating: 0, count: Int(length))
        let count = try file.fill(&bytes)
        return Array(bytes.prefix(count))
    }

    /// Writes a small file anew; when this returns, it is on the disk.
    static func write(_ bytes: [UInt8], durablyTo path: String) throws(StoreError) {
        erase(path)
        let file = try OpenFile(appending: path)
        try file.append(bytes[...])
        guard file.sync(), file.shut() else { throw .system(path) }
        let folder = open(String(path[..<(path.lastIndex(of: "/") ?? path.endIndex)]), O_RDONLY | O_CLOEXEC)
        guard folder >= 0 else { throw .system(path) }
        // Its name is on the disk, too. Some file systems cannot be told to do that for a folder, and do it by themselves.
        _ = fsync(folder)
        close(folder)
    }

    /// The length of a file, and its SHA-256.
    static func hash(_ path: String) throws(StoreError) -> (length: UInt64, sha256: Bytes32) {
        let file = try OpenFile(reading: path)
        var block = [UInt8](repeating: 0, count: blockSize)
        var sha = SHA256()
        var length: UInt64 = 0
        while true {
            let count = try file.fill(&block)
            sha.update(block[..<count])
            length += UInt64(count)
            if count < block.count { return (length, sha.finalize()) }
        }
    }
}

/// A file that is open until nobody holds it any more.
final class OpenFile {
    private let path: String
    private var descriptor: Int32

    init(reading path: String) throws(StoreError) {
        (self.path, descriptor) = (path, open(path, O_RDONLY | O_CLOEXEC))
        guard descriptor >= 0 else { throw .system(path) }
    }

    /// Opens a file to be written at its end; it is made where there is none.
    init(appending path: String) throws(StoreError) {
        (self.path, descriptor) = (path, open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0o644))
        guard descriptor >= 0 else { throw .system(path) }
    }

    deinit { shut() }

    /// Fills a block from the file; returns the number of bytes, which is less at the file's end.
    func fill(_ block: inout [UInt8]) throws(StoreError) -> Int {
        let size = block.count
        return try fill(&block, size)
    }

    /// Fills the beginning of a block.
    func fill(_ block: inout [UInt8], _ size: Int) throws(StoreError) -> Int {
        var count = 0
        while count < size {
            let more = block.withUnsafeMutableBytes { read(descriptor, $0.baseAddress! + count, size - count) }
            if more == 0 { break }
            if more < 0 && errno == EINTR { continue }
            guard more > 0 else { throw .system(path) }
            count += more
        }
        return count
    }

    /// Writes bytes at the file's end.
    func append(_ bytes: ArraySlice<UInt8>) throws(StoreError) {
        var rest = bytes
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes { write(descriptor, $0.baseAddress!, $0.count) }
            if count < 0 && errno == EINTR { continue }
            guard count >= 0 else { throw .system(path) }
            rest = rest.dropFirst(count)
        }
    }

    /// Returns when what was written is on the disk; says whether it is.
    func sync() -> Bool { fsync(descriptor) == 0 }

    /// Closes the file; returns whether all that was written is on the disk, as far as the system knows.
    @discardableResult
    func shut() -> Bool {
        guard descriptor >= 0 else { return true }
        defer { descriptor = -1 }
        return close(descriptor) == 0
    }
}
