// The messages between the proxy rank and the iPad, as values with the names of `ios_proxy/PROTOCOL.md`.
//
// Knows: every type of message, and what its fields hold.
// Must not know: how any of them becomes bytes, or which may follow which.
//
// The types are nested because `Data`, `Error` and `Result` have other meanings outside.

/// One message, from either end.
public enum Message: Sendable, Hashable {
    case hello(Hello)
    case challenge(Challenge)
    case proof(Proof)
    case info(Info)
    case offer(Offer)
    case want(Want)
    case data(Data)
    case stored(Stored)
    case load(Load)
    case loading(Loading)
    case ready(Ready)
    case reset(Reset)
    case prefill(Prefill)
    case decode(Decode)
    case result(Result)
    case error(Error)
    case ping(Ping)
    case pong(Pong)
    case bye

    public struct Hello: Sendable, Hashable {
        public var nonce: Bytes32

        public init(nonce: Bytes32) {
            self.nonce = nonce
        }
    }

    public struct Challenge: Sendable, Hashable {
        public var nonce: Bytes32
        public var proof: Bytes32

        public init(nonce: Bytes32, proof: Bytes32) {
            self.nonce = nonce
            self.proof = proof
        }
    }

    public struct Proof: Sendable, Hashable {
        public var proof: Bytes32

        public init(proof: Bytes32) {
            self.proof = proof
        }
    }

    /// The node's description of itself.
    public struct Info: Sendable, Hashable {
        public var facts: JSONObject

        public init(facts: JSONObject) {
            self.facts = facts
        }
    }

    public struct Offer: Sendable, Hashable {
        public var bundle: Bytes32
        public var files: [File]

        public init(bundle: Bytes32, files: [File]) {
            self.bundle = bundle
            self.files = files
        }
    }

    /// One file of an offered bundle.
    public struct File: Sendable, Hashable {
        public var name: String
        public var length: UInt64
        public var sha256: Bytes32

        public init(name: String, length: UInt64, sha256: Bytes32) {
            self.name = name
            self.length = length
            self.sha256 = sha256
        }
    }

    /// The node lacks the bundle's bytes from `offset` on; the bundle's length if it lacks none.
    public struct Want: Sendable, Hashable {
        public var offset: UInt64

        public init(offset: UInt64) {
            self.offset = offset
        }
    }

    public struct Data: Sendable, Hashable {
        public var offset: UInt64
        public var piece: [UInt8]

        public init(offset: UInt64, piece: [UInt8]) {
            self.offset = offset
            self.piece = piece
        }
    }

    public struct Stored: Sendable, Hashable {
        public var bundle: Bytes32

        public init(bundle: Bytes32) {
            self.bundle = bundle
        }
    }

    public struct Load: Sendable, Hashable {
        public var bundle: Bytes32

        public init(bundle: Bytes32) {
            self.bundle = bundle
        }
    }

    public struct Loading: Sendable, Hashable {
        public var text: String

        public init(text: String) {
            self.text = text
        }
    }

    public struct Ready: Sendable, Hashable {
        public var facts: JSONObject

        public init(facts: JSONObject) {
            self.facts = facts
        }
    }

    public struct Reset: Sendable, Hashable {
        public var epoch: UInt32

        public init(epoch: UInt32) {
            self.epoch = epoch
        }
    }

    /// A failure; `epoch` and `request` are 0 where it concerns no request.
    public struct Error: Sendable, Hashable {
        public var code: ErrorCode
        public var text: String
        public var epoch: UInt32
        public var request: UInt32

        public init(code: ErrorCode, text: String, epoch: UInt32 = 0, request: UInt32 = 0) {
            self.code = code
            self.text = text
            self.epoch = epoch
            self.request = request
        }
    }

    public struct Ping: Sendable, Hashable {
        public var number: UInt64

        public init(number: UInt64) {
            self.number = number
        }
    }

    public struct Pong: Sendable, Hashable {
        public var number: UInt64
        public var facts: JSONObject

        public init(number: UInt64, facts: JSONObject) {
            self.number = number
            self.facts = facts
        }
    }
}
