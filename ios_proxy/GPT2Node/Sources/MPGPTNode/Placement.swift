// Which compute units a package's operations are meant for: what READY tells, and a person.
//
// Knows: the three units of a device, and the words for them.
// Must not know: who finds that out, and how (`MPGPTCoreML`).

import MPGPTWire

/// How many operations of each function are planned for which compute unit.
public struct Placement: Sendable, Hashable {
    public struct Counts: Sendable, Hashable {
        public var neuralEngine = 0
        public var gpu = 0
        public var cpu = 0

        public init(neuralEngine: Int = 0, gpu: Int = 0, cpu: Int = 0) {
            (self.neuralEngine, self.gpu, self.cpu) = (neuralEngine, gpu, cpu)
        }

        public var total: Int { neuralEngine + gpu + cpu }
    }

    public var functions: [Function: Counts]

    public init(_ functions: [Function: Counts]) {
        self.functions = functions
    }

    /// All functions together.
    public var counts: Counts {
        functions.values.reduce(into: Counts()) { sum, counts in
            sum.neuralEngine += counts.neuralEngine
            sum.gpu += counts.gpu
            sum.cpu += counts.cpu
        }
    }

    /// READY's `placement`.
    public var facts: JSONObject {
        functions.reduce(into: JSONObject()) { facts, entry in
            facts[entry.key.rawValue] = [
                "ne": .integer(entry.value.neuralEngine), "gpu": .integer(entry.value.gpu),
                "cpu": .integer(entry.value.cpu),
            ]
        }
    }

    /// For a person: "Neural Engine 412 of 440 steps, CPU 28", the unit that has most of them first.
    public var summary: String {
        let counts = counts
        let units = [("Neural Engine", counts.neuralEngine), ("GPU", counts.gpu), ("CPU", counts.cpu)]
        let shares = units.filter { $0.1 > 0 }.sorted { $0.1 > $1.1 }
        guard let (name, count) = shares.first else { return "nothing is planned" }
        let others = shares.dropFirst().map { ", \($0.0) \($0.1)" }
        return "\(name) \(count) of \(counts.total) steps\(others.joined())"
    }
}
