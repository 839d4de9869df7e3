// The node's messages to the proxy, each at its time in a session.
//
// Knows: what each of them does to the session's state.
// Must not know: what made the driver send it.
//
// A call after the end does nothing, since the end comes while the driver is at work. One that the state does not allow
// is the driver's mistake.

extension NodeSession {
    /// Sends INFO to a proxy that has proved itself: it is the one to be served.
    public mutating func admit() {
        guard may(in: .proved) else { return }
        state = .known
        send(.info(Message.Info(facts: facts)))
    }

    /// Sends WANT: the offered bundle's bytes are missing from `offset` on, which is its length if none are.
    public mutating func want(offset: UInt64) {
        guard may(in: .offered) else { return }
        bundle.next = offset
        state = bundle.isComplete ? .received : .receiving
        send(.want(Message.Want(offset: offset)))
    }

    /// Sends STORED: the whole bundle is here, and checked.
    public mutating func stored() {
        guard may(in: .received), let hash = bundle.hash else { return }
        state = .stored
        send(.stored(Message.Stored(bundle: hash)))
    }

    /// Sends LOADING, so that a person sees why a load takes its time.
    public mutating func loading(_ text: String) {
        guard may(in: .loading) else { return }
        send(.loading(Message.Loading(text: text)))
    }

    /// Sends READY. `dtype`, `queue`, `embed` and `slots` in the facts bound the requests that are taken from now on.
    ///
    /// A queue of `RequestRules.defaultQueue` is added where there is none in the facts.
    public mutating func ready(_ facts: JSONObject) {
        guard may(in: .loading) else { return }
        var facts = facts
        facts["queue"] = facts["queue"] ?? .integer(RequestRules.defaultQueue)
        rules = RequestRules(facts)
        state = .loaded
        send(.ready(Message.Ready(facts: facts)))
    }

    /// Sends RESULT of the oldest open request; nothing when a RESET has dropped it.
    public mutating func result(_ request: Request, _ y: Values, computeNanoseconds: UInt64) {
        guard mayAnswer(request) else { return }
        let result = Message.Result(
            epoch: request.epoch, request: request.number, positions: request.positions,
            computeNanoseconds: computeNanoseconds, y: y)
        guard y.hasShape(of: request.x) else {
            error(.computeFailed, "a result that is no answer to its request", for: request)
            return
        }
        open.removeOldest()
        send(.result(result))
    }

    /// Sends ERROR: about the oldest open request in the place of its RESULT, after which the session goes on if the
    /// code is BAD_POS or COMPUTE_FAILED; else it is over. Nothing is sent about a request that a RESET has dropped.
    public mutating func error(_ code: ErrorCode, _ text: String, for request: Request? = nil) {
        guard !isOver else { return }
        if let request {
            guard mayAnswer(request) else { return }
            open.removeOldest()
        }
        sendError(code, text, for: request)
        let goesOn = request != nil && (code == .badPos || code == .computeFailed)
        if !goesOn { state = .over }
    }

    /// Sends BYE to a proxy that has proved itself, and ends the session: the node has to unload, or the app goes.
    public mutating func bye() {
        if isAuthenticated, !isOver { send(.bye) }
        state = .over
    }

    private func may(in expected: State) -> Bool {
        assert(isOver || state == expected, "called while \(state), not \(expected)")
        return state == expected
    }

    private func mayAnswer(_ request: Request) -> Bool {
        guard state == .serving, open.contains(request) else { return false }
        assert(open.isOldest(request), "request \(request.number) is answered before its turn")
        return open.isOldest(request)
    }
}
