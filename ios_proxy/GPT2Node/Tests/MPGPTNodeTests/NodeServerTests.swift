// A node over real sockets: sessions from HELLO to BYE, what is wrong on the way, and what goes on meanwhile.

import Foundation
import MPGPTWire
import Testing

@testable import MPGPTNode

@Suite(.serialized) struct NodeServerTests {
    // MARK: - The course of a connection

    @Test func aPackageIsSentOnceAndRun() throws {
        let rig = try Rig()
        for wanted in [rig.bundle.bytes.count, 0] {
            let proxy = try rig.proxy()
            #expect(try proxy.store() == wanted)
            proxy.send(.load(Message.Load(bundle: rig.bundle.offer.bundle)))
            guard case .ready(let ready) = try proxy.hear() else { throw ProxyTrouble(text: "no READY") }
            #expect(ready.facts["unit"] == "a copier" && ready.facts["dtype"] == "float16")
            #expect(ready.facts["layers"] == [1, 3] && (ready.facts["queue"]?.integer ?? 0) >= 4)
            proxy.send(.reset(Message.Reset(epoch: 1)), request(1, at: 0), request(2, at: 2))
            for number in [UInt32(1), 2] {
                guard case .result(let result) = try proxy.hear() else { throw ProxyTrouble(text: "no RESULT") }
                guard case .prefill(let asked) = request(number, at: 0) else { return }
                #expect(result.request == number && result.y == asked.x)
            }
            proxy.send(.bye)
            #expect(try proxy.hear() == nil)
        }
        #expect(rig.orders.change { $0.opened } == 1, "what is loaded is not loaded again")
        let lines = rig.reports.map(\.line)
        #expect(lines.first == "listening on 127.0.0.1:\(rig.port)")
        #expect(lines.filter { $0.hasSuffix("has gone: the proxy said good-bye") }.count == 2)
    }

    @Test func aPackageThatCameHalfIsTakenUpAgain() throws {
        let rig = try Rig()
        let half = 500
        do {
            let proxy = try rig.proxy()
            _ = try proxy.prove()
            proxy.send(.offer(rig.bundle.offer))
            #expect(try proxy.hear() == .want(Message.Want(offset: 0)))
            proxy.send(.data(Message.Data(offset: 0, piece: Array(rig.bundle.bytes.prefix(half)))))
            proxy.send(.ping(Message.Ping(number: 1)))
            _ = try proxy.hear()
        }
        #expect(try rig.proxy().store() == rig.bundle.bytes.count - half)
    }

    @Test func whatIsNoBundleIsRefused() throws {
        let rig = try Rig()
        let proxy = try rig.proxy()
        _ = try proxy.prove()
        var offer = rig.bundle.offer
        offer.files.removeLast()
        proxy.send(.offer(offer))
        #expect(try proxy.hearError()?.code == .badBundle)
        #expect(try proxy.hear() == nil)
    }

    // MARK: - Strangers

    @Test func anotherTokenIsRefusedAndTold() throws {
        let rig = try Rig()
        let stranger = try rig.proxy()
        stranger.send(.hello(Message.Hello(nonce: stranger.nonce)))
        _ = try stranger.hear()
        stranger.send(.proof(Message.Proof(proof: stranger.nonce)))
        #expect(try stranger.hearError()?.code == .badToken)
        #expect(try stranger.hear() == nil)
        let other = try rig.proxy()
        other.send(.error(Message.Error(code: .badToken, text: "look here")))
        #expect(try other.hear() == nil)
        #expect(rig.reports.contains { if case .anotherToken = $0 { true } else { false } })
        try rig.proxy().serve()
    }

    @Test func strangersAreFewAndShort() throws {
        var patience = Patience()
        (patience.handshake, patience.strangers) = (0.4, 3)
        let rig = try Rig(patience)
        let strangers = try (0..<3).map { _ in try rig.proxy() }
        Thread.sleep(forTimeInterval: 0.1)
        #expect(try rig.proxy().hear() == nil, "one too many is closed at once")
        for stranger in strangers {
            #expect(try stranger.hear() == nil)
        }
        try rig.proxy().serve()
    }

    @Test func anErrorArrivesThoughMoreWasSent() throws {
        let rig = try Rig()
        let proxy = try rig.proxy()
        _ = try proxy.prove()
        proxy.send(bytes: [UInt8](repeating: 0xFF, count: 2 << 20))
        #expect(try proxy.hearError()?.code == .badFrame)
        #expect(try proxy.hear() == nil)
    }

    // MARK: - One proxy

