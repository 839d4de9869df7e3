// float16 as its 16 bits, to float32 and back: 1 bit of sign, 5 of exponent (biased by 15), 10 of fraction.
//
// Knows: IEEE 754's binary16 and binary32.
// Must not know: tensors.
//
// Swift's own Float16 is not there on Macs with Intel processors.

/// The conversions of float16, whose values are kept as bits everywhere here.
public enum Half {
    static let zero: UInt16 = 0
    static let one: UInt16 = 0x3c00

    /// The value of some bits, which float32 always has.
    @inline(__always)
    public static func float(_ bits: UInt16) -> Float {
        let sign = UInt32(bits & 0x8000) << 16
        let exponent = UInt32(bits >> 10 & 0x1f)
        let fraction = UInt32(bits & 0x3ff)
        switch exponent {
        case 0x1f:
            return Float(bitPattern: sign | 0x7f80_0000 | fraction << 13)
        case 0:
            let magnitude = Float(fraction) * 0x1p-24
            return Float(bitPattern: sign | magnitude.bitPattern)
        default:
            return Float(bitPattern: sign | (exponent + 127 - 15) << 23 | fraction << 13)
        }
    }

    /// The nearest float16; of two that are equally near, the one whose last bit is 0. From 65520 on it is infinite.
    @inline(__always)
    public static func bits(_ value: Float) -> UInt16 {
        let sign = UInt16(truncatingIfNeeded: value.bitPattern >> 16) & 0x8000
        let magnitude = value.bitPattern & 0x7fff_ffff
        if magnitude > 0x7f80_0000 {
            let fraction = UInt16(truncatingIfNeeded: magnitude >> 13) & 0x3ff
            return sign | 0x7c00 | (fraction == 0 ? 0x200 : fraction)
        }
        if magnitude >= 0x4780_0000 { return sign | 0x7c00 }
        if magnitude < 0x3880_0000 { return sign | subnormalBits(magnitude) }
        // A carry out of the fraction goes on into the exponent, up to infinity.
        let exact = magnitude - UInt32(127 - 15) << 23
        return sign | UInt16(truncatingIfNeeded: rounded(exact, dropping: 13))
    }

    /// The bits of a number below 2^-14, in steps of 2^-24.
    @inline(__always)
    private static func subnormalBits(_ magnitude: UInt32) -> UInt16 {
        let exponent = magnitude >> 23
        // At half a step or less, 2^-25, nothing is left of it.
        guard exponent >= 127 - 25 else { return 0 }
        let fraction = magnitude & 0x7f_ffff | 0x80_0000
        return UInt16(truncatingIfNeeded: rounded(fraction, dropping: 126 - exponent))
    }

    /// An integer divided by 2^count, to the nearest, halves to even.
    @inline(__always)
    private static func rounded(_ bits: UInt32, dropping count: UInt32) -> UInt32 {
        let half: UInt32 = 1 << (count - 1)
        let isOdd = bits >> count & 1
        return (bits + half - 1 + isOdd) >> count
    }
}
