// The shared token, the proofs of it, its fingerprint, and the times and bounds that both ends of the iPad link keep to.
//
// Knows: the numbers and the proofs of `ios_proxy/PROTOCOL.md`.
// Must not know: either end's states (`NodeSession.swift`), where a token is kept, sockets.

/// The protocol's bounds, in bytes where nothing else is said.
public enum Limits {
    /// A payload of any kind.
    public static let payload = 4 << 20
    /// A PREFILL's or a DECODE's: RESULT has the same positions and shape, and a time before them.
    public static let request = payload - 8
    public static let json = 64 << 10
    public static let text = 500
    public static let name = 200
    /// The bytes of a bundle in one DATA.
    public static let piece = 256 << 10
    /// All files of a bundle together.
    public static let bundle: UInt64 = 64 << 30
    /// The files of a bundle.
    public static let files = 1000
    /// The positions of a request.
    public static let rows = 64
    /// The tokens of a request.
    public static let tokens = 512
    /// The numbers of a token's hidden state.
    public static let embed = 16384
    public static let token = 16...1024
    /// Connections at once that have not proved themselves.
    public static let strangers = 8
}

/// The protocol's times, in seconds.
public enum Times {
    /// Both proofs must be right this long after the connection began.
    public static let handshake = 10.0
    /// A proxy that has proved itself is gone when nothing of it came for so long.
    public static let proxySilence = 30.0
    /// LOADING is sent at least this often while a model loads.
    public static let loading = 10.0
    /// A proxy that is there gives a sign of life within this time.
    public static let signOfLife = 5.0
    /// An ERROR is given this long to arrive before the connection is closed for good.
    public static let linger = 1.0
}

/// The secret that both ends were given.
public struct Token: Sendable {
    let bytes: [UInt8]

    /// Takes the white space from both ends; returns nil where what is left is too short or too long.
    public init?(_ bytes: [UInt8]) {
        let isSpace: (UInt8) -> Bool = { $0 == 0x20 || 0x09...0x0d ~= $0 }
        var token = bytes.drop(while: isSpace)
        while let last = token.last, isSpace(last) {
            token.removeLast()
        }
        guard Limits.token ~= token.count else { return nil }
        self.bytes = Array(token)
    }

    /// Whether these bytes are the token, without white space around it.
    public func isExactly(_ bytes: [UInt8]) -> Bool {
        self.bytes == bytes
    }

    /// What a person compares at both ends: 8 hexadecimal digits in two groups.
    public var fingerprint: String {
        let digits = SHA256.hash(Array("mpgpt iPad link 1, fingerprint".utf8) + bytes).description
        return "\(digits.prefix(4)) \(digits.dropFirst(4).prefix(4))"
    }

    public func nodeProof(proxyNonce: Bytes32, nodeNonce: Bytes32) -> Bytes32 {
        proof(of: "mpgpt iPad link 1, node", proxyNonce, nodeNonce)
    }

    public func proxyProof(proxyNonce: Bytes32, nodeNonce: Bytes32) -> Bytes32 {
        proof(of: "mpgpt iPad link 1, proxy", nodeNonce, proxyNonce)
    }

    /// The role keeps a proof from being sent back to who made it.
    private func proof(of role: String, _ theirs: Bytes32, _ ours: Bytes32) -> Bytes32 {
        var hmac = HMAC(key: bytes)
        hmac.update(role.utf8)
        hmac.update(theirs.bytes)
        hmac.update(ours.bytes)
        return hmac.finalize()
    }
}

extension Bytes32 {
    /// Compares in a time that does not tell where two proofs differ.
    func isEqualInConstantTime(_ other: Bytes32) -> Bool {
        zip(bytes, other.bytes).reduce(0) { $0 | ($1.0 ^ $1.1) } == 0
    }
}
