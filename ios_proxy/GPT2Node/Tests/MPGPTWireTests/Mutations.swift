// Frames that dice have changed.

import Dice

extension Dice {
    mutating func pick<Element>(_ elements: [Element]) -> Element {
        elements[below(elements.count)]
    }

    /// A number near a bound of something, more often than not.
    mutating func edge() -> UInt64 {
        let edges: [UInt64] = [
            0, 1, 2, 31, 32, 63, 64, 65, 200, 201, 500, 512, 513, 1000, 16384, 16385, 1 << 16 - 1, 1 << 22, 1 << 31,
            1 << 32 - 1, 1 << 36, 1 << 63, .max,
        ]
        return below(4) == 0 ? next() : pick(edges) &+ UInt64(below(3)) &- 1
    }
}

/// A frame with a few changes; most have the length and the checksum that fit, so that they come far.
func mutated(_ frame: [UInt8], _ dice: inout Dice) -> [UInt8] {
    var frame = frame
    for _ in 0..<dice.below(4) {
        if dice.below(3) == 0 { mutateHeader(&frame, &dice) } else { mutate(&frame, &dice) }
    }
    guard dice.below(8) > 0, frame.count >= headerSize else { return frame }
    return dice.below(8) > 0 ? sealed(frame) : checksummed(frame)
}

/// Changes one byte, a few, or how many there are.
func mutate(_ bytes: inout [UInt8], _ dice: inout Dice) {
    guard !bytes.isEmpty else { return bytes.append(UInt8(truncatingIfNeeded: dice.next())) }
    let at = dice.below(bytes.count)
    switch dice.below(6) {
    case 0: bytes[at] ^= 1 << dice.below(8)
    case 1: bytes[at] = UInt8(truncatingIfNeeded: dice.edge())
    case 2: bytes.removeSubrange(at..<min(bytes.count, at + 1 + dice.below(8)))
    case 3: bytes.insert(UInt8(truncatingIfNeeded: dice.next()), at: at)
    case 4: bytes.insert(contentsOf: bytes[at..<min(bytes.count, at + 1 + dice.below(16))], at: dice.below(at + 1))
    default: overwrite(&bytes, at, littleEndian(dice.edge()).prefix(1 << dice.below(4)))
    }
}

private func mutateHeader(_ frame: inout [UInt8], _ dice: inout Dice) {
    let fields = [(5, 1), (6, 2), (8, 4), (12, 4), (16, 1), (17, 1), (18, 2), (20, 2), (22, 2), (24, 4)]
    let (at, size) = dice.pick(fields)
    overwrite(&frame, at, (at == 5 ? [UInt8(dice.below(21))] : littleEndian(dice.edge())).prefix(size))
}

private func overwrite(_ bytes: inout [UInt8], _ at: Int, _ new: ArraySlice<UInt8>) {
    for (offset, byte) in new.enumerated() where at + offset < bytes.count {
        bytes[at + offset] = byte
    }
}
