// Core ML as far as we use it: compute devices, and which of them an operation is planned for.

import Foundation

public enum MLComputeDevice: Hashable, Sendable {
    case cpu(MLCPUComputeDevice)
    case gpu(MLGPUComputeDevice)
    case neuralEngine(MLNeuralEngineComputeDevice)
}

public struct MLCPUComputeDevice: Hashable, Sendable {}
public struct MLGPUComputeDevice: Hashable, Sendable {}
public struct MLNeuralEngineComputeDevice: Hashable, Sendable {
    public var totalCoreCount: Int { fatalError() }
}

public class MLComputePlan {
    public struct DeviceUsage: Sendable {
        public let supported: [MLComputeDevice]
        public let preferred: MLComputeDevice
    }

    init() { modelStructure = .unsupported }
    public final let modelStructure: MLModelStructure
    public static func load(
        contentsOf url: URL, configuration: MLModelConfiguration
    ) async throws -> MLComputePlan { fatalError() }
    public func deviceUsage(for operation: MLModelStructure.Program.Operation) -> DeviceUsage? { fatalError() }
}

@available(*, unavailable)
extension MLComputePlan: Sendable {}

public enum MLModelStructure: Sendable {
    public struct Program: Sendable {
        public struct Function: Sendable {
            public let block: Block
        }
        public struct Block: Sendable {
            public let operations: [Operation]
        }
        public struct Operation: Sendable {
            public let operatorName: String
            public let blocks: [Block]
        }
        public let functions: [String: Function]
    }
    public struct NeuralNetwork: Sendable {}
    public struct Pipeline: Sendable {}

    case neuralNetwork(NeuralNetwork)
    case program(Program)
    case pipeline(Pipeline)
    case unsupported
}
