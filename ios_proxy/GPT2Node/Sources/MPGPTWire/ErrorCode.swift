// The codes of ERROR.
//
// Knows: their numbers and names in `ios_proxy/PROTOCOL.md`.
// Must not know: which failure gets which.

/// What went wrong, as a number; one that has no name here comes from a later version of the protocol.
public struct ErrorCode: RawRepresentable, Sendable, Hashable, CustomStringConvertible {
    public let rawValue: UInt16

    public init(rawValue: UInt16) {
        self.rawValue = rawValue
    }

    public static let badFrame = ErrorCode(rawValue: 1)
    public static let badVersion = ErrorCode(rawValue: 2)
    public static let badToken = ErrorCode(rawValue: 3)
    public static let badState = ErrorCode(rawValue: 4)
    public static let badBundle = ErrorCode(rawValue: 5)
    public static let badPos = ErrorCode(rawValue: 6)
    public static let badRequest = ErrorCode(rawValue: 7)
    public static let loadFailed = ErrorCode(rawValue: 8)
    public static let computeFailed = ErrorCode(rawValue: 9)
    public static let noSpace = ErrorCode(rawValue: 10)
    public static let busy = ErrorCode(rawValue: 11)

    /// Every name, in the order of the numbers from 1 on.
    public static let names = [
        "BAD_FRAME", "BAD_VERSION", "BAD_TOKEN", "BAD_STATE", "BAD_BUNDLE", "BAD_POS", "BAD_REQUEST", "LOAD_FAILED",
        "COMPUTE_FAILED", "NO_SPACE", "BUSY",
    ]

    public init?(name: String) {
        guard let at = ErrorCode.names.firstIndex(of: name) else { return nil }
        rawValue = UInt16(at) + 1
    }

    public var name: String? {
        1...ErrorCode.names.count ~= Int(rawValue) ? ErrorCode.names[Int(rawValue) - 1] : nil
    }

    public var description: String { name ?? "error \(rawValue)" }
}
