// float16: all of its values, and all borders between them.

import Dice
import Testing

@testable import MPGPTNode

@Suite struct HalfTests {
    @Test func allValuesComeBack() {
        #expect((0...UInt16.max).allSatisfy { Half.bits(Half.float($0)) == $0 })
    }

    @Test func someValues() {
        let known: [(UInt16, Float)] = [
            (0, 0), (0x3c00, 1), (0xc100, -2.5), (0x7bff, 65504), (0xf0e2, -10000), (1, 0x1p-24), (0x3ff, 0x1.ff8p-15),
            (0x400, 0x1p-14), (0x7c00, .infinity), (0xfc00, -.infinity),
        ]
        for (bits, value) in known {
            #expect(Half.float(bits) == value && Half.bits(value) == bits)
        }
        #expect(Half.float(0x8000).sign == .minus)
        #expect(Half.float(0x7e00).isNaN && Half.float(0x7c01).isNaN && Half.bits(.nan) == 0x7e00)
        // A NaN whose payload lies below float16's bits must not become infinite.
        #expect(Half.bits(Float(bitPattern: 0x7f80_0001)) == 0x7e00)
    }

    @Test func whatIsTooLargeOrTooSmall() {
        #expect(Half.bits(65519.996) == 0x7bff && Half.bits(65520) == 0x7c00 && Half.bits(-1e30) == 0xfc00)
        #expect(Half.bits(0x1p-25) == 0 && Half.bits(0x1.000002p-25) == 1 && Half.bits(-0x1p-149) == 0x8000)
    }

    /// Between two neighbours, half-way goes to the even one, and what is nearer to one to that one.
    @Test func bordersAreRoundedToEven() {
        var wrong = 0
        for low in UInt16(0)..<0x7bff {
            let (below, above) = (Half.float(low), Half.float(low + 1))
            let middle = (below + above) / 2
            let even = low.isMultiple(of: 2) ? low : low + 1
            let isEven = Half.bits(middle) == even && Half.bits(-middle) == even | 0x8000
            let isNearest = Half.bits(middle.nextDown) == low && Half.bits(middle.nextUp) == low + 1
            if !isEven || !isNearest { wrong += 1 }
        }
        #expect(wrong == 0)
    }

    #if !(os(macOS) && arch(x86_64))
    @Test func asTheProcessorHasIt() {
        var dice = Dice(state: 1)
        var wrong = (0...UInt16.max).count { !Half.float($0).isNaN && Half.float($0) != Float(Float16(bitPattern: $0)) }
        for _ in 0..<1_000_000 {
            let value = Float(bitPattern: UInt32(truncatingIfNeeded: dice.next()))
            if !value.isNaN && Half.bits(value) != Float16(value).bitPattern { wrong += 1 }
        }
        #expect(wrong == 0)
    }
    #endif
}
