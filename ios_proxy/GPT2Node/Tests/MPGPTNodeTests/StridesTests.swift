// Memory with padded rows: what is copied out of it and into it, and a package that answers out of such memory.

import Dice
import Testing

@testable import MPGPTNode

/// Memory as Core ML lays it out for the Neural Engine: rows of a multiple of 64 bytes.
private struct PaddedArray {
    let shape: [Int]
    let dtype: ElementType
    let strides: [Int]
    var memory: [UInt8]

    init(shape: [Int], dtype: ElementType, filler: UInt8 = 0xaa) {
        let row = 64 / dtype.size
        var stride = 1
        var strides: [Int] = []
        for (number, size) in shape.reversed().enumerated() {
            strides.insert(stride, at: 0)
            stride *= size
            if number == 0 { stride = (stride + row - 1) / row * row }
        }
        (self.shape, self.dtype, self.strides) = (shape, dtype, strides)
        memory = [UInt8](repeating: filler, count: stride * dtype.size)
    }

    mutating func fill(_ tensor: Tensor) throws {
        let strides = strides
        try memory.withUnsafeMutableBytes { try tensor.copy(to: $0, strides: strides) }
    }

    func tensor() throws -> Tensor {
        try memory.withUnsafeBytes { try Tensor(shape: shape, dtype: dtype, strides: strides, memory: $0) }
    }
}

/// A package whose y is x, with inputs and outputs in padded memory.
private final class Padding: Predictor {
    let unit = "padded"
    private(set) var calls: [Function] = []

    func predict(_ function: Function, _ inputs: Inputs) throws -> Tensor {
        calls.append(function)
        for input in inputs.values {
            var array = PaddedArray(shape: input.shape, dtype: input.dtype)
            try array.fill(input)
            #expect(try array.tensor() == input)
        }
        let x = try #require(inputs["x"])
        var y = PaddedArray(shape: x.shape, dtype: .float16)
        try y.fill(x)
        return try y.tensor()
    }

    func reset() {}
}

@Suite struct StridesTests {
    @Test func aPredictorWithPaddedStrides() throws {
        let predictor = Padding()
        let executor = Executor(predictor: predictor, manifest: try manifest())
        let x = halves(0..<40)
        #expect(try executor.prefill(slot: 1, position: 0, x: x, tokens: 10) == x)
        #expect(try executor.decode(slots: [2, 1], positions: [0, 10], x: halves(7..<15)) == halves(7..<15))
        #expect(predictor.calls.count >= 4)
    }

    @Test func whatLiesWhere() throws {
        // Rows of two, four apart; planes of three rows, 14 apart; the first element is the memory's.
        let memory = (0..<32).map { UInt16($0) }
        let tensor = try memory.withUnsafeBytes {
            try Tensor(shape: [2, 3, 2], dtype: .float16, strides: [14, 4, 1], memory: $0)
        }
        #expect(tensor == Tensor(shape: [2, 3, 2], float16: [0, 1, 4, 5, 8, 9, 14, 15, 18, 19, 22, 23]))
        // The last dimension need not be the one whose elements lie together, and one of size 1 may have any stride.
        let turned = try memory.withUnsafeBytes {
            try Tensor(shape: [3, 1, 2], dtype: .float16, strides: [1, 99, 8], memory: $0)
        }
        #expect(turned == Tensor(shape: [3, 1, 2], float16: [0, 8, 1, 9, 2, 10]))
    }

    @Test func whatLiesBetweenStaysAsItWas() throws {
        var array = PaddedArray(shape: [2, 3], dtype: .int32, filler: 0xee)
        try array.fill(Tensor(shape: [2, 3], int32: [1, 2, 3, 4, 5, 6]))
        #expect(array.strides == [16, 1] && array.memory.count == 128)
        let kept = array.memory.indices.filter { array.memory[$0] == 0xee }
        #expect(kept == Array(12..<64) + Array(76..<128))
    }

    @Test(arguments: [ElementType.float16, .float32, .int32]) func thereAndBack(dtype: ElementType) throws {
        var dice = Dice(state: 3)
        for _ in 0..<200 {
            let shape = (0..<dice.below(5)).map { _ in 1 + dice.below(6) }
            let count = shape.reduce(1, *)
            let bytes = (0..<count * dtype.size).map { _ in UInt8(dice.below(256)) }
            let tensor = Tensor(shape: shape, dtype: dtype, bytes: bytes)
            var array = PaddedArray(shape: shape, dtype: dtype)
            try array.fill(tensor)
            #expect(try array.tensor() == tensor)
        }
    }

    @Test func stridesThatAreNone() throws {
        let memory = [UInt8](repeating: 0, count: 64)
        let wrong: [([Int], [Int])] = [
            ([2, 2], [1]), ([2, 2], [0, 1]), ([2, 2], [-2, 1]), ([-1, 2], [2, 1]), ([2, 17], [17, 1]), ([33], [1]),
            ([2, 2], [31, 1]), ([2, 2], [.max, 1]), ([.max, 2], [2, 1]), ([.max, .max], [.max, .max]),
        ]
        for (shape, strides) in wrong {
            #expect(throws: ComputeError.self, "\(shape) by \(strides)") {
                try memory.withUnsafeBytes {
                    try Tensor(shape: shape, dtype: .float16, strides: strides, memory: $0)
                }
            }
        }
        #expect(Tensor.span(of: [2, 2], strides: [30, 1]) == 32 && Tensor.span(of: [2, 0], strides: [9, 9]) == 0)
        var room = memory
        let short = Tensor(shape: [4], dtype: .float16, bytes: [1, 2])
        #expect(throws: ComputeError.self) {
            try room.withUnsafeMutableBytes { try short.copy(to: $0, strides: [1]) }
        }
    }
}
