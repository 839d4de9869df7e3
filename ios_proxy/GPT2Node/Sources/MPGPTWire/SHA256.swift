// SHA-256 (FIPS 180-4), streaming.
//
// Knows: bytes.
// Must not know: what is hashed, and why.

/// A hash under way.
public struct SHA256: Sendable {
    private var state = SIMD8<UInt32>(
        0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19)
    /// Fewer than `blockSize` bytes, which wait for the rest of their block.
    private var tail: [UInt8] = []
    private var length: UInt64 = 0

    public static let blockSize = 64

    public init() {}

    /// The hash of some bytes.
    public static func hash(_ bytes: some Collection<UInt8>) -> Bytes32 {
        var sha = SHA256()
        sha.update(bytes)
        return sha.finalize()
    }

    public mutating func update(_ bytes: some Collection<UInt8>) {
        let contiguous: Void? = bytes.withContiguousStorageIfAvailable { update(UnsafeRawBufferPointer($0)) }
        if contiguous == nil {
            Array(bytes).withUnsafeBytes { update($0) }
        }
    }

    public mutating func update(_ bytes: UnsafeRawBufferPointer) {
        length &+= UInt64(bytes.count)
        var at = 0
        if !tail.isEmpty {
            at = min(SHA256.blockSize - tail.count, bytes.count)
            tail.append(contentsOf: bytes[..<at])
            guard tail.count == SHA256.blockSize else { return }
            state = tail.withUnsafeBytes { SHA256.compress($0, from: state) }
            tail.removeAll(keepingCapacity: true)
        }
        let whole = (bytes.count - at) / SHA256.blockSize * SHA256.blockSize
        state = SHA256.compress(UnsafeRawBufferPointer(rebasing: bytes[at..<at + whole]), from: state)
        tail.append(contentsOf: bytes[(at + whole)...])
    }

    /// The hash of all bytes so far; more may follow.
    public func finalize() -> Bytes32 {
        var padded = tail
        padded.append(0x80)
        let zeros = (2 * SHA256.blockSize - 8 - padded.count) % SHA256.blockSize
        padded.append(contentsOf: repeatElement(0, count: zeros))
        withUnsafeBytes(of: (length &* 8).bigEndian) { padded.append(contentsOf: $0) }
        return Bytes32(bigEndian: padded.withUnsafeBytes { SHA256.compress($0, from: state) })
    }

    /// The state after whole blocks.
    private static func compress(_ blocks: UnsafeRawBufferPointer, from state: SIMD8<UInt32>) -> SIMD8<UInt32> {
        withUnsafeTemporaryAllocation(of: UInt32.self, capacity: 64) { schedule in
            constants.withUnsafeBufferPointer { constants in
                var state = state
                for at in stride(from: 0, to: blocks.count, by: blockSize) {
                    fill(schedule, from: UnsafeRawBufferPointer(rebasing: blocks[at..<at + blockSize]), constants)
                    state &+= rounds(schedule, from: state)
                }
                return state
            }
        }
    }

    /// The 64 words of a block's message schedule, each with its round's constant added.
    @inline(__always)
    private static func fill(
        _ schedule: UnsafeMutableBufferPointer<UInt32>, from block: UnsafeRawBufferPointer,
        _ constants: UnsafeBufferPointer<UInt32>
    ) {
        for at in 0..<16 {
            schedule[at] = UInt32(bigEndian: block.loadUnaligned(fromByteOffset: 4 * at, as: UInt32.self))
        }
        for at in 16..<64 {
            let (a, b) = (schedule[at - 15], schedule[at - 2])
            let s0 = rotate(a, 7) ^ rotate(a, 18) ^ a >> 3
            let s1 = rotate(b, 17) ^ rotate(b, 19) ^ b >> 10
            schedule[at] = schedule[at - 16] &+ s0 &+ schedule[at - 7] &+ s1
        }
        for at in 0..<64 {
            schedule[at] &+= constants[at]
        }
    }

    /// Eight rounds at a time, so that the working variables change their names and not their places.
    @inline(__always)
    private static func rounds(
        _ schedule: UnsafeMutableBufferPointer<UInt32>, from state: SIMD8<UInt32>
    ) -> SIMD8<UInt32> {
        var (a, b, c, d) = (state[0], state[1], state[2], state[3])
        var (e, f, g, h) = (state[4], state[5], state[6], state[7])
        for at in stride(from: 0, to: 64, by: 8) {
            round(a, b, c, &d, e, f, g, &h, schedule[at])
            round(h, a, b, &c, d, e, f, &g, schedule[at + 1])
            round(g, h, a, &b, c, d, e, &f, schedule[at + 2])
            round(f, g, h, &a, b, c, d, &e, schedule[at + 3])
            round(e, f, g, &h, a, b, c, &d, schedule[at + 4])
            round(d, e, f, &g, h, a, b, &c, schedule[at + 5])
            round(c, d, e, &f, g, h, a, &b, schedule[at + 6])
            round(b, c, d, &e, f, g, h, &a, schedule[at + 7])
        }
        return SIMD8(a, b, c, d, e, f, g, h)
    }

    @inline(__always)
    private static func round(
        _ a: UInt32, _ b: UInt32, _ c: UInt32, _ d: inout UInt32, _ e: UInt32, _ f: UInt32, _ g: UInt32,
        _ h: inout UInt32, _ word: UInt32
    ) {
        let choice = g ^ (e & (f ^ g))
        let majority = (a & b) | (c & (a | b))
        h &+= (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) &+ choice &+ word
        d &+= h
        h &+= (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) &+ majority
    }

    @inline(__always)
    private static func rotate(_ word: UInt32, _ count: UInt32) -> UInt32 {
        word &>> count | word &<< (32 &- count)
    }

    private static let constants: [UInt32] = [
        0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
        0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
        0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
        0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
        0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
        0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
        0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
        0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
    ]
}
