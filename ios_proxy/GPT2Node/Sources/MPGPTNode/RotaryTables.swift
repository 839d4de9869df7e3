// The tables by which a model with rotary embeddings turns its heads: x * cos + roll(x, D / 2) * sin.
//
// Knows: the manifest's frequencies and gain.
// Must not know: which positions are asked for, and why.
//
// They are computed for each call: a table of the whole context is as large as a manifest claims.

import Foundation

struct RotaryTables {
    private let frequencies: [Float]
    private let gain: Float

    init(_ rotary: Manifest.Rotary) {
        frequencies = rotary.invFreq.map { Float($0) }
        gain = Float(rotary.gain)
    }

    /// cos and signed sin of some positions, a row of D elements for each.
    func tables(at positions: [Int], shape: [Int]) -> (cos: Tensor, sin: Tensor) {
        var cosines: [UInt16] = []
        var sines: [UInt16] = []
        cosines.reserveCapacity(2 * frequencies.count * positions.count)
        sines.reserveCapacity(2 * frequencies.count * positions.count)
        for position in positions {
            let angles = frequencies.map { Float(position) * $0 }
            let cosine = angles.map { Half.bits(gain * cos($0)) }
            let sine = angles.map { gain * sin($0) }
            cosines += cosine + cosine
            sines += sine.map { Half.bits(-$0) } + sine.map { Half.bits($0) }
        }
        return (Tensor(shape: shape, float16: cosines), Tensor(shape: shape, float16: sines))
    }
}
