// The bundle that a node is sent: how much of it is here, and which bytes may come next.
//
// Knows: offsets.
// Must not know: states, where bytes are kept, what an offer may hold (`Offer.swift`).

/// A bundle that was offered, and how much of it is here.
struct IncomingBundle: Sendable {
    private(set) var hash: Bytes32?
    private(set) var length: UInt64 = 0
    /// The offset that the next DATA must have.
    var next: UInt64 = 0

    init() {}

    init(_ offer: Message.Offer) {
        hash = offer.bundle
        // An offer beyond a number's range is for the driver to refuse; until then no DATA may come.
        length = offer.length ?? .max
    }

    var isComplete: Bool { next >= length }

    /// Whether these are the next bytes; if so they count as here.
    mutating func take(_ data: Message.Data) -> Bool {
        guard data.offset == next, next <= length, UInt64(data.piece.count) <= length - next else { return false }
        next += UInt64(data.piece.count)
        return true
    }
}
