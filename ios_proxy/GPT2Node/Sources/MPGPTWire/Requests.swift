// Requests and their results: hidden states with the positions that they belong to.
//
// Knows: positions, values as the raw bytes of the wire.
// Must not know: what the numbers in them are, how they become frames, when a request may come.

/// The number format of values.
public enum DType: UInt8, Sendable, CaseIterable {
    case float16 = 1
    case float32 = 2

    /// Bytes of one number.
    public var size: Int { self == .float16 ? 2 : 4 }

    /// As READY's JSON names it.
    public var name: String { self == .float16 ? "float16" : "float32" }

    public init?(name: String) {
        guard let found = DType.allCases.first(where: { $0.name == name }) else { return nil }
        self = found
    }
}

/// A slot, and a position in it.
public struct Position: Sendable, Hashable {
    public var slot: UInt32
    public var position: UInt32

    public init(slot: UInt32, position: UInt32) {
        self.slot = slot
        self.position = position
    }
}

/// Hidden states [tokens, embed] in little-endian bytes, token after token.
public struct Values: Sendable, Hashable {
    public let dtype: DType
    public let tokens: Int
    public let embed: Int
    /// As many as tokens, embed and dtype say.
    public let bytes: [UInt8]

    /// Returns nil for a shape out of the protocol's bounds, or for bytes of another number.
    public init?(dtype: DType, tokens: Int, embed: Int, bytes: [UInt8]) {
        guard 1...Limits.tokens ~= tokens, 1...Limits.embed ~= embed else { return nil }
        guard bytes.count == tokens * embed * dtype.size else { return nil }
        (self.dtype, self.tokens, self.embed, self.bytes) = (dtype, tokens, embed, bytes)
    }

    public func hasShape(of other: Values) -> Bool {
        (dtype, tokens, embed) == (other.dtype, other.tokens, other.embed)
    }
}

extension Message {
    /// Consecutive tokens of one slot.
    public struct Prefill: Sendable, Hashable {
        public var epoch: UInt32
        public var request: UInt32
        /// The first token's.
        public var position: Position
        public var x: Values

        public init(epoch: UInt32, request: UInt32, position: Position, x: Values) {
            self.epoch = epoch
            self.request = request
            self.position = position
            self.x = x
        }
    }

    /// One token for each of several slots.
    public struct Decode: Sendable, Hashable {
        public var epoch: UInt32
        public var request: UInt32
        /// One a token.
        public var positions: [Position]
        public var x: Values

        public init(epoch: UInt32, request: UInt32, positions: [Position], x: Values) {
            self.epoch = epoch
            self.request = request
            self.positions = positions
            self.x = x
        }
    }

    public struct Result: Sendable, Hashable {
        public var epoch: UInt32
        public var request: UInt32
        /// The request's.
        public var positions: [Position]
        public var computeNanoseconds: UInt64
        public var y: Values

        public init(epoch: UInt32, request: UInt32, positions: [Position], computeNanoseconds: UInt64, y: Values) {
            self.epoch = epoch
            self.request = request
            self.positions = positions
            self.computeNanoseconds = computeNanoseconds
            self.y = y
        }
    }
}

/// A message that a RESULT answers.
public enum Request: Sendable, Hashable {
    case prefill(Message.Prefill)
    case decode(Message.Decode)

    public var epoch: UInt32 {
        switch self {
        case .prefill(let prefill): prefill.epoch
        case .decode(let decode): decode.epoch
        }
    }

    /// It rises from 1 on for as long as a connection lasts.
    public var number: UInt32 {
        switch self {
        case .prefill(let prefill): prefill.request
        case .decode(let decode): decode.request
        }
    }

    public var positions: [Position] {
        switch self {
        case .prefill(let prefill): [prefill.position]
        case .decode(let decode): decode.positions
        }
    }

    public var x: Values {
        switch self {
        case .prefill(let prefill): prefill.x
        case .decode(let decode): decode.x
        }
    }
}
