// Bytes as they lie on the wire: little-endian integers, read within bounds or appended, and the 32 bytes of a digest.
//
// Knows: arrays of bytes, hex.
// Must not know: frames, messages, files.
//
// Nothing here traps, whatever the bytes say.

/// A reader takes values from the front of some bytes; it returns nil where too few are left.
public struct ByteReader: Sendable {
    private var rest: ArraySlice<UInt8>

    public init(_ bytes: ArraySlice<UInt8>) {
        rest = bytes
    }

    public init(_ bytes: [UInt8]) {
        rest = bytes[...]
    }

    /// The number of bytes that were not taken yet.
    public var remaining: Int { rest.count }

    public mutating func take(_ count: Int) -> ArraySlice<UInt8>? {
        guard count >= 0, count <= rest.count else { return nil }
        defer { rest = rest.dropFirst(count) }
        return rest.prefix(count)
    }

    public mutating func takeRest() -> ArraySlice<UInt8> {
        defer { rest = [] }
        return rest
    }

    /// The next integer, whose lowest byte comes first.
    public mutating func integer<T: FixedWidthInteger & UnsignedInteger>(_ type: T.Type = T.self) -> T? {
        take(T.bitWidth / 8)?.reversed().reduce(0) { $0 << 8 | T($1) }
    }

    public mutating func bytes32() -> Bytes32? {
        take(Bytes32.count).flatMap(Bytes32.init)
    }
}

extension [UInt8] {
    /// Appends an integer, its lowest byte first.
    public mutating func append<T: FixedWidthInteger>(littleEndian value: T) {
        Swift.withUnsafeBytes(of: value.littleEndian) { append(contentsOf: $0) }
    }

    /// The bytes that pairs of hexadecimal digits name; nil for anything else.
    public init?(hex: String) {
        let digits = hex.utf8.map(hexDigit)
        guard digits.count.isMultiple(of: 2) else { return nil }
        self.init()
        reserveCapacity(digits.count / 2)
        for at in stride(from: 0, to: digits.count, by: 2) {
            guard let high = digits[at], let low = digits[at + 1] else { return nil }
            append(high << 4 | low)
        }
    }
}

extension Sequence<UInt8> {
    /// Two lower-case hexadecimal digits a byte.
    public var hex: String {
        let digits = Array("0123456789abcdef".utf8)
        return String(decoding: flatMap { [digits[Int($0 >> 4)], digits[Int($0 & 15)]] }, as: UTF8.self)
    }
}

/// The value of one hexadecimal digit in ASCII.
func hexDigit(_ character: UInt8) -> UInt8? {
    switch character {
    case UInt8(ascii: "0")...UInt8(ascii: "9"): character - UInt8(ascii: "0")
    case UInt8(ascii: "a")...UInt8(ascii: "f"): character - UInt8(ascii: "a") + 10
    case UInt8(ascii: "A")...UInt8(ascii: "F"): character - UInt8(ascii: "A") + 10
    default: nil
    }
}

/// Exactly 32 bytes: a digest, a proof or a nonce.
public struct Bytes32: Hashable, Sendable, CustomStringConvertible {
    public static let count = 32
    public let bytes: [UInt8]

    public init?(_ bytes: some Collection<UInt8>) {
        guard bytes.count == Bytes32.count else { return nil }
        self.bytes = Array(bytes)
    }

    public init?(hex: String) {
        guard let bytes = [UInt8](hex: hex) else { return nil }
        self.init(bytes)
    }

    /// The words of a SHA-256 state, each with its highest byte first.
    init(bigEndian words: SIMD8<UInt32>) {
        bytes = words.indices.flatMap { at in
            Swift.withUnsafeBytes(of: words[at].bigEndian) { Array($0) }
        }
    }

    /// In hex, which is also the name of a bundle's folder.
    public var description: String { bytes.hex }
}
