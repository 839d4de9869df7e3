// What views show of a node: one headline, what else is worth knowing, figures.
//
// Knows: which situation comes before which.
// Must not know: words (`Notice.swift`), views, colours, clocks.

/// All that a page about a node's state shows.
public struct Presentation: Sendable, Hashable {
    /// The longest time for which a trouble that mends itself is shown, in seconds. A proxy that was told BUSY dials
    /// again after 30.
    static let recent = 90.0

    /// A label with its value.
    public struct Figure: Sendable, Hashable, Identifiable {
        public let label, value: String
        public var id: String { label }
    }

    public let headline: Notice
    /// What is worth knowing besides.
    public let notices: [Notice]
    public let figures: [Figure]

    /// The address for the ring's settings; nil where there is none.
    public let address: String?

    /// `now` is on the clock of the state's reports.
    public init(_ state: NodeState, now: Double) {
        headline = state.blocked ?? state.packageUnderWay(now) ?? state.serving ?? state.latest(now) ?? state.waiting
        notices = state.besides(now)
        figures = state.figures
        address = state.address
    }
}

extension NodeState {
    var address: String? {
        guard case .on(let port) = listening, let first = addresses.first else { return nil }
        return "\(first):\(port)"
    }

    /// What keeps the node from being reached at all.
    fileprivate var blocked: Notice? {
        if let system, system < 18 { return .oldSystem(system) }
        guard fingerprint != nil else { return .noToken }
        if case .failed(let port, let why) = listening { return .noPort(port, why) }
        if case .noStore(let why) = listening { return .noStore(why) }
        guard !addresses.isEmpty else { return .noAddress }
        guard case .on = listening else { return .notListening }
        return nil
    }

    fileprivate func packageUnderWay(_ now: Double) -> Notice? {
        switch activity {
        case .idle: nil
        case .receiving(let bytes, let total): .receiving(bytes, of: total)
        case .loading(let since): .loading(package, seconds: now - since, without: unused)
        case .failed(let why): .cannotRun(package, why)
        }
    }

    fileprivate var serving: Notice? {
        guard let proxy else { return nil }
        guard let package, loaded != nil else { return .proxyIsHere(proxy) }
        return .serving(package, proxy)
    }

    /// The trouble of the last proxy that came, where none is served.
    fileprivate func latest(_ now: Double) -> Notice? {
        troubles.filter { $0.key.isHeadline && ($0.key.staysUntilMended || now - $0.value < Presentation.recent) }
            .max { $0.value < $1.value }
            .map { Notice($0.key, fingerprint: fingerprint ?? "") }
    }

    fileprivate var waiting: Notice { .waiting(at: address ?? "", others: addresses.count - 1) }

    fileprivate func besides(_ now: Double) -> [Notice] {
        var notices: [Notice] = []
        if let hot = Notice.heat(health.thermal) { notices.append(hot) }
        for (trouble, when) in troubles.sorted(by: { $0.value < $1.value }) where now - when < Presentation.recent {
            // A proxy that is served leaves no room for it in the headline.
            if case .twoRings = trouble { notices.append(Notice(trouble, fingerprint: fingerprint ?? "")) }
            if proxy != nil, case .anotherToken = trouble {
                notices.append(Notice(trouble, fingerprint: fingerprint ?? ""))
            }
        }
        if let loaded { notices += unused.map { Notice.unused($0, instead: loaded.unit) } }
        if isLowPower { notices.append(.lowPower) }
        if let battery = health.battery, battery < 0.2, health.isCharging != true { notices.append(.battery(battery)) }
        return notices
    }

    fileprivate var figures: [Presentation.Figure] {
        var figures: [Presentation.Figure] = []
        func add(_ label: String, _ value: String?) {
            if let value { figures.append(Presentation.Figure(label: label, value: value)) }
        }
        if loaded != nil {
            add("Package", package?.title)
        }
        add("Proxy", proxy)
        if let traffic {
            add("Speed", "\(Figures.short(traffic.tokensPerSecond)) tokens/s")
            add("Computing", "\(Figures.short(traffic.computingMilliseconds)) ms a request")
            add("Waiting", "\(Figures.short(traffic.waitingMilliseconds)) ms a request")
            add("Busy", Figures.percent(traffic.busy))
        }
        if let loaded {
            add("Unit", loaded.placement?.summary ?? loaded.unit)
            add("Self-test", "off by \(Figures.decimals(loaded.difference, 4))")
            add("Loaded in", Figures.duration(loaded.seconds))
        }
        add("Free memory", health.free.map { Figures.bytes(UInt64(clamping: $0)) })
        add("Battery", health.battery.map { Figures.percent($0) + (health.isCharging == true ? ", charging" : "") })
        add("Token", fingerprint)
        return figures
    }
}

extension NodeState.Trouble {
    fileprivate var isHeadline: Bool { if case .twoRings = self { false } else { true } }

    /// Others are over when the proxy has not come again for a while.
    fileprivate var staysUntilMended: Bool {
        switch self {
        case .noRoom, .badPackage, .anotherFormat, .silence: true
        case .anotherToken, .anotherVersion, .twoRings: false
        }
    }
}
