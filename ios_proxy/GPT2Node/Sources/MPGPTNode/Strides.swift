// Tensors in memory that is not ours, whose rows may be padded: Core ML's arrays.
//
// Knows: shapes and strides, both in elements.
// Must not know: whose memory it is.

extension Tensor {
    /// Copies a tensor out of memory where neighbours along dimension i lie `strides[i]` elements apart.
    ///
    /// Throws where the strides are not the shape's, or reach beyond the memory.
    public init(
        shape: [Int], dtype: ElementType, strides: [Int], memory: UnsafeRawBufferPointer
    ) throws(ComputeError) {
        let walk = try Walk(shape: shape, strides: strides, dtype: dtype, bytes: memory.count)
        var bytes = [UInt8](repeating: 0, count: walk.length)
        bytes.withUnsafeMutableBytes { target in
            walk.rows { packed, strided in
                UnsafeMutableRawBufferPointer(rebasing: target[packed]).copyMemory(
                    from: UnsafeRawBufferPointer(rebasing: memory[strided]))
            }
        }
        self.init(shape: shape, dtype: dtype, bytes: bytes)
    }

    /// Copies the tensor into such memory; what lies between its rows stays as it is.
    public func copy(to memory: UnsafeMutableRawBufferPointer, strides: [Int]) throws(ComputeError) {
        let walk = try Walk(shape: shape, strides: strides, dtype: dtype, bytes: memory.count)
        guard walk.length == bytes.count else {
            throw .failed("a tensor of the shape \(shape) with \(bytes.count) bytes, not \(walk.length)")
        }
        bytes.withUnsafeBytes { source in
            walk.rows { packed, strided in
                UnsafeMutableRawBufferPointer(rebasing: memory[strided]).copyMemory(
                    from: UnsafeRawBufferPointer(rebasing: source[packed]))
            }
        }
    }

    /// The elements from the first to the last, those between the rows included; nil where strides are not the shape's.
    public static func span(of shape: [Int], strides: [Int]) -> Int? {
        guard shape.count == strides.count, shape.allSatisfy({ $0 >= 0 }) else { return nil }
        guard !shape.contains(0) else { return 0 }
        var last = 0
        for (size, stride) in zip(shape, strides) where size > 1 {
            let (way, isLong) = (size - 1).multipliedReportingOverflow(by: stride)
            let (sum, isFar) = last.addingReportingOverflow(way)
            guard stride > 0, !isLong, !isFar, sum < .max else { return nil }
            last = sum
        }
        return last + 1
    }
}

/// The way through a strided tensor, row by row: the longest pieces that lie together in both memories.
private struct Walk {
    /// Bytes of the tensor, packed.
    let length: Int
    private let rowLength: Int
    /// The dimensions that are walked through, and how many bytes a step along each is.
    private let outer: [(size: Int, stride: Int)]

    init(shape: [Int], strides: [Int], dtype: ElementType, bytes: Int) throws(ComputeError) {
        let size = dtype.size
        guard let span = Tensor.span(of: shape, strides: strides), span <= bytes / size,
            let length = Tensor.length(of: shape, dtype)
        else { throw .failed("strides \(strides) of the shape \(shape) in \(bytes) bytes") }
        self.length = length
        var run = 1
        var inner = shape.count
        while inner > 0, shape[inner - 1] == 1 || strides[inner - 1] == run {
            inner -= 1
            run *= shape[inner]
        }
        rowLength = run * size
        outer = zip(shape, strides).prefix(inner).map { ($0, $1 * size) }
    }

    /// Calls `body` with the bytes of each row, packed and strided.
    func rows(_ body: (_ packed: Range<Int>, _ strided: Range<Int>) -> Void) {
        var place = [Int](repeating: 0, count: outer.count)
        var at = 0
        for start in stride(from: 0, to: length, by: max(rowLength, 1)) {
            body(start..<start + rowLength, at..<at + rowLength)
            for dimension in outer.indices.reversed() {
                place[dimension] += 1
                at += outer[dimension].stride
                if place[dimension] < outer[dimension].size { break }
                at -= place[dimension] * outer[dimension].stride
                place[dimension] = 0
            }
        }
    }
}
