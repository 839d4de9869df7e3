// A node's requests over real sockets: order, what fails and what is dropped, what is loaded again and what is not.

import MPGPTWire
import Testing

@testable import MPGPTNode

// Of the same suite, since its tests measure time and must not run beside each other.
extension NodeServerTests {
    @Test func itGoesOnAfterARequestThatFails() throws {
        let rig = try Rig()
        let proxy = try rig.proxy()
        try proxy.serve()
        proxy.send(request(1, at: 0), request(2, at: 7), request(3, at: 2))
        guard case .result(let first) = try proxy.hear(), let second = try proxy.hearError(),
            case .result(let third) = try proxy.hear()
        else { throw ProxyTrouble(text: "another order") }
        #expect(first.request == 1 && second.request == 2 && second.code == .badPos && third.request == 3)
        rig.orders.change { $0.failure = "no luck" }
        proxy.send(request(4, at: 4))
        let failed = try proxy.hearError()
        #expect(failed?.code == .computeFailed && failed?.request == 4 && failed?.text.contains("no luck") == true)
        proxy.send(request(5, at: 4))
        guard case .result(let last) = try proxy.hear() else { throw ProxyTrouble(text: "no RESULT") }
        #expect(last.request == 5)
    }

    @Test func nothingComesAboutWhatAResetDropped() throws {
        let rig = try Rig()
        let proxy = try rig.proxy()
        try proxy.serve()
        rig.orders.change { $0.nap = 0.1 }
        let calls = rig.orders.change { $0.calls }
        proxy.send(
            request(1, at: 0), request(2, at: 30), request(3, at: 2), .reset(Message.Reset(epoch: 2)),
            request(4, at: 0, epoch: 2))
        guard case .result(let result) = try proxy.hear() else { throw ProxyTrouble(text: "no RESULT") }
        #expect(result.request == 4 && result.epoch == 2)
        #expect(rig.orders.change { $0.calls } - calls <= 2, "what was dropped need not be computed")
    }

    @Test func aRequestTooManyIsRefused() throws {
        let rig = try Rig()
        let proxy = try rig.proxy()
        let queue = try proxy.serve()["queue"]?.integer ?? 0
        rig.orders.change { $0.nap = 0.2 }
        for number in 0...UInt32(queue) {
            proxy.send(request(number + 1, at: 2 * number))
        }
        var message = try proxy.hear()
        while case .result = message { message = try proxy.hear() }
        guard case .error(let error) = message else { throw ProxyTrouble(text: "no ERROR") }
        #expect(error.code == .busy)
    }

    @Test func aPredictorThatHasDiedIsMadeAnew() throws {
        let rig = try Rig()
        do {
            let proxy = try rig.proxy()
            try proxy.serve()
            rig.orders.change { $0.isDead = true }
            proxy.send(request(1, at: 0))
            #expect(try proxy.hearError()?.code == .computeFailed)
        }
        let proxy = try rig.proxy()
        try proxy.serve()
        proxy.send(request(1, at: 0))
        guard case .result = try proxy.hear() else { throw ProxyTrouble(text: "no RESULT") }
        #expect(rig.orders.change { $0.opened } == 2)
    }

    @Test func aResetThatFailsEndsTheConnection() throws {
        let rig = try Rig()
        let proxy = try rig.proxy()
        try proxy.serve()
        rig.orders.change { $0.isDead = true }
        proxy.send(.reset(Message.Reset(epoch: 2)))
        #expect(try proxy.hearError()?.code == .computeFailed)
        #expect(try proxy.hear() == nil)
    }

    @Test func aPersonMayHaveItLoadedAnew() throws {
        let rig = try Rig()
        for (index, opened) in [1, 1, 2, 2].enumerated() {
            if index == 2 { rig.server.tryAgain() }
            let proxy = try rig.proxy()
            try proxy.serve()
            #expect(rig.orders.change { $0.opened } == opened)
        }
    }

    @Test func aLoadThatFailedIsNotTriedAgain() throws {
        let rig = try Rig()
        rig.orders.change { $0.refusal = "the Neural Engine does not like it" }
        var said: [String] = []
        for _ in 0..<3 {
            let proxy = try rig.proxy()
            try proxy.store()
            proxy.send(.load(Message.Load(bundle: rig.bundle.offer.bundle)))
            let error = try proxy.hearError()
            #expect(error?.code == .loadFailed)
            said.append(error?.text ?? "")
        }
        #expect(rig.orders.change { $0.opened } == 1)
        #expect(said[0] == "the Neural Engine does not like it")
        #expect(said[1] == "\(said[0]) (it is not tried again until the node is started anew, or told to)" && said[2] == said[1])
        rig.orders.change { $0.refusal = nil }
        rig.server.tryAgain()
        try rig.proxy().serve()
    }
}
