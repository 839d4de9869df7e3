// Tensors as Core ML has them: `MLMultiArray`, whose rows may be padded.
//
// Knows: types and strides of arrays.
// Must not know: what is in them.

#if canImport(CoreML)

    import CoreML
    import Foundation
    import MPGPTNode

    extension ElementType {
        var arrayType: MLMultiArrayDataType {
            switch self {
            case .float16: .float16
            case .float32: .float32
            case .int32: .int32
            }
        }
    }

    extension MLMultiArray {
        /// An array with a tensor's elements, of memory of its own.
        convenience init(_ tensor: Tensor) throws {
            try self.init(shape: tensor.shape.map { NSNumber(value: $0) }, dataType: tensor.dtype.arrayType)
            try withUnsafeMutableBytes { memory, strides in
                try tensor.copy(to: memory, strides: strides)
            }
        }

        /// A copy without what lies between the rows.
        func tensor() throws -> Tensor {
            let (shape, strides) = (shape.map(\.intValue), strides.map(\.intValue))
            guard let dtype = [ElementType.float16, .float32, .int32].first(where: { $0.arrayType == dataType }),
                let span = Tensor.span(of: shape, strides: strides)
            else { throw ComputeError.failed("an array of the type \(dataType.rawValue), \(shape) by \(strides)") }
            return try withUnsafeBytes { memory in
                // Whether the length that it says has the padding in it is not documented; the memory has.
                let count = max(memory.count, span * dtype.size)
                let whole = UnsafeRawBufferPointer(start: memory.baseAddress, count: count)
                return try Tensor(shape: shape, dtype: dtype, strides: strides, memory: whole)
            }
        }
    }

#endif
