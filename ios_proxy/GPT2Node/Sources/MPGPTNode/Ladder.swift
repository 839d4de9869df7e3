// The compute units of a device, the fastest first, and how a package finds the one that it runs on.
//
// Knows: when a package is believed, what is left out and why, what READY says of a package that runs.
// Must not know: what a unit is, how it runs a package; requests, connections.
//
// A unit that a package is tried on may fail, compute rubbish, or take the whole program down with it: the Neural
// Engine's compiler does. So every trial ends with the self-test, and a marker lies on the disk for as long as it lasts.

import MPGPTWire

/// One way of running packages; a node has several where a device has several compute units.
public struct ComputeUnit: Sendable {
    public let name: String
    /// Whether prompts are computed token by token: `prefill` is never called then.
    public let promptsByToken: Bool
    /// Whether to open or to test a package there may end this program.
    public let mayEndProgram: Bool
    /// Opens a package; called on the compute queue, where alone the predictor is used.
    public let open: @Sendable (Bundle) throws -> any Predictor

    public init(
        name: String, promptsByToken: Bool = false, mayEndProgram: Bool = false,
        open: @escaping @Sendable (Bundle) throws -> any Predictor
    ) {
        (self.name, self.promptsByToken, self.mayEndProgram) = (name, promptsByToken, mayEndProgram)
        self.open = open
    }
}

/// Why a package cannot be run: LOAD_FAILED on the wire.
public struct LoadError: Error, Sendable, Hashable {
    public let text: String
}

/// A package that has passed its self-test on one of the units.
public struct LoadedPackage {
    /// The bundle's.
    public let hash: [UInt8]
    public let manifest: Manifest
    /// What computes, in the predictor's words.
    public let unit: String
    public let seconds: Double
    /// The largest that the self-test found.
    public let difference: Double
    public let placement: Placement?
    public let executor: Executor

    /// READY's.
    var facts: JSONObject {
        var facts: JSONObject = [
            "dtype": "float16", "unit": .string(unit), "load_s": .number(seconds), "selftest": .number(difference),
            "layers": [.integer(manifest.layers.lowerBound), .integer(manifest.layers.upperBound)],
            "embed": .integer(manifest.embed), "slots": .integer(manifest.slots),
            "context": .integer(manifest.context), "chunk": .integer(manifest.chunk),
        ]
        facts["placement"] = (placement?.facts).map(JSONValue.object)
        return facts
    }
}

/// The units of a device, in the order in which they are tried.
public struct Ladder: Sendable {
    public let units: [ComputeUnit]
    private let markers: Markers

    /// `folder` is where markers lie, and `system` names the operating system to its build: another one may do better.
    public init(units: [ComputeUnit], folder: String, system: String) {
        (self.units, markers) = (units, Markers(folder: folder, system: system))
    }

    /// Loads a bundle on the first unit that it passes its self-test on.
    func load(_ bundle: Bundle, report: (Report) -> Void) throws(LoadError) -> LoadedPackage {
        var troubles: [String] = []
        for unit in units {
            if let why = reasonToLeaveOut(unit, for: bundle) {
                report(.leftOut(unit: unit.name, why: why))
                troubles.append("\(unit.name): \(why)")
                continue
            }
            do throws(LoadError) {
                return try load(bundle, on: unit)
            } catch {
                if units.count > 1 { report(.unfit(unit: unit.name, why: error.text)) }
                troubles.append(units.count > 1 ? "\(unit.name): \(error.text)" : error.text)
            }
        }
        let isEmpty = troubles.isEmpty
        throw LoadError(text: isEmpty ? "there is nothing here that could run it" : troubles.joined(separator: "; "))
    }

    /// Why a unit is not tried with a bundle, if there is a reason.
    public func reasonToLeaveOut(_ unit: ComputeUnit, for bundle: Bundle) -> String? {
        guard unit.mayEndProgram, markers.areLeft(by: unit.name, bundle.hash) else { return nil }
        return "the program ended while this package was tried there; it is tried again when you ask for it, "
            + "or after an update of the system"
    }

    /// Opens a bundle on one unit and runs its self-test.
    public func load(_ bundle: Bundle, on unit: ComputeUnit) throws(LoadError) -> LoadedPackage {
        let (begun, manifest) = (Patience.now, bundle.manifest)
        do {
            if unit.mayEndProgram { try markers.begin(unit.name, bundle.hash) }
            defer { markers.end() }
            let predictor = try unit.open(bundle)
            let executor = Executor(
                predictor: predictor, manifest: manifest, promptsByToken: unit.promptsByToken)
            let difference = try SelfTest.run(executor, path: bundle.selftest, tolerance: manifest.tolerance)
            let seconds = ((Patience.now - begun) * 1e3).rounded() / 1e3
            return LoadedPackage(
                hash: bundle.hash, manifest: manifest, unit: predictor.unit, seconds: seconds, difference: difference,
                placement: predictor.placement, executor: executor)
        } catch {
            throw LoadError(text: sentence(error))
        }
    }

    /// Has units that ended the program tried again.
    public func forgetFailures() {
        markers.forget()
    }

    /// Whatever ends the program from now on, it is no unit's doing: it was asked to stop, or is no longer shown.
    func acquit() {
        markers.lift()
    }

    /// What `acquit` said is over.
    func watch() {
        markers.restore()
    }
}
