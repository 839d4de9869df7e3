// What can execute packages here: Core ML's units, and the evaluator, a Python child.
//
// Knows: their names on the command line, what each wants of the options.
// Must not know: which of them a package passes on.

import MPGPTNode

#if canImport(CoreML)
    import MPGPTCoreML
#endif

enum Units {
    private static let evaluator = "evaluator"

    #if canImport(CoreML)
        static let names = CoreMLRung.allCases.map(\.rawValue) + [evaluator]
        static let `default` = CoreMLRung.available.map(\.rawValue)
        static let compiles = true
        static let help =
            "ne (the Neural Engine), ne-by-token (with prompts token by token), gpu, cpu, or evaluator (in Python)"
    #else
        static let names = [evaluator]
        static let `default` = [evaluator]
        static let compiles = false
        static let help = "evaluator (in Python), where there is no Core ML"
    #endif

    static func parse(_ list: String) throws(UsageError) -> [String] {
        let units = list.split(separator: ",").map(String.init)
        guard !units.isEmpty, units.allSatisfy(names.contains) else {
            throw UsageError(text: "--units is a list of \(names.joined(separator: ", ")), not \(list)")
        }
        return units
    }

    /// The units of that name, for a node with these options.
    static func make(_ options: Options) -> [ComputeUnit] {
        options.units.map { name in
            #if canImport(CoreML)
                if let rung = CoreMLRung(rawValue: name) { return rung.unit(folder: expanded(options.store)) }
            #endif
            return child(options)
        }
    }

    /// The evaluator. A child that dies does not end the node, so that nothing has to be marked.
    private static func child(_ options: Options) -> ComputeUnit {
        let (python, threads, timeout) = (options.python, options.threads, options.timeout)
        return ComputeUnit(name: evaluator) { bundle in
            try ChildPredictor(python: python, package: bundle.package, threads: threads, timeout: timeout)
        }
    }
}
