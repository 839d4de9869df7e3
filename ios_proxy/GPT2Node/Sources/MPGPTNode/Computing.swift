// The compute queue: one job after another, and the package that is loaded.
//
// Knows: when a package is loaded, that there is never more than one, which ones cannot be run.
// Must not know: connections, frames, what it is loaded on (`Ladder.swift`), how it is run (`Executor.swift`).
//
// Predictions block the queue. It is a queue and no actor, since an actor takes the next request while one waits, and
// a slot's positions must come in order.

import Dispatch
import MPGPTWire

/// The queue on which everything is computed. Answers come on that queue, too; a job whose ticket is good no longer is
/// left undone, and never answered.
final class Computing: @unchecked Sendable {  // `loaded` and `failures` are touched on the queue alone
    enum Answer: Sendable {
        case result([UInt8], nanoseconds: UInt64)
        case failure(ComputeError)
    }

    let queue = DispatchQueue(label: "mpgpt.compute", qos: .userInitiated, autoreleaseFrequency: .workItem)
    let ladder: Ladder
    let meter = TrafficMeter()
    private let report: @Sendable (Report) -> Void
    private var loaded: LoadedPackage?
    /// Why packages cannot be run here, by their hash: trying takes minutes, and proxies ask again for ever.
    private var failures: [[UInt8]: String] = [:]
    /// Whether also what is loaded is to be loaded anew when it is next asked for: on a faster unit, maybe.
    private var mustTryAgain = false

    init(ladder: Ladder, report: @escaping @Sendable (Report) -> Void) {
        (self.ladder, self.report) = (ladder, report)
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
        let came = Nanoseconds.now
        queue.async {
            guard ticket.isGood else { return }
            let begun = Nanoseconds.now
            do throws(ComputeError) {
                let y = try self.compute(request)
                let took = Nanoseconds.now - begun
                self.meter.count(tokens: request.x.tokens, computing: took, waiting: begun - came)
                answer(.result(y, nanoseconds: took))
            } catch {
                self.meter.count(tokens: 0, computing: Nanoseconds.now - begun, waiting: begun - came)
                answer(.failure(error))
            }
        }
    }

    /// Forgets that packages could not be run, and that units ended the program: a person wants them tried again.
    func forgetFailures() {
        queue.async {
            self.failures = [:]
            self.mustTryAgain = true
            self.ladder.forgetFailures()
        }
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

    /// To be called on the queue. Who is told of a failure by what is thrown needs no reports, but for those of units.
    func load(_ bundle: Bundle, quietly: Bool = false) throws(LoadError) -> JSONObject {
        dispatchPrecondition(condition: .onQueue(queue))
        if let why = failures[bundle.hash] {
            throw LoadError(text: "\(why) (it is not tried again until the node is started anew, or told to)")
        }
        if let loaded, loaded.hash == bundle.hash, !mustTryAgain, (try? loaded.executor.reset()) != nil {
            return loaded.facts
        }
        (loaded, mustTryAgain) = (nil, false)  // two at once may be more than there is memory for
        let tell = quietly ? { _ in } : report
        tell(.loading(model: bundle.manifest.model, layers: bundle.manifest.layers))
        do throws(LoadError) {
            let fresh = try ladder.load(bundle, report: report)
            loaded = fresh
            meter.clear()
            tell(
                .loaded(
                    unit: fresh.unit, seconds: fresh.seconds, difference: fresh.difference, placement: fresh.placement))
            return fresh.facts
        } catch {
            failures[bundle.hash] = error.text
            tell(.loadFailed(why: error.text))
            throw error
        }
    }
}

private enum Nanoseconds {
    /// On a clock that never goes back.
    static var now: UInt64 { DispatchTime.now().uptimeNanoseconds }
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
