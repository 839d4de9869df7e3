// How much a node computes, and how long its requests take and wait.
//
// Knows: counters, the period over which they are averaged.
// Must not know: what is computed, who shows the figures.

import Synchronization

/// What a node has computed for its proxy.
public struct Traffic: Sendable, Hashable {
    /// Since the package was loaded, those that failed included.
    public var requests = 0
    /// Since the package was loaded.
    public var tokens = 0

    // Of the last period; all are 0 where nothing came.
    public var tokensPerSecond = 0.0
    /// A request's computing.
    public var computingMilliseconds = 0.0
    /// How long a request lay there while those before it were computed.
    public var waitingMilliseconds = 0.0
    /// The share of the time in which something was computed, 0 to 1: near 1 the device is what the ring waits for.
    public var busy = 0.0

    public init() {}
}

/// Counts on the compute queue, and is read on another.
final class TrafficMeter: Sendable {
    private struct Counts {
        var traffic = Traffic()
        var since: Double?
        /// Of this period, in seconds where it is time.
        var requests = 0
        var tokens = 0
        var computing = 0.0
        var waiting = 0.0
        /// Whether the period before had any.
        var wasBusy = false
    }

    private let counts = Mutex(Counts())

    /// A request was answered; times in nanoseconds.
    func count(tokens: Int, computing: UInt64, waiting: UInt64) {
        counts.withLock { counts in
            counts.requests += 1
            counts.tokens += tokens
            counts.computing += Double(computing) / 1e9
            counts.waiting += Double(waiting) / 1e9
        }
    }

    /// Begins anew, with another package.
    func clear() {
        counts.withLock { $0 = Counts() }
    }

    /// The figures of a period that is over, once; nil before, and where this and the one before had no request.
    func sample(now: Double, period: Double) -> Traffic? {
        counts.withLock { counts in
            let since = counts.since ?? now
            guard counts.since != nil, now - since >= period else {
                counts.since = since
                return nil
            }
            let hadAny = counts.requests > 0
            guard hadAny || counts.wasBusy else {
                counts.since = now
                return nil
            }
            var traffic = counts.traffic
            traffic.requests += counts.requests
            traffic.tokens += counts.tokens
            traffic.tokensPerSecond = Double(counts.tokens) / (now - since)
            traffic.computingMilliseconds = hadAny ? 1e3 * counts.computing / Double(counts.requests) : 0
            traffic.waitingMilliseconds = hadAny ? 1e3 * counts.waiting / Double(counts.requests) : 0
            // A request may have begun in the period before.
            traffic.busy = min(1, counts.computing / (now - since))
            counts = Counts(traffic: traffic, since: now, wasBusy: hadAny)
            return traffic
        }
    }
}
