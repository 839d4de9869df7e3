// The node's end of the iPad link as a state machine, sans I/O: it lets a proxy prove itself, and returns commands.
//
// Knows: which message may come when, epochs, which bytes of a bundle come next, which requests are open.
// Must not know: sockets, clocks, how a bundle is kept or a request computed.
//
// Bytes that come in go to `receive`. Bytes to be sent lie in `out`, from which the driver takes as many as its socket
// takes. When `receive` throws, or `isOver` is true, the driver sends what is in `out`, and closes.

/// What the driver must act on; the session itself answers the handshake and PINGs.
public enum Command: Sendable, Hashable {
    /// The proxy has proved itself: `admit` it, or refuse it with `error(.busy, ...)`.
    case proof
    /// Answer with `want`, then `stored` where nothing is wanted.
    case offer(Message.Offer)
    /// The next bytes of the bundle; after the last of them answer with `stored`.
    case data(Message.Data)
    /// Answer with `ready`.
    case load(Message.Load)
    case reset(Message.Reset)
    /// Answer with `result`.
    case request(Request)
}

/// Why a connection has ended.
public struct SessionError: Error, Sendable, Hashable {
    public enum Reason: Sendable, Hashable {
        /// The proxy broke a rule, and is sent an ERROR of this code.
        case refused(ErrorCode)
        /// The proxy sent an ERROR of this code.
        case received(ErrorCode)
        /// The proxy sent BYE.
        case bye
    }

    public let reason: Reason
    /// A sentence for a person.
    public let text: String
    /// The request that broke the rule.
    private(set) var request: Request?

    static func refused(_ code: ErrorCode, _ text: String, for request: Request? = nil) -> SessionError {
        SessionError(reason: .refused(code), text: text, request: request)
    }
}

/// The listening end of one connection.
public struct NodeSession: Sendable {
    enum State: Sendable {
        case new, challenged
        /// Proved, and not yet admitted.
        case proved
        case known
        /// Offered a bundle: the driver looks how much of it is there.
        case offered
        case receiving
        /// All of the bundle is there: the driver checks it.
        case received
        case stored, loading, loaded, serving, over
    }

    /// Bytes for the proxy. Who finds many here should read no more before they are sent.
    public var out: [UInt8] = []
    /// When the last bytes came.
    public private(set) var lastHeard: Double
    /// Whether the proxy has proved that it has the token.
    public private(set) var isAuthenticated = false

    var state = State.new
    var frames = Frames()
    var bundle = IncomingBundle()
    var rules = RequestRules()
    var open = OpenRequests()
    let facts: JSONObject
    private let token: Token
    private let nonce: Bytes32
    private let health: @Sendable () -> JSONObject
    private let begun: Double
    private var proxyNonce: Bytes32?

    /// INFO carries `facts`, and every PONG what `health` returns then. The nonce is random; times are in seconds.
    public init(
        token: Token, nonce: Bytes32, now: Double, facts: JSONObject, health: @escaping @Sendable () -> JSONObject
    ) {
        (self.token, self.nonce, self.facts, self.health) = (token, nonce, facts, health)
        (begun, lastHeard) = (now, now)
    }

    /// Whether the connection has ended, by either end.
    public var isOver: Bool { state == .over }

    /// Whether the handshake was not over in time, or the proxy has gone without a word.
    public func isLate(_ now: Double) -> Bool {
        isAuthenticated ? now - lastHeard > Times.proxySilence : now - begun > Times.handshake
    }

    /// Takes bytes cut anywhere, and returns the commands in them.
    public mutating func receive(_ bytes: some Collection<UInt8>, now: Double) throws(SessionError) -> [Command] {
        guard !isOver else { return [] }
        if !bytes.isEmpty { lastHeard = now }
        frames.feed(bytes)
        var commands: [Command] = []
        do {
            while let message = try nextMessage() {
                if let command = try take(message) { commands.append(command) }
            }
        } catch {
            if case .refused(let code) = error.reason { sendError(code, error.text, for: error.request) }
            state = .over
            throw error
        }
        return commands
    }

    mutating func send(_ message: Message) {
        out += message.frame
    }

    mutating func sendError(_ code: ErrorCode, _ text: String, for request: Request?) {
        let (epoch, number) = (request?.epoch ?? 0, request?.number ?? 0)
        send(.error(Message.Error(code: code, text: text, epoch: epoch, request: number)))
    }

