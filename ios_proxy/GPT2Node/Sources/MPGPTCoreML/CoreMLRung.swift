// The ladder of Core ML: the Neural Engine, what it does without, the GPU, the CPU.
//
// Knows: which compute units there are, and why in this order.
// Must not know: when one is tried (`Ladder.swift`), how a package is run.

#if canImport(CoreML)

    import CoreML
    import MPGPTNode

    /// One way in which Core ML may run a package, the fastest first.
    public enum CoreMLRung: String, CaseIterable, Sendable {
        case neuralEngine = "ne"
        /// The Neural Engine's compiler has refused functions of several tokens where it took those of one.
        case neuralEngineByToken = "ne-by-token"
        case gpu
        case cpu

        /// For a person.
        public var name: String {
            switch self {
            case .neuralEngine: "Neural Engine"
            case .neuralEngineByToken: "Neural Engine, prompts token by token"
            case .gpu: "GPU"
            case .cpu: "CPU"
            }
        }

        private var isByToken: Bool { self == .neuralEngineByToken }

        /// What Core ML may use; the CPU is always allowed, for what the other cannot do.
        private var units: MLComputeUnits {
            switch self {
            case .neuralEngine, .neuralEngineByToken: .cpuAndNeuralEngine
            case .gpu: .cpuAndGPU
            case .cpu: .cpuOnly
            }
        }

        /// The rungs of this device.
        public static var available: [CoreMLRung] {
            let devices = MLModel.availableComputeDevices
            let hasNeuralEngine = devices.contains { if case .neuralEngine = $0 { true } else { false } }
            let hasGPU = devices.contains { if case .gpu = $0 { true } else { false } }
            return allCases.filter { rung in
                switch rung {
                case .neuralEngine, .neuralEngineByToken: hasNeuralEngine
                case .gpu: hasGPU
                case .cpu: true
                }
            }
        }

        /// The compute unit of a node whose store is in `folder`.
        public func unit(folder: String) -> ComputeUnit {
            // A program that is killed while a package loads is known for the Neural Engine, and possible everywhere.
            ComputeUnit(name: name, promptsByToken: isByToken, mayEndProgram: true) { [self] bundle in
                let functions = Function.allCases.filter { !isByToken || $0 != .prefill }
                let compiled = Store.compiledFolder(of: bundle.hash, in: folder)
                return try CoreMLPredictor(
                    bundle, functions: functions, units: units, unit: "Core ML, \(name)", compiled: compiled)
            }
        }
    }

    extension ComputeUnit {
        /// The ladder of this device, for a node whose store is in `folder`.
        public static func coreML(_ rungs: [CoreMLRung] = CoreMLRung.available, folder: String) -> [ComputeUnit] {
            rungs.map { $0.unit(folder: folder) }
        }
    }

#endif
