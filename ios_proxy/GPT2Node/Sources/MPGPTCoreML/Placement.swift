// Which units Core ML plans a function's operations for, counted.
//
// Knows: `MLComputePlan`.
// Must not know: what the numbers are used for.

#if canImport(CoreML)

    import CoreML
    import Foundation
    import MPGPTNode

    extension Placement.Counts {
        /// Counts what is planned for a function of a compiled model; constants are planned for nothing.
        init(of function: Function, in url: URL, on units: MLComputeUnits) throws {
            self = try blocking {
                let plan = try await MLComputePlan.load(
                    contentsOf: url, configuration: .function(function, on: units))
                guard case .program(let program) = plan.modelStructure,
                    let planned = program.functions[function.rawValue] ?? program.functions["main"]
                else { throw ComputeError.failed("there is no plan for \(function)") }
                var counts = Placement.Counts()
                counts.add(planned.block, plan)
                return counts
            }
        }

        private mutating func add(_ block: MLModelStructure.Program.Block, _ plan: MLComputePlan) {
            for operation in block.operations {
                for block in operation.blocks { add(block, plan) }
                guard let preferred = plan.deviceUsage(for: operation)?.preferred else { continue }
                if case .neuralEngine = preferred {
                    neuralEngine += 1
                } else if case .gpu = preferred {
                    gpu += 1
                } else {
                    cpu += 1
                }
            }
        }
    }

#endif
