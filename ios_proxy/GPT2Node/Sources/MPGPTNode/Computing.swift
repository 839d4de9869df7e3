// The compute queue: one job after another, and the package that is loaded.
//
// Knows: when a package is loaded and self-tested, on which units it is tried, that there is never more than one, which
// ones cannot be run.
// Must not know: connections, frames, how a package is run (`Executor.swift`).
//
// Predictions block the queue. It is a queue and no actor, since an actor takes the next request while one waits, and
// a slot's positions must come in order.

import Dispatch
import MPGPTWire

/// One way of running packages; a node has several where a device has several compute units.
public struct ComputeUnit: Sendable {
    public let name: String
    /// Opens a package; called on the compute queue, where alone the predictor is used.
    public let open: @Sendable (Bundle) throws -> any Predictor

    public init(name: String, open: @escaping @Sendable (Bundle) throws -> any Predictor) {
        (self.name, self.open) = (name, open)
    }
}

/// Why a package cannot be run: LOAD_FAILED on the wire.
public struct LoadError: Error, Sendable, Hashable {
    public let text: String
}

/// The queue on which everything is computed. Answers come on that queue, too; a job whose ticket is good no longer is
/// left undone, and never answered.
final class Computing: @unchecked Sendable {  // `loaded` and `failures` are touched on the queue alone
    private struct Loaded {
        let hash: [UInt8]
        let executor: Executor
        /// READY's.
        let facts: JSONObject
        let report: Report
    }

    enum Answer: Sendable {
        case result([UInt8], nanoseconds: UInt64)
        case failure(ComputeError)
    }

    let queue = DispatchQueue(label: "mpgpt.compute", qos: .userInitiated, autoreleaseFrequency: .workItem)
    private let units: [ComputeUnit]
    private let report: @Sendable (Report) -> Void
    private var loaded: Loaded?
    /// Why packages cannot be run here, by their hash: trying takes minutes, and proxies ask again for ever.
    private var failures: [[UInt8]: String] = [:]

    /// `units` are tried one after another, the fastest first.
    init(units: [ComputeUnit], report: @escaping @Sendable (Report) -> Void) {
        (self.units, self.report) = (units, report)
    }

    // MARK: - Jobs

    /// Loads a bundle and runs its self-test, unless it is loaded already; answers with READY's facts.
    func load(
        _ bundle: Bundle, _ ticket: Ticket, then answer: @escaping @Sendable (Result<JSONObject, LoadError>) -> Void
    ) {
        queue.async {
            guard ticket.isGood else { return }
            answer(Result { () throws(LoadError) in try self.load(bundle) })
        }
    }

    /// Empties the cache; says what went wrong, if anything did.
    func reset(_ ticket: Ticket, onFailure fail: @escaping @Sendable (ComputeError) -> Void) {
        queue.async {
            guard ticket.isGood, let executor = self.loaded?.executor else { return }
            do throws(ComputeError) {
                try executor.reset()
            } catch {
                self.loaded = nil
                fail(error)
            }
        }
    }

    func compute(_ request: Request, _ ticket: Ticket, then answer: @escaping @Sendable (Answer) -> Void) {
        queue.async {
            guard ticket.isGood else { return }
            let begun = DispatchTime.now().uptimeNanoseconds
            do throws(ComputeError) {
                let y = try self.compute(request)
                answer(.result(y, nanoseconds: DispatchTime.now().uptimeNanoseconds - begun))
            } catch {
                answer(.failure(error))
            }
        }
    }

    /// Forgets that packages could not be run: a person wants them tried again.
    func forgetFailures() {
        queue.async { self.failures = [:] }
    }

    // MARK: - On the queue

    private func compute(_ request: Request) throws(ComputeError) -> [UInt8] {
        guard let executor = loaded?.executor else { throw .failed("nothing is loaded any more") }
        switch request {
        case .prefill(let prefill):
            let (at, x) = (prefill.position, prefill.x)
            return try executor.prefill(slot: Int(at.slot), position: Int(at.position), x: x.bytes, tokens: x.tokens)
        case .decode(let decode):
            let (slots, positions) = (decode.positions.map { Int($0.slot) }, decode.positions.map { Int($0.position) })
            return try executor.decode(slots: slots, positions: positions, x: decode.x.bytes)
        }
    }

    /// To be called on the queue. Who is told of a failure by what is thrown needs no reports.
    func load(_ bundle: Bundle, quietly: Bool = false) throws(LoadError) -> JSONObject {
        dispatchPrecondition(condition: .onQueue(queue))
        if let why = failures[bundle.hash] {
            throw LoadError(text: "\(why) (it is not tried again until the node is started anew)")
        }
        if let loaded, loaded.hash == bundle.hash, (try? loaded.executor.reset()) != nil {
            return loaded.facts
        }
        loaded = nil  // two at once may be more than there is memory for
        let report = quietly ? { _ in } : report
        report(.loading(model: bundle.manifest.model, layers: bundle.manifest.layers))
        var troubles: [String] = []
        for unit in units {
            do throws(LoadError) {
                let fresh = try open(bundle, on: unit)
                loaded = fresh
                report(fresh.report)
                return fresh.facts
            } catch {
                troubles.append(error.text)
                if units.count > 1 { report(.unfit(unit: unit.name, why: error.text)) }
            }
        }
        let why = troubles.isEmpty ? "there is nothing here that could run it" : troubles.joined(separator: "; ")
        failures[bundle.hash] = why
        report(.loadFailed(why: why))
        throw LoadError(text: why)
    }

    private func open(_ bundle: Bundle, on unit: ComputeUnit) throws(LoadError) -> Loaded {
        let (begun, manifest) = (Patience.now, bundle.manifest)
        do {
            let predictor = try unit.open(bundle)
            let executor = Executor(predictor: predictor, manifest: manifest)
            let difference = try SelfTest.run(executor, path: bundle.selftest, tolerance: manifest.tolerance)
            let seconds = ((Patience.now - begun) * 1e3).rounded() / 1e3
            let facts: JSONObject = [
                "dtype": "float16", "unit": .string(predictor.unit), "load_s": .number(seconds),
                "selftest": .number(difference),
                "layers": [.integer(manifest.layers.lowerBound), .integer(manifest.layers.upperBound)],
                "embed": .integer(manifest.embed), "slots": .integer(manifest.slots),
                "context": .integer(manifest.context), "chunk": .integer(manifest.chunk),
            ]
            return Loaded(
                hash: bundle.hash, executor: executor, facts: facts,
                report: .loaded(unit: predictor.unit, seconds: seconds, difference: difference))
        } catch {
            throw LoadError(text: sentence(error))
        }
    }
}

/// An error's own words, for a person.
public func sentence(_ error: any Error) -> String {
    switch error {
    case let error as ComputeError: error.text
    case let error as StoreError: error.text
    case let error as LoadError: error.text
    case let error as SocketError: error.text
    default: "\(error)"
    }
}
