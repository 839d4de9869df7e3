// The header of a frame: 32 bytes that say which message follows, and how long it is.
//
// Knows: every kind's number, the fields and the length that it may have.
// Must not know: what is in a payload (`Payloads.swift`), how a frame is found in a stream (`Frames.swift`).

/// A message's number in the header.
public enum Kind: UInt8, Sendable, CaseIterable {
    case hello = 1
    case challenge, proof, info, offer, want, data, stored, load, loading, ready, reset
    case prefill, decode, result, error, ping, pong, bye

    /// As the page and sentences for people have it.
    public var name: String { "\(self)".uppercased() }

    /// Bytes of the payload, at least and at most.
    public var lengths: ClosedRange<Int> {
        switch self {
        case .hello, .proof, .stored, .load: Bytes32.count...Bytes32.count
        case .challenge: 2 * Bytes32.count...2 * Bytes32.count
        case .info, .ready: 2...Limits.json
        case .offer: Bytes32.count...Limits.payload
        case .want, .ping: 8...8
        case .data: 9...8 + Limits.piece
        case .loading: 0...Limits.text
        case .reset, .bye: 0...0
        case .prefill, .decode: 10...Limits.request
        case .result: 18...Limits.payload
        case .error: 2...2 + Limits.text
        case .pong: 10...8 + Limits.json
        }
    }

    /// Whether the payload ends with values, and the header has their dtype.
    var hasValues: Bool { self == .prefill || self == .decode || self == .result }
    var hasEpoch: Bool { hasValues || self == .error || self == .reset }
    var hasRequest: Bool { hasValues || self == .error }
}

/// Bytes that are no frame of this version of the protocol, or one that must not come now.
public enum WireError: Error, Sendable, Hashable {
    case badFrame(String)
    case badVersion(UInt8)
    case notAllowed(Kind)
}

struct Header: Sendable {
    static let size = 32
    static let crcOffset = 28
    static let magic = Array("mpIP".utf8)
    static let version: UInt8 = 1

    var kind: Kind
    var epoch: UInt32 = 0
    var request: UInt32 = 0
    var dtype: DType?
    var rows: UInt16 = 0
    var tokens: UInt16 = 0

    /// The header's bytes, with zeros for the checksum.
    func bytes(payloadLength: Int) -> [UInt8] {
        var bytes = Header.magic + [Header.version, kind.rawValue, 0, 0]
        bytes.append(littleEndian: epoch)
        bytes.append(littleEndian: request)
        bytes += [dtype?.rawValue ?? 0, 0]
        bytes.append(littleEndian: rows)
        bytes.append(littleEndian: tokens)
        bytes += [0, 0]
        bytes.append(littleEndian: UInt32(truncatingIfNeeded: payloadLength))
        bytes.append(littleEndian: UInt32(0))
        return bytes
    }
}

/// A header that was checked, with what concerns its payload.
struct CheckedHeader: Sendable {
    let header: Header
    let length: Int
    let crc: UInt32

    /// Reads the first 32 bytes of a frame, and throws for every header that none may have.
    init(_ bytes: ArraySlice<UInt8>) throws(WireError) {
        try CheckedHeader.checkStart(bytes)
        var reader = ByteReader(bytes.dropFirst(Header.magic.count + 1))
        guard
            let number: UInt8 = reader.integer(), let flags: UInt16 = reader.integer(),
            let epoch: UInt32 = reader.integer(), let request: UInt32 = reader.integer(),
            let dtype: UInt8 = reader.integer(), let zero: UInt8 = reader.integer(),
            let rows: UInt16 = reader.integer(), let tokens: UInt16 = reader.integer(),
            let zeros: UInt16 = reader.integer(), let length: UInt32 = reader.integer(),
            let crc: UInt32 = reader.integer()
        else { throw .badFrame("a header that is cut") }
        guard let kind = Kind(rawValue: number) else { throw .badFrame("a frame of the unknown type \(number)") }
        guard let count = Int(exactly: length), kind.lengths ~= count else {
            let (least, most) = (kind.lengths.lowerBound, kind.lengths.upperBound)
            throw .badFrame("\(kind.name) with \(length) bytes; \(least) to \(most) are possible")
        }
        guard flags == 0, zero == 0, zeros == 0, kind.hasEpoch || epoch == 0, kind.hasRequest || request == 0 else {
            throw .badFrame("\(kind.name) with flags or numbers that it cannot have")
        }
        guard kind.hasValues ? DType(rawValue: dtype) != nil : dtype == 0 else {
            throw .badFrame("\(kind.name) with values of the unknown dtype \(dtype)")
        }
        guard CheckedHeader.canCount(kind, rows: rows, tokens: tokens) else {
            throw .badFrame("\(kind.name) with \(rows) rows and \(tokens) tokens")
        }
        header = Header(
            kind: kind, epoch: epoch, request: request, dtype: DType(rawValue: dtype), rows: rows, tokens: tokens)
        (self.length, self.crc) = (count, crc)
    }

    private static func canCount(_ kind: Kind, rows: UInt16, tokens: UInt16) -> Bool {
        if kind.hasValues { return 1...Limits.rows ~= Int(rows) && Int(rows)...Limits.tokens ~= Int(tokens) }
        if kind == .offer { return 1...Limits.files ~= Int(rows) && tokens == 0 }
        return rows == 0 && tokens == 0
    }

    /// Throws for bytes that cannot become a frame, however few they are.
    static func checkStart(_ bytes: ArraySlice<UInt8>) throws(WireError) {
        let start = bytes.prefix(Header.magic.count)
        guard start.elementsEqual(Header.magic.prefix(start.count)) else {
            throw .badFrame("bytes that begin no frame: this is no mpgpt iPad link")
        }
        if let version = bytes.dropFirst(Header.magic.count).first, version != Header.version {
            throw .badVersion(version)
        }
    }
}
