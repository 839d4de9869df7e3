// The inputs that say which positions are seen, and which is written.
//
// Knows: the tensors `mask` and `wmask` of a package's functions.
// Must not know: requests, what a slot holds.
//
// Both are as long as the context and change by an element or two from one call to the next, so they are kept.

/// A row for each token, which sees the positions from 0 up to some position, and none behind it.
struct Mask {
    /// -10000, to which nothing in a float16 softmax is near.
    private static let hidden: UInt16 = 0xf0e2

    private(set) var tensor: Tensor
    private let context: Int
    /// The number of positions that each row sees.
    private var seen: [Int]

    /// A mask whose shape has `rows` times `context` elements, and that hides everything.
    init(shape: [Int], rows: Int, context: Int) {
        tensor = Tensor(shape: shape, repeating: Mask.hidden, count: rows * context)
        seen = [Int](repeating: 0, count: rows)
        self.context = context
    }

    /// Lets a row see `count` positions.
    mutating func show(_ count: Int, inRow row: Int) {
        let before = seen[row]
        seen[row] = count
        let start = row * context
        if count > before {
            tensor.fill(start + before..<start + count, with: Half.zero)
        } else {
            tensor.fill(start + count..<start + before, with: Mask.hidden)
        }
    }
}

/// A row for each slot, which is 1 at the position that is written.
struct WriteMask {
    private(set) var tensor: Tensor
    private let context: Int
    private var written: [Int?]

    init(slots: Int, context: Int) {
        tensor = Tensor(shape: [slots, 1, context, 1], repeating: Half.zero, count: slots * context)
        written = [Int?](repeating: nil, count: slots)
        self.context = context
    }

    /// Marks a slot's position as the one that is written; nil for none.
    mutating func write(_ position: Int?, inSlot slot: Int) {
        if let before = written[slot] { mark(before, inSlot: slot, with: Half.zero) }
        if let position { mark(position, inSlot: slot, with: Half.one) }
        written[slot] = position
    }

    private mutating func mark(_ position: Int, inSlot slot: Int, with bits: UInt16) {
        let at = slot * context + position
        tensor.fill(at..<at + 1, with: bits)
    }
}

extension Tensor {
    fileprivate init(shape: [Int], repeating bits: UInt16, count: Int) {
        self.init(shape: shape, dtype: .float16, bytes: [UInt8](repeating: 0, count: 2 * count))
        fill(0..<count, with: bits)
    }

    /// Sets float16 elements.
    fileprivate mutating func fill(_ elements: Range<Int>, with bits: UInt16) {
        let (low, high) = (UInt8(bits & 0xff), UInt8(bits >> 8))
        for element in elements {
            bytes[2 * element] = low
            bytes[2 * element + 1] = high
        }
    }
}
