// A proxy that does what a test says, message by message, over a socket that blocks.
//
// Knows: the course of a connection.
// Must not know: what any test expects.

import Foundation
import MPGPTWire

#if canImport(Glibc)
    import Glibc
#endif

struct ProxyTrouble: Error {
    let text: String
}

/// A proxy that does what a test says, message by message. It waits 10 s for an answer, and not for ever.
final class ByHand {
    private let descriptor: Int32
    private let bundle: SmallBundle
    private let token: Token
    private var frames = Frames()
    private(set) var loadings = 0
    let nonce = Bytes32([UInt8](0..<32))!

    init(port: Int, bundle: SmallBundle, token: Token = linkToken) throws {
        (self.bundle, self.token) = (bundle, token)
        #if canImport(Glibc)
            descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        #else
            descriptor = socket(AF_INET, SOCK_STREAM, 0)
        #endif
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = in_port_t(port).bigEndian
        address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
        var patience = timeval(tv_sec: 10, tv_usec: 0)
        setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &patience, socklen_t(MemoryLayout<timeval>.size))
        let size = socklen_t(MemoryLayout<sockaddr_in>.size)
        let failure = withUnsafePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { connect(descriptor, $0, size) }
        }
        guard failure == 0 else { throw ProxyTrouble(text: "nobody listens") }
    }

    deinit {
        close()
    }

    private var isClosed = false

    func close() {
        guard !isClosed else { return }
        isClosed = true
        #if canImport(Glibc)
            _ = Glibc.close(descriptor)
        #else
            _ = Darwin.close(descriptor)
        #endif
    }

    // MARK: - Messages

    func send(_ messages: Message...) {
        send(bytes: messages.flatMap(\.frame))
    }

    func send(bytes: [UInt8]) {
        var rest = bytes[...]
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes { sendQuietly($0) }
            if count <= 0 { return }
            rest = rest.dropFirst(count)
        }
    }

    private func sendQuietly(_ bytes: UnsafeRawBufferPointer) -> Int {
        #if canImport(Glibc)
            Glibc.send(descriptor, bytes.baseAddress, bytes.count, Int32(MSG_NOSIGNAL))
        #else
            Darwin.send(descriptor, bytes.baseAddress, bytes.count, 0)
        #endif
    }

    /// The next message that is no LOADING; nil when the node has closed.
    func hear() throws -> Message? {
        while true {
            while let message = try frames.next() {
                guard case .loading = message else { return message }
                loadings += 1
            }
            var bytes = [UInt8](repeating: 0, count: 1 << 16)
            let count = recv(descriptor, &bytes, bytes.count, 0)
            if count == 0 { return nil }
            guard count > 0 else { throw ProxyTrouble(text: String(cString: strerror(errno))) }
            frames.feed(bytes.prefix(count))
        }
    }

    func hearError() throws -> Message.Error? {
        if case .error(let error) = try hear() { error } else { nil }
    }

    // MARK: - The course of a connection

    /// Proves itself, and returns what comes then: INFO, if it is the one to be served.
    func prove() throws -> Message? {
        send(.hello(Message.Hello(nonce: nonce)))
        guard case .challenge(let challenge) = try hear() else { throw ProxyTrouble(text: "no CHALLENGE") }
        guard challenge.proof == token.nodeProof(proxyNonce: nonce, nodeNonce: challenge.nonce) else {
            throw ProxyTrouble(text: "it has another token")
        }
        send(.proof(Message.Proof(proof: token.proxyProof(proxyNonce: nonce, nodeNonce: challenge.nonce))))
        return try hear()
    }

    /// Goes on to STORED, and returns how much of the bundle the node wanted.
    @discardableResult
    func store() throws -> Int {
        guard case .info = try prove() else { throw ProxyTrouble(text: "no INFO") }
        send(.offer(bundle.offer))
        guard case .want(let want) = try hear() else { throw ProxyTrouble(text: "no WANT") }
        let rest = bundle.bytes[Int(want.offset)...]
        for at in stride(from: rest.startIndex, to: rest.endIndex, by: 300) {
            send(.data(Message.Data(offset: UInt64(at), piece: Array(rest[at...].prefix(300)))))
        }
        guard case .stored = try hear() else { throw ProxyTrouble(text: "no STORED") }
        return rest.count
    }

    /// Goes on until requests may be sent, in epoch 1; returns READY's facts.
    @discardableResult
    func serve() throws -> JSONObject {
        try store()
        send(.load(Message.Load(bundle: bundle.offer.bundle)))
        guard case .ready(let ready) = try hear() else { throw ProxyTrouble(text: "no READY") }
        send(.reset(Message.Reset(epoch: 1)))
        return ready.facts
    }
}

/// Two tokens of a slot.
func request(_ number: UInt32, at position: UInt32, slot: UInt32 = 0, epoch: UInt32 = 1) -> Message {
    let x = Values(
        dtype: .float16, tokens: 2, embed: width, bytes: (0..<4 * UInt8(width)).map { $0 ^ UInt8(number & 15) })!
    return .prefill(
        Message.Prefill(epoch: epoch, request: number, position: Position(slot: slot, position: position), x: x))
}
