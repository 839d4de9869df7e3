// What a package is given and gives back, and what runs it.
//
// Knows: tensors, the two functions of a package.
// Must not know: slots, positions, who runs a package and how.

/// The type of a tensor's elements, with its name in safetensors.
public enum ElementType: String, Sendable {
    case float16 = "F16"
    case float32 = "F32"
    case int32 = "I32"

    public var size: Int { self == .float16 ? 2 : 4 }
}

/// Numbers, little-endian, the last dimension's side by side.
public struct Tensor: Sendable, Equatable {
    public var shape: [Int]
    public var dtype: ElementType
    public var bytes: [UInt8]

    public init(shape: [Int], dtype: ElementType, bytes: [UInt8]) {
        (self.shape, self.dtype, self.bytes) = (shape, dtype, bytes)
    }

    public init(shape: [Int], int32 values: [Int32]) {
        self.init(shape: shape, dtype: .int32, bytes: littleEndian(values))
    }

    public init(shape: [Int], float16 bits: [UInt16]) {
        self.init(shape: shape, dtype: .float16, bytes: littleEndian(bits))
    }

    public init(shape: [Int], float32 values: [Float]) {
        self.init(shape: shape, dtype: .float32, bytes: littleEndian(values.map(\.bitPattern)))
    }

    /// The number of bytes that a shape takes; nil for one that no memory holds.
    static func length(of shape: [Int], _ dtype: ElementType) -> Int? {
        var length = dtype.size
        for size in shape {
            let (product, overflow) = length.multipliedReportingOverflow(by: size)
            guard size >= 0, !overflow else { return nil }
            length = product
        }
        return length
    }

    /// The elements of an int32 tensor.
    var integers: [Int] {
        words(of: Int32.self).map(Int.init)
    }

    /// The elements of a float32 tensor.
    var floats: [Float] {
        words(of: UInt32.self).map(Float.init(bitPattern:))
    }

    private func words<Word: FixedWidthInteger>(of type: Word.Type) -> [Word] {
        let size = MemoryLayout<Word>.size
        return bytes.withUnsafeBytes { raw in
            stride(from: 0, to: raw.count - size + 1, by: size).map {
                Word(littleEndian: raw.loadUnaligned(fromByteOffset: $0, as: Word.self))
            }
        }
    }
}

private func littleEndian(_ values: [some FixedWidthInteger]) -> [UInt8] {
    values.map(\.littleEndian).withUnsafeBytes { Array($0) }
}

/// The inputs of one call, by their names.
public typealias Inputs = [String: Tensor]

/// The functions of a package.
public enum Function: String, Sendable, CaseIterable {
    case prefill, decode
}

/// A runtime of one package, with its state.
public protocol Predictor: AnyObject {
    /// What computes, for a person.
    var unit: String { get }
    /// The output `y`, in float16 or float32.
    func predict(_ function: Function, _ inputs: Inputs) throws -> Tensor
    /// Forgets the state.
    func reset() throws
    /// What its operations are planned for; nil where that is not known.
    var placement: Placement? { get }
}

extension Predictor {
    public var placement: Placement? { nil }
}

/// Why there is no result: BAD_POS or COMPUTE_FAILED on the wire.
public enum ComputeError: Error, Sendable, Equatable {
    case badPosition(String)
    case failed(String)

    public var text: String {
        switch self {
        case .badPosition(let text), .failed(let text): text
        }
    }
}
