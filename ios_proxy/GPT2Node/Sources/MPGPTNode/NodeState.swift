// The state of a node as far as a person cares: folded from reports, besides what the app itself knows.
//
// Knows: what each report changes.
// Must not know: words for it (`Presentation.swift`), views, clocks.

/// What a node does, and what went wrong lately. Times are seconds on a clock that is handed in.
public struct NodeState: Sendable {
    public enum Listening: Sendable, Hashable {
        case off
        case on(port: Int)
        case failed(port: Int, why: String)
        /// There is no place for packages.
        case noStore(why: String)
    }

    /// What is being done with a package.
    enum Activity: Sendable, Hashable {
        case idle
        case receiving(bytes: UInt64, of: UInt64)
        case loading(since: Double)
        case failed(why: String)
    }

    /// A package by what it holds.
    struct Package: Sendable, Hashable {
        let model: String
        let layers: Range<Int>

        /// For a person.
        var title: String { "\(Figures.layers(layers)) of \(model)" }
    }

    struct Loaded: Sendable, Hashable {
        let unit: String
        let seconds, difference: Double
        let placement: Placement?
    }

    /// A compute unit that is not used.
    struct Unused: Sendable, Hashable {
        let unit, why: String
        /// The program ended when it was tried.
        let wasFatal: Bool
    }

    /// Why no proxy is served, or another is not.
    enum Trouble: Sendable, Hashable {
        case anotherToken(proxy: String)
        case anotherVersion(proxy: String)
        case silence(proxy: String, seconds: Double)
        case noRoom(why: String)
        case badPackage(why: String)
        case anotherFormat
        /// The proxy that came later.
        case twoRings(proxy: String)
    }

    // What the app knows by itself.

    /// The token's; nil where there is none.
    public var fingerprint: String?
    public var addresses: [String] = []
    public var listening = Listening.off
    public var health = Health()
    public var isLowPower = false
    /// The number of the operating system's version; nil where it does not matter.
    public var system: Int?

    // What reports say.

    private(set) var proxy: String?
    private(set) var package: Package?
    private(set) var activity = Activity.idle
    private(set) var loaded: Loaded?
    private(set) var unused: [Unused] = []
    private(set) var traffic: Traffic?
    /// What came of the packages that were tried.
    private(set) var outcomes: [Package: Result<Loaded, LoadError>] = [:]
    /// When each trouble was last met.
    private(set) var troubles: [Trouble: Double] = [:]

    public init() {}

    public mutating func take(_ report: Report, at now: Double) {
        switch report {
        case .listening(_, let port): listening = .on(port: port)
        case .arrived(let proxy):
            self.proxy = proxy
            forget { $0.isOfStrangers }
        case .gone(let proxy, _) where proxy == self.proxy: leave()
        case .silent(let proxy, let seconds) where proxy == self.proxy:
            leave()
            troubles[.silence(proxy: proxy, seconds: seconds)] = now
        case .gone, .silent: break  // one that was never served
        case .sentAway(let proxy, _): troubles[.twoRings(proxy: proxy)] = now
        case .anotherToken(let proxy): troubles[.anotherToken(proxy: proxy)] = now
        case .anotherVersion(let proxy): troubles[.anotherVersion(proxy: proxy)] = now
        case .refused(let error):
            switch error.kind {
            case .noSpace: troubles[.noRoom(why: error.text)] = now
            case .anotherFormat: troubles[.anotherFormat] = now
            case .other: troubles[.badPackage(why: error.text)] = now
            }
        case .receiving(let bytes, let total), .received(let bytes, let total):
            activity = bytes < total ? .receiving(bytes: bytes, of: total) : .idle
            forget { $0.isOfPackages }
        case .loading(let model, let layers):
            (package, activity, loaded) = (Package(model: model, layers: layers), .loading(since: now), nil)
            (unused, traffic) = ([], nil)
            forget { $0.isOfPackages }
        case .unfit(let unit, let why): unused.append(Unused(unit: unit, why: why, wasFatal: false))
        case .leftOut(let unit, let why): unused.append(Unused(unit: unit, why: why, wasFatal: true))
        case .loaded(let unit, let seconds, let difference, let placement):
            let fresh = Loaded(unit: unit, seconds: seconds, difference: difference, placement: placement)
            (activity, loaded) = (.idle, fresh)
            if let package { outcomes[package] = .success(fresh) }
        case .loadFailed(let why):
            activity = .failed(why: why)
            if let package { outcomes[package] = .failure(LoadError(text: why)) }
        case .traffic(let traffic): self.traffic = traffic
        }
    }

    /// The listener is closed: nobody is served.
    public mutating func stop() {
        leave()
        listening = .off
        forget { $0.isOfStrangers }
    }

    /// What could not be run is to be tried again.
    public mutating func forgetFailures() {
        if case .failed = activity { activity = .idle }
        outcomes = outcomes.filter { if case .success = $0.value { true } else { false } }
        forget { $0.isOfPackages }
    }

    private mutating func leave() {
        proxy = nil
        traffic = nil
        if case .receiving = activity { activity = .idle }
    }

    private mutating func forget(_ isOver: (Trouble) -> Bool) {
        troubles = troubles.filter { !isOver($0.key) }
    }
}

extension NodeState.Trouble {
    /// It is over when a proxy is served.
    fileprivate var isOfStrangers: Bool {
        switch self {
        case .anotherToken, .anotherVersion, .silence: true
        case .noRoom, .badPackage, .anotherFormat, .twoRings: false
        }
    }

    /// It is over when a package comes.
    fileprivate var isOfPackages: Bool {
        switch self {
        case .noRoom, .badPackage, .anotherFormat: true
        case .anotherToken, .anotherVersion, .silence, .twoRings: false
        }
    }
}
