// The listener: it takes connections in, lets few strangers wait, and serves one proxy.
//
// Knows: who is connected, who is served (`Admission.swift` has the rule).
// Must not know: what is said on a connection (`Visit.swift`), what a node computes.
//
// All of it happens on the net queue.

import Dispatch
import MPGPTWire

final class Listener: @unchecked Sendable {  // all of it is touched on the net queue alone
    /// New connections are left waiting this long when the program has too many files open to take one.
    private static let rest = 1.0

    private let socket: Socket
    private let parts: Parts
    private let makeSession: @Sendable () -> NodeSession
    private let accepting: any DispatchSourceRead
    private let ticking: any DispatchSourceTimer
    private var visits: [Int: Visit] = [:]
    private var last = 0
    private var admission: Admission
    private var isClosed = false
    private var isPortFree = false
    private var onEmpty: (@Sendable () -> Void)?

    /// Takes over a socket that listens, and begins to accept.
    init(_ socket: Socket, parts: Parts, session: @escaping @Sendable () -> NodeSession) {
        (self.socket, self.parts, makeSession) = (socket, parts, session)
        admission = Admission(patience: parts.patience)
        accepting = DispatchSource.makeReadSource(fileDescriptor: socket.descriptor, queue: parts.net)
        ticking = DispatchSource.makeTimerSource(queue: parts.net)
        accepting.setEventHandler { [weak self] in self?.accept() }
        accepting.setCancelHandler { [weak self] in
            socket.close()
            self?.isPortFree = true
            self?.endIfEmpty()
        }
        ticking.schedule(deadline: .now() + parts.patience.tick, repeating: parts.patience.tick)
        ticking.setEventHandler { [weak self] in self?.tick() }
        accepting.resume()
        ticking.resume()
    }

    /// Accepts nobody any more, and says good-bye to all; `then` is called when nobody is left, and the port is free.
    func close(then done: @escaping @Sendable () -> Void) {
        guard !isClosed else { return done() }
        isClosed = true
        accepting.cancel()
        onEmpty = done
        visits.values.forEach { $0.sayGoodBye() }
        endIfEmpty()
    }

    private func endIfEmpty() {
        guard isPortFree, visits.isEmpty, let done = onEmpty else { return }
        onEmpty = nil
        ticking.cancel()
        done()
    }

    // MARK: - Connections

    private func accept() {
        do {
            while !isClosed, let (connected, name) = try socket.accept() {
                take(connected, name)
            }
        } catch {
            accepting.suspend()
            parts.net.asyncAfter(deadline: .now() + Listener.rest) { self.accepting.resume() }
        }
    }

    private func take(_ connected: Socket, _ name: String) {
        let strangers = visits.values.count { !$0.isAuthenticated }
        guard strangers < parts.patience.strangers else { return connected.close() }
        last += 1
        let visit = Visit(last, name: name, socket: connected, session: makeSession(), parts: parts, host: self)
        visits[last] = visit
        visit.start()
    }

    private func tick() {
        let now = Patience.now
        visits.values.forEach { $0.tick(now) }
        decide()
        if let traffic = parts.computing.meter.sample(now: now, period: parts.patience.figures) {
            parts.report(.traffic(traffic))
        }
    }

    // MARK: - One proxy

    private func decide() {
        while let decision = admission.decide(now: Patience.now, lastHeard: served?.lastHeard ?? 0) {
            switch decision {
            case .admit(let number):
                guard let visit = visits[number] else { continue }
                parts.report(.arrived(proxy: visit.name))
                visit.admit()
            case .sendAway(let number):
                guard let visit = visits[number] else { continue }
                parts.report(.sentAway(proxy: visit.name, served: served?.name ?? ""))
                visit.refuse(.busy, "another proxy is served")
            case .displace(let number):
                visits[number]?.refuse(.busy, "another proxy took over")
            }
        }
    }

    private var served: Visit? {
        admission.served.flatMap { visits[$0] }
    }
}

extension Listener: VisitHost {
    func visitHasProved(_ visit: Visit) {
        admission.arrive(visit.number, now: Patience.now)
        decide()
    }

    func visitIsLeaving(_ visit: Visit) {
        admission.leave(visit.number)
    }

    func visitHasEnded(_ visit: Visit) {
        visits[visit.number] = nil
        admission.remove(visit.number)
        decide()
        endIfEmpty()
    }
}
