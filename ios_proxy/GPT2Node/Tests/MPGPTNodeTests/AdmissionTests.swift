// The rule of the one proxy, by the clock; and small things of the machine that a node runs on.

import Testing

@testable import MPGPTNode

struct AdmissionTests {
    private func admission() -> Admission {
        Admission(patience: Patience())
    }

    @Test func theFirstIsServed() {
        var admission = admission()
        #expect(admission.decide(now: 0, lastHeard: 0) == nil)
        admission.arrive(1, now: 0)
        #expect(admission.decide(now: 0, lastHeard: 0) == .admit(1))
        #expect(admission.decide(now: 0, lastHeard: 0) == nil && admission.served == 1)
    }

    @Test func aNewcomerWaitsForItToLeave() {
        var admission = admission()
        admission.arrive(1, now: 0)
        _ = admission.decide(now: 0, lastHeard: 0)
        admission.arrive(2, now: 10)
        #expect(admission.decide(now: 14.9, lastHeard: 0) == nil)
        admission.remove(1)
        #expect(admission.decide(now: 14.9, lastHeard: 0) == .admit(2))
    }

    @Test func aNewcomerIsSentAwayFromOneThatIsThere() {
        var admission = admission()
        admission.arrive(1, now: 0)
        _ = admission.decide(now: 0, lastHeard: 0)
        admission.arrive(2, now: 10)
        admission.arrive(3, now: 10)
        #expect(admission.decide(now: 15.1, lastHeard: 12.2) == .sendAway(2))
        #expect(admission.decide(now: 15.1, lastHeard: 12.2) == .sendAway(3))
        #expect(admission.decide(now: 15.1, lastHeard: 12.2) == nil && admission.served == 1)
    }

    @Test func oneThatHasFallenSilentMakesRoomOnce() {
        var admission = admission()
        admission.arrive(1, now: 0)
        _ = admission.decide(now: 0, lastHeard: 0)
        admission.arrive(2, now: 10)
        #expect(admission.decide(now: 15.1, lastHeard: 12) == .displace(1))
        admission.leave(1)
        #expect(admission.decide(now: 16, lastHeard: 16) == nil, "it is not sent away while the first one leaves")
        admission.remove(1)
        #expect(admission.decide(now: 16, lastHeard: 0) == .admit(2))
    }

    @Test func oneThatWaitedAndWentIsForgotten() {
        var admission = admission()
        admission.arrive(1, now: 0)
        admission.remove(1)
        #expect(admission.decide(now: 1, lastHeard: 0) == nil && admission.served == nil)
    }

    @Test func freeMemoryIsWhatLinuxSays() {
        #expect(availableMemory(in: "MemTotal: 24 kB\nMemFree: 1 kB\nMemAvailable:   20 kB\n") == 20 << 10)
        #expect(availableMemory(in: "") == nil)
        #if os(Linux)
            #expect((Health.now.free ?? 0) > 1 << 20 && Health.now.facts["thermal"] == "unknown")
        #endif
    }

    @Test func aTicketEndsWithItsEpoch() {
        let epochs = Epochs()
        let ticket = epochs.ticket
        #expect(ticket.isGood)
        epochs.advance()
        #expect(!ticket.isGood && epochs.ticket.isGood)
    }
}
