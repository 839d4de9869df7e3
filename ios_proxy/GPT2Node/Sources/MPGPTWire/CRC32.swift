// CRC-32, the checksum of zlib and PNG, eight bytes at a step.
//
// Knows: bytes.
// Must not know: what of a frame is covered.
//
// Slicing by eight: M. E. Kounavis and F. L. Berry, "A Systematic Approach to Building High Performance Software-based
// CRC Generators", 2005.

/// A checksum under way.
public struct CRC32: Sendable {
    private var register: UInt32 = 0xffff_ffff

    public init() {}

    /// The checksum of all bytes so far.
    public var value: UInt32 { ~register }

    public mutating func update(_ bytes: some Collection<UInt8>) {
        let contiguous: Void? = bytes.withContiguousStorageIfAvailable { update(UnsafeRawBufferPointer($0)) }
        if contiguous == nil {
            Array(bytes).withUnsafeBytes { update($0) }
        }
    }

    public mutating func update(_ bytes: UnsafeRawBufferPointer) {
        register = CRC32.tables.withUnsafeBufferPointer { tables in
            var crc = register
            var at = 0
            while at + 8 <= bytes.count {
                let word = UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: at, as: UInt64.self)) ^ UInt64(crc)
                crc = CRC32.step(word, tables)
                at += 8
            }
            while at < bytes.count {
                crc = crc >> 8 ^ tables[Int(UInt8(truncatingIfNeeded: crc) ^ bytes[at])]
                at += 1
            }
            return crc
        }
    }

    /// The register after eight bytes, the first of which is the lowest of `word` and needs the last table.
    @inline(__always)
    private static func step(_ word: UInt64, _ tables: UnsafeBufferPointer<UInt32>) -> UInt32 {
        var crc: UInt32 = 0
        for byte in 0..<8 {
            crc ^= tables[(7 - byte) << 8 | Int(truncatingIfNeeded: word >> (8 * byte) & 0xff)]
        }
        return crc
    }

    /// Eight tables of 256: entry `k << 8 | b` is the checksum of byte `b` with `k` zero bytes behind it.
    private static let tables: [UInt32] = {
        var tables: [UInt32] = (0..<256).map(afterOneByte)
        for at in 256..<2048 {
            let shorter = tables[at - 256]
            tables.append(shorter >> 8 ^ tables[Int(shorter & 0xff)])
        }
        return tables
    }()

    /// The register after one byte, bit by bit.
    private static func afterOneByte(_ byte: UInt32) -> UInt32 {
        var crc = byte
        for _ in 0..<8 {
            let polynomial: UInt32 = crc & 1 == 0 ? 0 : 0xedb8_8320
            crc = crc >> 1 ^ polynomial
        }
        return crc
    }
}
