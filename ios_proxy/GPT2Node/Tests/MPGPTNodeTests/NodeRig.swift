// A node on the loopback interface whose package only copies.
//
// Knows: a bundle that passes its self-test, what a predictor may be told to do.
// Must not know: what any test expects.

import Foundation
import MPGPTWire
import Synchronization

@testable import MPGPTNode

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
