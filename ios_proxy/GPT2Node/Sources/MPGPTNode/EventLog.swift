// The log that a person sends when something fails: the last lines, with the time of each.
//
// Knows: lines, how many are kept.
// Must not know: files, what shows or sends it.

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

    public mutating func append(_ text: String, at date: Date) {
        last += 1
        lines.append(Line(id: last, text: "\(date.formatted(.iso8601)) \(text)"))
        if lines.count > EventLog.kept { lines.removeFirst(lines.count - EventLog.kept) }
    }

    /// All of it, to be sent.
    public var text: String {
        ([heading] + lines.map(\.text)).joined(separator: "\n") + "\n"
    }
}
