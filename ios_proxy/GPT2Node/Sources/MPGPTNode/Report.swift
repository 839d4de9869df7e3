// What happened at a node, for whoever shows it: the terminal, the app.
//
// Knows: which things are worth telling, and the words for each.
// Must not know: who shows them.

/// One thing that happened.
public enum Report: Sendable, Hashable {
    case listening(host: String, port: Int)
    /// A proxy has proved itself, and is served. Proxies are named by their addresses.
    case arrived(proxy: String)
    case gone(proxy: String, why: String)
    /// The proxy that was served is given up.
    case silent(proxy: String, seconds: Double)
    /// Another proxy came while one is served.
    case sentAway(proxy: String, served: String)
    case anotherToken(proxy: String)
    /// A proxy speaks another version of the protocol.
    case anotherVersion(proxy: String)
    /// A bundle is on its way, from a byte on.
    case receiving(bytes: UInt64, of: UInt64)
    /// So much of it is here; comes at each per cent.
    case received(bytes: UInt64, of: UInt64)
    /// A bundle was not taken.
    case refused(StoreError)
    case loading(model: String, layers: Range<Int>)
    /// A compute unit cannot run the package; the next one is tried.
    case unfit(unit: String, why: String)
    /// A compute unit is not tried, since the program ended when it was.
    case leftOut(unit: String, why: String)
    case loaded(unit: String, seconds: Double, difference: Double, placement: Placement?)
    case loadFailed(why: String)
    /// Comes every second while requests do, and once more with zeros after that.
    case traffic(Traffic)

    /// Whether it is for a page that shows figures, and none for a log.
    public var isFigures: Bool {
        switch self {
        case .traffic, .received: true
        default: false
        }
    }

    /// As the node's terminal shows it.
    public var line: String {
        switch self {
        case .listening(let host, let port): "listening on \(host):\(port)"
        case .arrived(let proxy): "the proxy at \(proxy) is here"
        case .gone(let proxy, let why): "the proxy at \(proxy) has gone: \(why)"
        case .silent(let proxy, let seconds):
            "the proxy at \(proxy) has gone: nothing was heard of it for \(seconds) s"
        case .sentAway(let proxy, let served):
            "the proxy at \(proxy) came while the one at \(served) is served: sent away"
        case .anotherToken(let proxy): "the proxy at \(proxy) has another token"
        case .anotherVersion(let proxy): "the proxy at \(proxy) speaks another version of the protocol"
        case .receiving(let from, let total): "a package of \(total) bytes is sent, from byte \(from) on"
        case .received(let bytes, let total): "\(Figures.percent(bytes, of: total))% of the package are here"
        case .refused(let error): "the package is not taken: \(error.text)"
        case .loading(let model, let layers): "loading layers \(layers.lowerBound)-\(layers.upperBound - 1) of \(model)"
        case .unfit(let unit, let why): "not on \(unit): \(why)"
        case .leftOut(let unit, let why): "\(unit) is left out: \(why)"
        case .loaded(let unit, let seconds, let difference, let placement):
            "loaded on \(unit) in \(rounded(seconds)) s; the self-test is off by \(rounded(difference))"
                + (placement.map { "; \($0.summary)" } ?? "")
        case .loadFailed(let why): "the package cannot be run: \(why)"
        case .traffic(let traffic):
            "\(rounded(traffic.tokensPerSecond)) tokens/s; \(rounded(traffic.computingMilliseconds)) ms a request and "
                + "\(rounded(traffic.waitingMilliseconds)) ms of waiting; \(traffic.requests) requests so far"
        }
    }
}

/// Four digits behind the point.
private func rounded(_ value: Double) -> Double {
    value.isFinite ? (value * 1e4).rounded() / 1e4 : value
}
