// Core ML as far as we use it: models, their state and configuration. Signatures are those of the SDK of iOS 18.

// Core ML gives Foundation on to whoever imports it, and with it `autoreleasepool`.
@_exported import Foundation

public func autoreleasepool<Result>(invoking body: () throws -> Result) rethrows -> Result { fatalError() }

// In Objective-C, and not Sendable.
open class MLModel {
    public convenience init(contentsOf url: URL, configuration: MLModelConfiguration) throws { fatalError() }
    init() {}

    open var modelDescription: MLModelDescription { fatalError() }
    open var configuration: MLModelConfiguration { fatalError() }

    public class var availableComputeDevices: [MLComputeDevice] { fatalError() }

    public class func load(
        contentsOf url: URL, configuration: MLModelConfiguration = MLModelConfiguration()
    ) async throws -> MLModel { fatalError() }
    public class func compileModel(at url: URL) async throws -> URL { fatalError() }

    public func makeState() -> MLState { fatalError() }

    open func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider { fatalError() }
    open func prediction(
        from input: any MLFeatureProvider, options: MLPredictionOptions
    ) throws -> any MLFeatureProvider { fatalError() }
    open func prediction(
        from inputFeatures: any MLFeatureProvider, using state: MLState
    ) throws -> any MLFeatureProvider { fatalError() }
    open func prediction(
        from inputFeatures: any MLFeatureProvider, using state: MLState, options: MLPredictionOptions
    ) throws -> any MLFeatureProvider { fatalError() }
    public func prediction(
        from input: any MLFeatureProvider, options: MLPredictionOptions = MLPredictionOptions()
    ) async throws -> any MLFeatureProvider { fatalError() }
    public func prediction(
        from input: any MLFeatureProvider, using state: MLState, options: MLPredictionOptions = MLPredictionOptions()
    ) async throws -> any MLFeatureProvider { fatalError() }
}

public final class MLState: Sendable {
    init() {}
    public func withMultiArray<R>(for stateName: String, _ body: (MLMultiArray) throws -> R) rethrows -> R {
        fatalError()
    }
}

public enum MLComputeUnits: Int, Sendable {
    case cpuOnly = 0
    case cpuAndGPU = 1
    case all = 2
    case cpuAndNeuralEngine = 3
}

open class MLModelConfiguration {
    public init() {}
    open var modelDisplayName: String?
    open var computeUnits = MLComputeUnits.all
    open var allowLowPrecisionAccumulationOnGPU = false
    open var functionName: String?
    public var optimizationHints = MLOptimizationHints()
}

public struct MLOptimizationHints: Equatable, Sendable {
    public enum ReshapeFrequency: Int, Sendable { case frequent, infrequent }
    public enum SpecializationStrategy: Int, Sendable { case `default`, fastPrediction }

    public var reshapeFrequency = ReshapeFrequency.frequent
    public var specializationStrategy = SpecializationStrategy.default
    public init() {}
}

open class MLPredictionOptions {
    public init() {}
    open var outputBackings: [String: Any] = [:]
}

open class MLModelDescription {
    init() {}
    open var inputDescriptionsByName: [String: MLFeatureDescription] { fatalError() }
    open var outputDescriptionsByName: [String: MLFeatureDescription] { fatalError() }
    open var stateDescriptionsByName: [String: MLFeatureDescription] { fatalError() }
}

open class MLFeatureDescription {
    init() {}
    open var name: String { fatalError() }
    open var isOptional: Bool { fatalError() }
    open var multiArrayConstraint: MLMultiArrayConstraint? { fatalError() }
    open var stateConstraint: MLStateConstraint? { fatalError() }
}

open class MLMultiArrayConstraint {
    init() {}
    open var shape: [NSNumber] { fatalError() }
    open var dataType: MLMultiArrayDataType { fatalError() }
}

open class MLStateConstraint {
    init() {}
    public var bufferShape: [Int] { fatalError() }
    open var dataType: MLMultiArrayDataType { fatalError() }
}
