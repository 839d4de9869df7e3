// A node: it listens, keeps packages, and runs one of them for the proxy that it serves.
//
// Knows: which parts a node has, and on which queue each of them works.
// Must not know: what any of them does; which compute units there are, what shows reports.
//
// Three serial queues: `net` for everything about connections, so that a PING is answered at once; `store` for files
// and their hashes; `compute` for the package. What goes from one to another is a value.

import Dispatch
import MPGPTWire

/// What all connections of a node share.
struct Parts: Sendable {
    let net: DispatchQueue
    let storing: Storing
    let computing: Computing
    let patience: Patience
    let report: @Sendable (Report) -> Void
}

public final class NodeServer: @unchecked Sendable {  // `bound` and `listener` are touched on the net queue alone
    /// What a node is told at its beginning.
    public struct Options: Sendable {
        public var host = "127.0.0.1"
        /// 0 takes any that is free.
        public var port = 8000
        public var token: Token
        public var device: Device
        /// A bundle that need not be sent.
        public var package: Bundle?
        /// The ways of running a package, the fastest first.
        public var units: [ComputeUnit]
        public var health: @Sendable () -> Health = { Health.now }
        public var patience = Patience()

        public init(token: Token, device: Device, units: [ComputeUnit]) {
            (self.token, self.device, self.units) = (token, device, units)
        }
    }

    let parts: Parts
    private let options: Options
    private var bound: Socket?
    private var listener: Listener?

    /// `report` is called on any queue.
    public init(_ options: Options, store: sending Store, report: @escaping @Sendable (Report) -> Void) {
        self.options = options
        let ladder = Ladder(units: options.units, folder: store.folder, system: options.device.system)
        parts = Parts(
            net: DispatchQueue(label: "mpgpt.net", qos: .userInitiated),
            storing: Storing(store, package: options.package),
            computing: Computing(ladder: ladder, report: report), patience: options.patience, report: report)
    }

    /// Takes the port, and returns it. Connections wait until `start`.
    public func listen() throws(SocketError) -> Int {
        try parts.net.sync { () -> Result<Int, SocketError> in
            Result { () throws(SocketError) in
                if let bound { return bound.port }
                let socket = try Socket.listening(host: options.host, port: options.port)
                bound = socket
                return socket.port
            }
        }.get()
    }

    /// Loads the package that need not be sent, and returns when that is done.
    public func loadPackage() throws(LoadError) {
        guard let package = options.package else { return }
        try parts.computing.queue.sync { () -> Result<Void, LoadError> in
            Result { () throws(LoadError) in _ = try parts.computing.load(package, quietly: true) }
        }.get()
    }

    /// Accepts connections at the port that `listen` took.
    public func start() {
        parts.computing.ladder.watch()
        parts.net.sync {
            guard let socket = bound, listener == nil else { return }
            listener = Listener(socket, parts: parts) { [options, parts] in
                NodeSession(
                    token: options.token, nonce: .random, now: Patience.now,
                    facts: options.device.facts(bundles: parts.storing.hashes), health: { options.health().facts })
            }
            parts.report(.listening(host: options.host, port: socket.port))
        }
    }

    /// Says BYE to everybody and gives the port back; `then` is called when nobody is left. What is loaded stays: the
    /// node may `listen` and `start` again. Should the program end before that, no compute unit is blamed for it.
    public func stop(then done: @escaping @Sendable () -> Void) {
        parts.computing.ladder.acquit()
        parts.net.async {
            let listener = self.listener
            if listener == nil { self.bound?.close() }
            (self.listener, self.bound) = (nil, nil)
            guard let listener else { return done() }
            listener.close {
                withExtendedLifetime(listener, done)
            }
        }
    }

    /// Calls back when nothing is computed or loaded any more: a system may forbid it to an app that is not shown.
    public func drain(then done: @escaping @Sendable () -> Void) {
        parts.computing.queue.async(execute: done)
    }

    /// The packages that are kept; called back on any queue.
    public func packages(then answer: @escaping @Sendable ([KeptPackage]) -> Void) {
        parts.storing.packages(then: answer)
    }

    /// Deletes a package by its hash in hex; it is sent again when a proxy wants it.
    public func delete(_ hash: String) {
        parts.storing.delete(hash)
    }

    /// Has packages that could not be run tried again when a proxy next asks, also on units that ended the program: a
    /// person wants it.
    public func tryAgain() {
        parts.computing.forgetFailures()
    }
}

extension Bytes32 {
    /// From the system's secure source.
    fileprivate static var random: Bytes32 {
        var generator = SystemRandomNumberGenerator()
        let bytes = (0..<Bytes32.count).map { _ in UInt8.random(in: 0...255, using: &generator) }
        guard let random = Bytes32(bytes) else { preconditionFailure("32 bytes are 32 bytes") }
        return random
    }
}
