// The rule of the one proxy: who is served, who waits, who has to leave.
//
// Knows: the rule in `ios_proxy/PROTOCOL.md`, "One proxy".
// Must not know: connections, clocks, what is sent to whom.

/// Who is served, and who has proved itself and waits. Visitors are numbers.
struct Admission {
    enum Decision: Equatable {
        /// Is served from now on.
        case admit(Int)
        /// Has to go, since another is served, and is there.
        case sendAway(Int)
        /// Has gone without a word, and is closed, since another waits.
        case displace(Int)
    }

    /// A newcomer waits this long, and the one that is served sends something this often.
    let patience: Patience
    private(set) var served: Int?
    private var waiting: [(visitor: Int, since: Double)] = []
    /// Whether the one that is served has been told to go, or goes by itself.
    private var isLeaving = false

    init(patience: Patience) {
        self.patience = patience
    }

    mutating func arrive(_ visitor: Int, now: Double) {
        waiting.append((visitor, now))
    }

    /// A visitor is about to leave: it may still be told something, and is no longer measured.
    mutating func leave(_ visitor: Int) {
        waiting.removeAll { $0.visitor == visitor }
        if served == visitor { isLeaving = true }
    }

    /// Nothing of a visitor is left.
    mutating func remove(_ visitor: Int) {
        leave(visitor)
        if served == visitor { (served, isLeaving) = (nil, false) }
    }

    /// What is to be done now; to be called again until it is nothing. `lastHeard` is when the one that is served sent
    /// anything.
    mutating func decide(now: Double, lastHeard: Double) -> Decision? {
        guard let first = waiting.first else { return nil }
        guard let served else {
            waiting.removeFirst()
            self.served = first.visitor
            return .admit(first.visitor)
        }
        guard !isLeaving, now - first.since > patience.newcomer else { return nil }
        if now - lastHeard < patience.life {
            waiting.removeFirst()
            return .sendAway(first.visitor)
        }
        isLeaving = true
        return .displace(served)
    }
}
