// A package that Core ML runs: its functions, their one state, tensors in and out.
//
// Knows: how Core ML loads a function, what it says of its inputs and its state, where its arrays lie in memory.
// Must not know: slots, positions, which unit is tried after which (`CoreMLRung.swift`).
//
// Predictions are the blocking ones, called from functions that are not async, one at a time in the whole process:
// predictions of different models at once have spoilt each other's state elsewhere.

#if canImport(CoreML)

    import CoreML
    import Foundation
    import MPGPTNode
    import Synchronization

    /// A bundle's package on some compute units. It is used on one queue.
    public final class CoreMLPredictor: Predictor {
        private static let stateName = "kv"
        private static let oneAtATime = Mutex(())

        public let unit: String
        /// Found when it is first asked for: a plan may take as long as loading did.
        public private(set) lazy var placement = plan()
        private let models: [Function: MLModel]
        private let url: URL
        private let units: MLComputeUnits
        private var state: MLState
        /// The functions whose inputs were compared with what the package declares.
        private var known: Set<Function> = []

        /// Compiles the package, unless that was done already, and loads some of its functions; may take minutes.
        ///
        /// `compiled` is a folder of the bundle's own, whose path is the same every time: the system keeps what it made
        /// for the Neural Engine by it.
        public init(
            _ bundle: MPGPTNode.Bundle, functions: [Function], units: MLComputeUnits, unit: String, compiled: String
        ) throws {
            (self.unit, self.units) = (unit, units)
            url = try CompiledModel.url(of: bundle.package, in: compiled)
            var models: [Function: MLModel] = [:]
            for function in functions {
                models[function] = try CoreMLPredictor.load(function, of: url, on: units, bundle.manifest)
            }
            // The state is made from the first, and is every function's: their buffers have been found to be the same.
            guard let first = functions.first.flatMap({ models[$0] }) else {
                throw ComputeError.failed("there is no function to load")
            }
            (self.models, state) = (models, first.makeState())
        }

        private func plan() -> Placement? {
            let counts = models.keys.map { ($0, try? Placement.Counts(of: $0, in: url, on: units)) }
            let known = counts.compactMap { function, counts in counts.map { (function, $0) } }
            return known.count == models.count ? Placement(Dictionary(uniqueKeysWithValues: known)) : nil
        }

        public func reset() throws {
            guard let model = Function.allCases.lazy.compactMap({ self.models[$0] }).first else { return }
            state = model.makeState()
        }

        public func predict(_ function: Function, _ inputs: Inputs) throws -> Tensor {
            guard let model = models[function] else {
                throw ComputeError.failed("the function \(function) is not loaded on \(unit)")
            }
            if known.insert(function).inserted { try model.check(inputs, of: function) }
            return try CoreMLPredictor.oneAtATime.withLock { _ in
                // Surfaces pile up without a pool, and predictions fail after about a thousand.
                try autoreleasepool { try predict(model, inputs) }
            }
        }

        private func predict(_ model: MLModel, _ inputs: Inputs) throws -> Tensor {
            let arrays = try inputs.mapValues { MLFeatureValue(multiArray: try MLMultiArray($0)) }
            let features = try MLDictionaryFeatureProvider(dictionary: arrays)
            let outputs: any MLFeatureProvider
            do {
                outputs = try model.prediction(from: features, using: state, options: MLPredictionOptions())
            } catch {
                throw ComputeError.failed("Core ML: \(error.localizedDescription)")
            }
            guard let y = outputs.featureValue(for: "y")?.multiArrayValue else {
                throw ComputeError.failed("the package gives no array y, but \(outputs.featureNames.sorted())")
            }
            return try y.tensor()
        }

        private static func load(
            _ function: Function, of url: URL, on units: MLComputeUnits, _ manifest: Manifest
        ) throws -> MLModel {
            let model: MLModel
            do {
                model = try autoreleasepool {
                    try MLModel(contentsOf: url, configuration: .function(function, on: units))
                }
            } catch {
                throw ComputeError.failed("Core ML cannot load \(function): \(error.localizedDescription)")
            }
            let shape = [
                2 * manifest.layers.count, manifest.slots * manifest.kvHeads, manifest.context, manifest.headDim,
            ]
            let states = model.modelDescription.stateDescriptionsByName
            let found = states[stateName]?.stateConstraint?.bufferShape
            guard states.count == 1, found == shape else {
                let what = found.map { "\($0)" } ?? "\(states.keys.sorted())"
                throw ComputeError.failed(
                    "the manifest is another package's: the state of \(function) is \(what), where \(shape) is right")
            }
            return model
        }
    }

    extension MLModelConfiguration {
        /// For one function of a package, whose shapes never change.
        static func function(_ function: Function, on units: MLComputeUnits) -> MLModelConfiguration {
            let configuration = MLModelConfiguration()
            configuration.functionName = function.rawValue
            configuration.computeUnits = units
            configuration.optimizationHints.reshapeFrequency = .infrequent
            configuration.optimizationHints.specializationStrategy = .fastPrediction
            return configuration
        }
    }

    extension MLModel {
        /// Throws unless the inputs are those that the model declares.
        fileprivate func check(_ inputs: Inputs, of function: Function) throws {
            let declared = modelDescription.inputDescriptionsByName
            for (name, tensor) in inputs {
                let constraint = declared[name]?.multiArrayConstraint
                let shape = constraint?.shape.map(\.intValue)
                guard let constraint, shape == tensor.shape, constraint.dataType == tensor.dtype.arrayType else {
                    throw ComputeError.failed(
                        "\(function) is given \(name) of the shape \(tensor.shape), and its package "
                            + (shape.map { "has it as \($0)" } ?? "knows no such input"))
                }
            }
            if let name = declared.keys.sorted().first(where: { inputs[$0] == nil && declared[$0]?.isOptional == false }
            ) {
                throw ComputeError.failed("\(function) of this package wants an input \(name), which it is not given")
            }
        }
    }

#endif
