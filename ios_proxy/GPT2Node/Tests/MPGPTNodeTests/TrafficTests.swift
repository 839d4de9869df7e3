// Figures of what is computed: counted, averaged over a period, told once.

import Foundation
import MPGPTWire
import Testing

@testable import MPGPTNode

@Suite struct TrafficTests {
    @Test func aPeriodIsAveraged() {
        let meter = TrafficMeter()
        #expect(meter.sample(now: 100, period: 1) == nil)
        meter.count(tokens: 5, computing: 300_000_000, waiting: 0)
        meter.count(tokens: 1, computing: 100_000_000, waiting: 50_000_000)
        #expect(meter.sample(now: 100.9, period: 1) == nil, "it is not over")
        var traffic = Traffic()
        (traffic.requests, traffic.tokens, traffic.tokensPerSecond) = (2, 6, 3)
        (traffic.computingMilliseconds, traffic.waitingMilliseconds, traffic.busy) = (200, 25, 0.2)
        #expect(meter.sample(now: 102, period: 1) == traffic)
        #expect(
            Report.traffic(traffic).line
                == "3.0 tokens/s; 200.0 ms a request and 25.0 ms of waiting; 2 requests so far")

        var idle = Traffic()
        (idle.requests, idle.tokens) = (2, 6)
        #expect(meter.sample(now: 103, period: 1) == idle, "zeros, once")
        #expect(meter.sample(now: 104, period: 1) == nil)
        meter.count(tokens: 0, computing: 9_000_000_000, waiting: 0)
        let late = meter.sample(now: 105, period: 1)
        #expect(late?.requests == 3 && late?.tokens == 6 && late?.busy == 1)
        #expect(late?.tokensPerSecond == 0)
        meter.clear()
        #expect(meter.sample(now: 106, period: 1) == nil)
        meter.count(tokens: 1, computing: 0, waiting: 0)
        #expect(meter.sample(now: 107, period: 1)?.requests == 1, "another package begins at 0")
    }

    @Test func aNodeTellsThem() throws {
        var patience = Patience()
        patience.figures = 0.2
        let rig = try Rig(patience)
        let proxy = try rig.proxy()
        try proxy.serve()
        rig.orders.change { $0.nap = 0.02 }
        proxy.send(request(1, at: 0), request(2, at: 2), request(3, at: 9))
        for _ in 0..<3 { _ = try proxy.hear() }
        let deadline = Patience.now + 5
        var figures: [Traffic] = []
        while figures.last?.tokensPerSecond != 0, Patience.now < deadline {
            Thread.sleep(forTimeInterval: 0.02)
            figures = rig.reports.compactMap { if case .traffic(let traffic) = $0 { traffic } else { nil } }
        }
        #expect(figures.last?.requests == 3 && figures.last?.tokens == 4, "one of them failed")
        #expect(figures.first.map { $0.tokensPerSecond > 0 && $0.computingMilliseconds > 5 } == true)
        #expect(figures.contains { $0.waitingMilliseconds > 5 }, "the second waited for the first")
        #expect(rig.reports.allSatisfy { if case .traffic = $0 { $0.isFigures } else { true } })
    }
}
