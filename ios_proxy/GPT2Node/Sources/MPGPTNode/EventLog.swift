// The log that a person sends when something fails: the last lines, with the time of each.
//
// Knows: lines, how many are kept, a file that outlives the app.
// Must not know: what shows or sends it.

import Foundation

/// The last lines of what happened.
public struct EventLog: Sendable {
    public static let kept = 500

    public struct Line: Sendable, Hashable, Identifiable {
        /// Rises from one line to the next.
        public let id: Int
        public let text: String
    }

    /// The oldest first.
    public private(set) var lines: [Line] = []
    private let heading: String
    private var last = 0

    /// `heading` says which program on which system has written it.
    public init(heading: String) {
        self.heading = heading
    }

    /// Appends a line, and returns it with its time.
    @discardableResult
    public mutating func append(_ text: String, at date: Date) -> String {
        last += 1
        lines.append(Line(id: last, text: "\(date.formatted(.iso8601)) \(text)"))
        if lines.count > EventLog.kept { lines.removeFirst(lines.count - EventLog.kept) }
        return lines[lines.count - 1].text
    }

    /// All of it, to be sent.
    public var text: String {
        ([heading] + lines.map(\.text)).joined(separator: "\n") + "\n"
    }
}

/// The lines on the disk: what was told last is there also when the system has ended the app.
public final class LogFile {
    /// Bytes of a file; at the next start another is begun then, and one older is kept.
    public static let limit: UInt64 = 1 << 20

    private let path: String
    private var file: OpenFile?

    /// Appends to `log.txt` in a folder; where that cannot be, nothing is written.
    public init(folder: String) {
        path = "\(folder)/log.txt"
        try? Disk.makeFolder(folder)
        if Disk.size(of: path) > LogFile.limit { try? Disk.move(path, to: "\(folder)/log.1.txt") }
        file = try? OpenFile(appending: path)
    }

    public func append(_ line: String) {
        try? file?.append(Array("\(line)\n".utf8)[...])
    }
}