    private mutating func nextMessage() throws(SessionError) -> Message? {
        let state = state
        do {
            return try frames.next(admit: state.allows)
        } catch {
            throw refusal(of: error)
        }
    }

    private func refusal(of error: WireError) -> SessionError {
        switch error {
        case .badFrame(let text): .refused(.badFrame, text)
        case .badVersion(let version):
            .refused(.badVersion, "version \(version) is not \(Header.version): update the older program")
        case .notAllowed(let kind): unexpected(kind)
        }
    }

    private func unexpected(_ kind: Kind) -> SessionError {
        .refused(.badState, "\(kind.name) was not expected now")
    }

    // MARK: - Messages from the proxy

    private mutating func take(_ message: Message) throws(SessionError) -> Command? {
        switch message {
        case .error(let error): throw ended(by: error)
        case .bye: throw SessionError(reason: .bye, text: "the proxy said good-bye")
        case .ping(let ping):
            send(.pong(Message.Pong(number: ping.number, facts: health())))
            return nil
        case .hello(let hello):
            challenge(hello)
            return nil
        case .proof(let proof): return try authenticate(proof)
        case .offer(let offer):
            (state, bundle) = (.offered, IncomingBundle(offer))
            return .offer(offer)
        case .data(let data): return try add(data)
        case .load(let load): return try begin(load)
        case .reset(let reset):
            state = .serving
            open.begin(epoch: reset.epoch)
            return .reset(reset)
        case .prefill(let prefill): return try accept(.prefill(prefill))
        case .decode(let decode): return try accept(.decode(decode))
        default: throw unexpected(message.kind)
        }
    }

    /// What a stranger says is not shown to anybody.
    private func ended(by error: Message.Error) -> SessionError {
        let shown = isAuthenticated && !error.text.isEmpty ? error.text : "\(error.code)"
        return SessionError(reason: .received(error.code), text: "the proxy gave up: \(shown)")
    }

    private mutating func challenge(_ hello: Message.Hello) {
        (state, proxyNonce) = (.challenged, hello.nonce)
        let proof = token.nodeProof(proxyNonce: hello.nonce, nodeNonce: nonce)
        send(.challenge(Message.Challenge(nonce: nonce, proof: proof)))
    }

    private mutating func authenticate(_ proof: Message.Proof) throws(SessionError) -> Command {
        guard let proxyNonce else { throw unexpected(.proof) }
        let expected = token.proxyProof(proxyNonce: proxyNonce, nodeNonce: nonce)
        guard expected.isEqualInConstantTime(proof.proof) else {
            throw .refused(.badToken, "the tokens of the two ends differ")
        }
        (state, isAuthenticated) = (.proved, true)
        return .proof
    }

    private mutating func add(_ data: Message.Data) throws(SessionError) -> Command {
        guard bundle.take(data) else {
            throw .refused(.badBundle, "DATA at byte \(data.offset), not \(bundle.next) of \(bundle.length)")
        }
        if bundle.isComplete { state = .received }
        return .data(data)
    }

    private mutating func begin(_ load: Message.Load) throws(SessionError) -> Command {
        guard load.bundle == bundle.hash else { throw .refused(.badBundle, "LOAD of a bundle that was not offered") }
        state = .loading
        return .load(load)
    }

    private mutating func accept(_ request: Request) throws(SessionError) -> Command {
        if let problem = open.problem(with: request) ?? rules.problem(with: request) {
            throw .refused(.badRequest, problem, for: request)
        }
        guard open.count < rules.queue else {
            throw .refused(.busy, "more than \(rules.queue) requests at once", for: request)
        }
        open.append(request)
        return .request(request)
    }
}

extension NodeSession.State {
    /// Whether a message may come now. ERROR and BYE always may: they end a connection, and are never answered.
    func allows(_ kind: Kind) -> Bool {
        switch kind {
        case .error, .bye: self != .over
        case .ping: self != .new && self != .challenged && self != .over
        case .hello: self == .new
        case .proof: self == .challenged
        case .offer: self == .known
        case .data: self == .receiving
        case .load: self == .stored
        case .reset: self == .loaded || self == .serving
        case .prefill, .decode: self == .serving
        case .challenge, .info, .want, .stored, .loading, .ready, .result, .pong: false
        }
    }
}
