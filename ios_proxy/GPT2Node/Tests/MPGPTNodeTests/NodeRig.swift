// A node on the loopback interface whose package only copies, and a proxy that does what a test says.
//
// Knows: a bundle that passes its self-test, the course of a connection, blocking sockets.
// Must not know: what any test expects.

import Foundation
import MPGPTWire
import Synchronization

@testable import MPGPTNode

#if canImport(Glibc)
    import Glibc
#endif

let linkToken = Token(Array("a token that both ends have".utf8))!
let width = 4
let slotCount = 3
let contextLength = 32

/// What a test has the predictors do; every predictor of a rig looks here.
final class Orders: Sendable {
    struct Values {
        /// Seconds that a call takes.
        var nap = 0.0
        /// The words with which the next call fails.
        var failure: String?
        /// Whether every call fails from now on, until a predictor is made anew.
        var isDead = false
        /// Why no package can be opened.
        var refusal: String?
        var opened = 0
        var calls = 0
    }

    private let values = Mutex(Values())

    func change<T: Sendable>(_ body: (inout Values) -> T) -> T {
        values.withLock { body(&$0) }
    }
}

/// y is x.
final class Copying: Predictor {
    let unit = "a copier"
    private let orders: Orders

    init(_ orders: Orders) throws {
        self.orders = orders
        let refusal = orders.change { values in
            values.opened += 1
            values.isDead = false
            return values.refusal
        }
        if let refusal { throw ComputeError.failed(refusal) }
    }

    func predict(_ function: Function, _ inputs: Inputs) throws -> Tensor {
        let (nap, failure) = orders.change { values in
            values.calls += 1
            defer { values.failure = nil }
            return (values.nap, values.isDead ? "dead" : values.failure)
        }
        Thread.sleep(forTimeInterval: nap)
        if let failure { throw ComputeError.failed(failure) }
        guard let x = inputs["x"] else { throw ComputeError.failed("no x") }
        return x
    }

    func reset() throws {
        if orders.change({ $0.isDead }) { throw ComputeError.failed("dead") }
    }
}

/// A bundle of three files and a bit, as its bytes.
struct SmallBundle: Sendable {
    let files: [(name: String, bytes: [UInt8])]

    init(weights: Int = 1000) {
        let manifest = """
            {"format": 1, "model": "small", "model_hash": "\(String(repeating: "ab", count: 32))", "family": "gpt2",
             "model_layers": 4, "layers": [1, 3], "embed": \(width), "heads": 2, "kv_heads": 2, "head_dim": 2,
             "slots": \(slotCount), "context": \(contextLength), "chunk": 4, "weights": "float16", "rotary": null,
             "tolerance": 0.01, "made_by": {"mpgpt": "0", "coremltools": "9", "torch": "2"}}
            """
        let tensors = [
            "0.slot": Tensor(shape: [2], int32: [0, 0]), "0.pos": Tensor(shape: [2], int32: [0, 1]),
            "0.x": Tensor(shape: [2, width], float16: [UInt16](repeating: 0x3C00, count: 2 * width)),
            "0.y": Tensor(shape: [2, width], float32: [Float](repeating: 1, count: 2 * width)),
        ]
        files = [
            ("manifest.json", Array(manifest.utf8)),
            ("model.mlpackage/Data/weight.bin", (0..<weights).map { UInt8(truncatingIfNeeded: $0 &* 7) }),
            ("model.mlpackage/Manifest.json", Array("{}".utf8)),
            ("selftest.safetensors", Safetensors(tensors: tensors, metadata: ["kind.0": "prefill"]).encoded()),
        ]
    }

    var bytes: [UInt8] { files.flatMap(\.bytes) }

    var offer: Message.Offer {
        let table = files.map { file in
            var sha = SHA256()
            sha.update(file.bytes)
            return Message.File(name: file.name, length: UInt64(file.bytes.count), sha256: sha.finalize())
        }
        return Message.Offer(bundle: Message.Offer.hash(of: table), files: table)
    }
}

/// A node that listens on a port of its own.
final class Rig {
    let folder = FileManager.default.temporaryDirectory.appending(path: "mpgpt-\(UUID().uuidString)").path
    let orders = Orders()
    let bundle = SmallBundle()
    let server: NodeServer
    let port: Int
    private let told: Told

    private final class Told: Sendable {
        let reports = Mutex<[Report]>([])
    }

    init(_ patience: Patience = Patience(), change: (inout NodeServer.Options) -> Void = { _ in }) throws {
        let (orders, told) = (orders, Told())
        let unit = ComputeUnit(name: "a copier") { _ in try Copying(orders) }
        var options = NodeServer.Options(token: linkToken, device: .here(app: "a test"), units: [unit])
        (options.port, options.patience) = (0, patience)
        options.patience.tick = 0.02
        change(&options)
        server = NodeServer(options, store: try Store(folder: folder)) { report in
            told.reports.withLock { $0.append(report) }
        }
        port = try server.listen()
        server.start()
        self.told = told
    }

    deinit {
        stop()
        try? FileManager.default.removeItem(atPath: folder)
    }

    var reports: [Report] { told.reports.withLock { $0 } }

    func stop() {
        let over = DispatchSemaphore(value: 0)
        server.stop { over.signal() }
        _ = over.wait(timeout: .now() + 10)
    }

    func proxy(token: Token = linkToken) throws -> ByHand {
        try ByHand(port: port, bundle: bundle, token: token)
    }
}

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
