// Which request may come next: it has the epoch, a new number, and values and slots as READY said.
//
// Knows: which requests are open, and what READY promised.
// Must not know: states, which positions a slot has, what is computed.

/// The numbers of the requests without an answer, oldest first, in one epoch.
struct OpenRequests: Sendable {
    private var epoch: UInt32 = 0
    /// The last request's number, of whichever epoch.
    private var last: UInt32 = 0
    private var numbers: [UInt32] = []

    var count: Int { numbers.count }

    /// Drops what is open.
    mutating func begin(epoch: UInt32) {
        self.epoch = epoch
        numbers = []
    }

    func problem(with request: Request) -> String? {
        guard request.epoch == epoch else {
            return "request \(request.number) is of epoch \(request.epoch), not \(epoch)"
        }
        guard request.number > last else { return "request \(request.number) after request \(last)" }
        return nil
    }

    mutating func append(_ request: Request) {
        last = request.number
        numbers.append(request.number)
    }

    func contains(_ request: Request) -> Bool {
        numbers.contains(request.number)
    }

    func isOldest(_ request: Request) -> Bool {
        numbers.first == request.number
    }

    mutating func removeOldest() {
        numbers.removeFirst()
    }
}

/// What READY promised, as far as it bounds requests.
struct RequestRules: Sendable {
    static let defaultQueue = 8

    private(set) var queue = RequestRules.defaultQueue
    private var dtype: DType?
    private var embed: Int?
    private var slots: Int?

    init() {}

    init(_ facts: JSONObject) {
        queue = facts["queue"]?.integer ?? RequestRules.defaultQueue
        dtype = facts["dtype"]?.string.flatMap(DType.init(name:))
        embed = facts["embed"]?.integer
        slots = facts["slots"]?.integer
    }

    func problem(with request: Request) -> String? {
        let (name, x) = ("request \(request.number)", request.x)
        if let dtype, dtype != x.dtype { return "\(name) has \(x.dtype.name) values, not \(dtype.name)" }
        if let embed, embed != x.embed { return "\(name) has \(x.embed) numbers a token, not \(embed)" }
        var seen: Set<UInt32> = []
        for slot in request.positions.map(\.slot) {
            if let slots, slot >= slots { return "\(name) has slot \(slot) of \(slots)" }
            if !seen.insert(slot).inserted { return "\(name) has slot \(slot) twice" }
        }
        return nil
    }
}
