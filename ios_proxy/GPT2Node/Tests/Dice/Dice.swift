// Dice that fall the same every time, for tests of what may come.

/// SplitMix64 (G. L. Steele, D. Lea and C. H. Flood, 2014).
public struct Dice: RandomNumberGenerator, Sendable {
    private var state: UInt64

    public init(state: UInt64) {
        self.state = state
    }

    public mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var mixed = state
        mixed = (mixed ^ mixed >> 30) &* 0xbf58_476d_1ce4_e5b9
        mixed = (mixed ^ mixed >> 27) &* 0x94d0_49bb_1331_11eb
        return mixed ^ mixed >> 31
    }

    public mutating func below(_ bound: Int) -> Int {
        Int(next() % UInt64(bound))
    }
}