    @Test func aProxyThatIsThereIsNotDisplaced() throws {
        var patience = Patience()
        (patience.newcomer, patience.life) = (0.3, 5)
        let rig = try Rig(patience)
        let first = try rig.proxy()
        try first.serve()
        let second = try rig.proxy()
        let answer = try second.prove()
        #expect(answer == .error(Message.Error(code: .busy, text: "another proxy is served")))
        #expect(try second.hear() == nil)
        first.send(request(1, at: 0))
        guard case .result = try first.hear() else { throw ProxyTrouble(text: "no RESULT") }
        first.close()
        try rig.proxy().serve()
    }

    @Test func oneThatHasFallenSilentIsDisplacedAndTold() throws {
        var patience = Patience()
        (patience.newcomer, patience.life) = (0.4, 0.2)
        let rig = try Rig(patience)
        let first = try rig.proxy()
        try first.serve()
        try rig.proxy().serve()
        #expect(try first.hear() == .error(Message.Error(code: .busy, text: "another proxy took over")))
        #expect(try first.hear() == nil)
    }

    @Test func silenceEndsAConnection() throws {
        var patience = Patience()
        patience.silence = 0.5
        let rig = try Rig(patience)
        let proxy = try rig.proxy()
        try proxy.serve()
        for number in 0..<4 {
            Thread.sleep(forTimeInterval: 0.2)
            proxy.send(.ping(Message.Ping(number: UInt64(number))))
            guard case .pong = try proxy.hear() else { throw ProxyTrouble(text: "no PONG") }
        }
        #expect(try proxy.hear() == nil)
        #expect(rig.reports.last?.line.hasSuffix("has gone: nothing was heard of it for 0.5 s") == true)
    }

    // MARK: - What goes on meanwhile

    /// Seconds until a PING's answer is there.
    private func ping(_ proxy: ByHand) throws -> Double {
        let begun = Patience.now
        proxy.send(.ping(Message.Ping(number: 7)))
        guard case .pong(let pong) = try proxy.hear() else { throw ProxyTrouble(text: "no PONG") }
        #expect(pong.number == 7 && pong.facts["thermal"] != nil)
        return Patience.now - begun
    }

    @Test func aPingIsAnsweredWhileItComputes() throws {
        let rig = try Rig()
        let proxy = try rig.proxy()
        try proxy.serve()
        rig.orders.change { $0.nap = 1 }
        proxy.send(request(1, at: 0))
        Thread.sleep(forTimeInterval: 0.1)
        #expect(try ping(proxy) < 0.5)
        guard case .result(let result) = try proxy.hear() else { throw ProxyTrouble(text: "no RESULT") }
        #expect(result.computeNanoseconds >= 900_000_000)
    }

    @Test func aPingIsAnsweredWhileTheStoreHashes() throws {
        let rig = try Rig()
        let proxy = try rig.proxy()
        _ = try proxy.prove()
        rig.server.parts.storing.queue.async { Thread.sleep(forTimeInterval: 1) }
        proxy.send(.offer(rig.bundle.offer))
        #expect(try ping(proxy) < 0.5)
        #expect(try proxy.hear() == .want(Message.Want(offset: 0)))
    }

    @Test func aPersonIsToldThatItLoads() throws {
        var patience = Patience()
        patience.loading = 0.1
        let rig = try Rig(patience)
        rig.orders.change { $0.nap = 0.5 }
        let proxy = try rig.proxy()
        try proxy.store()
        proxy.send(.load(Message.Load(bundle: rig.bundle.offer.bundle)))
        #expect(try ping(proxy) < 0.4)
        guard case .ready = try proxy.hear() else { throw ProxyTrouble(text: "no READY") }
        #expect(proxy.loadings >= 2)
    }

    // MARK: - Beginning and end

    @Test func aNodeThatEndsSaysGoodByeAndMayBeginAgain() throws {
        let rig = try Rig()
        let proxy = try rig.proxy()
        try proxy.serve()
        rig.stop()
        #expect(try proxy.hear() == .bye)
        #expect(try proxy.hear() == nil)
        withExtendedLifetime(try Rig { $0.port = rig.port }) {}  // it is free at once
        let port = try rig.server.listen()
        rig.server.start()
        let again = try ByHand(port: port, bundle: rig.bundle)
        try again.serve()
        #expect(rig.orders.change { $0.opened } == 1, "what was loaded has stayed")
    }

    @Test func aPortThatIsTakenIsSaid() throws {
        let rig = try Rig()
        #expect(throws: SocketError.self) {
            _ = try Rig { $0.port = rig.port }
        }
    }
}
