// What a person is told, situation by situation, and what holds of every sentence.

import Foundation
import MPGPTWire
import Synchronization
import Testing

@testable import MPGPTNode

/// A state after some reports, a second apart, the last of them at `now`.
private func state(_ reports: [Report], change: (inout NodeState) -> Void = { _ in }) -> NodeState {
    var state = NodeState()
    (state.fingerprint, state.addresses, state.listening) = ("1a2b 3c4d", ["192.168.1.20"], .on(port: 8000))
    for (second, report) in reports.enumerated() {
        state.take(report, at: now + Double(second + 1 - reports.count))
    }
    change(&state)
    return state
}

private let now = 1000.0
private let proxy = "192.168.1.9:50123"
private let other = "192.168.1.77:50999"
private let arrived = Report.arrived(proxy: proxy)
private let loading = Report.loading(model: "gpt2", layers: 4..<8)
private let placement = Placement([.prefill: .init(neuralEngine: 200), .decode: .init(neuralEngine: 212, cpu: 28)])
private let loaded = Report.loaded(unit: "Neural Engine", seconds: 130, difference: 0.00123, placement: placement)
private let onGPU = Report.loaded(unit: "GPU", seconds: 3, difference: 0.001, placement: nil)
private let unfit = Report.unfit(unit: "Neural Engine", why: "the package fails its self-test: off by 3.0")
private let fatal = Report.leftOut(unit: "Neural Engine", why: "the program ended while this package was tried there")
private let format = StoreError("the manifest: format is 2", kind: .anotherFormat)

/// A situation, and what its headline says.
private struct Situation: Sendable, CustomTestStringConvertible {
    let testDescription: String
    let state: NodeState
    let severity: Notice.Severity
    let title: String
    let words: [String]

    init(
        _ name: String, _ reports: [Report], _ severity: Notice.Severity, _ title: String, _ words: String...,
        change: (inout NodeState) -> Void = { _ in }
    ) {
        (testDescription, state) = (name, MPGPTNodeTests.state(reports, change: change))
        (self.severity, self.title, self.words) = (severity, title, words)
    }

    static let headlines = [
        Situation("no token", [], .warning, "No token yet", "mpgpt ipad-token --qr") { $0.fingerprint = nil },
        Situation("waiting", [], .calm, "Waiting for the ring", "192.168.1.20:8000"),
        Situation("a second address", [], .calm, "Waiting for the ring", "192.168.1.20:8000 (or") {
            $0.addresses.append("169.254.3.4")
        },
        Situation("OS 17", [arrived, loading], .failure, "This system is too old", "version 17", "Update") {
            $0.system = 17
        },
        Situation("port taken", [], .failure, "Port 8000 cannot be used", "Address already in use.", "Close") {
            $0.listening = .failed(port: 8000, why: "Address already in use")
        },
        Situation("no place", [], .failure, "Packages cannot be kept", "The disk is full.", "Make room") {
            $0.listening = .noStore(why: "The disk is full")
        },
        Situation("no Wi-Fi", [], .failure, "No network", "Wi-Fi") { $0.addresses = [] },
        Situation("in the background", [arrived], .calm, "Not listening") { $0.stop() },
        Situation(
            "another token", [.anotherToken(proxy: other)], .failure, "Another token", other, "1a2b 3c4d", "--qr"),
        Situation("another version", [.anotherVersion(proxy: other)], .failure, "Another version", other, "Update"),
        Situation("a proxy", [arrived], .busy, "The ring is here", proxy),
        Situation(
            "a package on its way",
            [arrived, .receiving(bytes: 0, of: 57_000_000), .received(bytes: 24_510_000, of: 57_000_000)],
            .busy, "Receiving a package", "43% of 57 MB"),
        Situation("loading", [arrived, loading], .busy, "Loading", "Layers 4-7 of gpt2", "minutes"),
        Situation(
            "loading on the second unit", [arrived, loading, unfit], .busy, "Loading", "Neural Engine could not be used"
        ),
        Situation(
            "no unit runs it",
            [arrived, loading, unfit, .loadFailed(why: "Neural Engine: off by 3.0; CPU: off by 3.0")],
            .failure, "This package cannot be run", "Layers 4-7 of gpt2", "off by 3.0", "try again in Packages"),
        Situation(
            "and the proxy redials", [loading, .loadFailed(why: "off"), .gone(proxy: proxy, why: "x"), arrived],
            .failure, "This package cannot be run"),
        Situation(
            "no room",
            [
                arrived, .refused(StoreError("there is no room for 57 MB", kind: .noSpace)),
                .gone(proxy: proxy, why: "x"),
            ],
            .failure, "No room", "there is no room for 57 MB", "Delete"),
        Situation(
            "no package", [arrived, .refused(StoreError("its hash does not fit")), .gone(proxy: proxy, why: "x")],
            .failure, "A package was refused", "its hash does not fit", "Convert"),
        Situation(
            "a manifest of another format", [arrived, .refused(format), .gone(proxy: proxy, why: "x")], .failure,
            "A package of another format", "Update both"),
        Situation("serving", [arrived, loading, loaded], .good, "Serving", "Layers 4-7 of gpt2", proxy),
        Situation(
            "back again", [arrived, loading, loaded, .gone(proxy: proxy, why: "x"), arrived], .good, "Serving", proxy),
        Situation(
            "gone", [arrived, loading, loaded, .gone(proxy: proxy, why: "the proxy said good-bye")], .calm,
            "Waiting for the ring"),
        Situation(
            "silent", [arrived, loading, loaded, .silent(proxy: proxy, seconds: 30)], .warning,
            "The ring has fallen silent", proxy, "30 s", "network"),
        Situation("and back", [.silent(proxy: other, seconds: 30), loading, loaded, arrived], .good, "Serving", proxy),
        Situation(
            "half a package", [arrived, .receiving(bytes: 0, of: 100), .gone(proxy: proxy, why: "x")], .calm,
            "Waiting for the ring"),
        Situation("tried again", [loading, .loadFailed(why: "off")], .calm, "Waiting for the ring") {
            $0.forgetFailures()
        },
    ]

    /// What is told besides.
    static let notices = [
        Situation("hot", [], .warning, "The iPad is hot", "slows") { $0.health.thermal = "serious" },
        Situation("too hot", [], .failure, "The iPad is too hot", "Pause") { $0.health.thermal = "critical" },
        Situation("low power", [], .warning, "Low Power Mode", "Settings") { $0.isLowPower = true },
        Situation("battery", [], .warning, "The battery runs low", "14%", "Plug") {
            ($0.health.battery, $0.health.isCharging) = (0.14, false)
        },
        Situation(
            "two rings",
            [arrived, loading, loaded, .sentAway(proxy: other, served: proxy), .gone(proxy: other, why: "BUSY")], .warning,
            "Two rings want this iPad", other, "another token"),
        Situation(
            "the self-test failed on the Neural Engine", [arrived, loading, unfit, onGPU], .warning,
            "Not on Neural Engine", "Now GPU computes", "fails its self-test"),
        Situation(
            "the app was killed", [arrived, loading, fatal, onGPU], .warning, "Neural Engine is left out",
            "now GPU computes", "the program ended", "try again"),
        Situation(
            "another token besides", [arrived, loading, loaded, .anotherToken(proxy: other)], .failure, "Another token",
            other),
    ]
}

struct PresentationTests {
    @Test(arguments: Situation.headlines) fileprivate func headlines(_ situation: Situation) {
        let shown = Presentation(situation.state, now: now)
        #expect(shown.headline.title == situation.title && shown.headline.severity == situation.severity)
        for words in situation.words {
            #expect(shown.headline.spoken.contains(words), "\(shown.headline.spoken)")
        }
        #expect(shown.notices == [])
    }

    @Test(arguments: Situation.notices) fileprivate func notices(_ situation: Situation) throws {
        let shown = Presentation(situation.state, now: now)
        #expect([.calm, .good].contains(shown.headline.severity))
        let notice = try #require(shown.notices.first)
        #expect(shown.notices.count == 1 && notice.title == situation.title && notice.severity == situation.severity)
        for words in situation.words {
            #expect(notice.spoken.contains(words), "\(notice.spoken)")
        }
    }

    /// Whatever is wrong is a sentence, and says what to do.
    @Test(arguments: Situation.headlines + Situation.notices) fileprivate func sentences(_ situation: Situation) {
        let shown = Presentation(situation.state, now: now)
        for notice in [shown.headline] + shown.notices {
            #expect(notice.detail.hasSuffix(".") && !notice.title.hasSuffix("."))
            #expect(notice.advice.hasSuffix(".") || (notice.advice.isEmpty && notice.severity == .busy))
            #expect(!notice.spoken.contains("..") && !notice.spoken.contains("  "), "\(notice.spoken)")
            #expect(!notice.symbol.isEmpty && notice.progress.map { (0...1).contains($0) } != false)
        }
    }

    @Test func whatMendsItselfIsForgotten() {
        for report in [Report.anotherToken(proxy: other), .anotherVersion(proxy: other)] {
            let state = state([report])
            #expect(Presentation(state, now: now + 80).headline.severity == .failure)
            #expect(Presentation(state, now: now + 100).headline.title == "Waiting for the ring")
        }
        let rings = state([
            arrived, loading, loaded, .sentAway(proxy: other, served: proxy), .gone(proxy: other, why: "BUSY"),
        ])
        #expect(rings.proxy == proxy && Presentation(rings, now: 0).headline.title == "Serving")
        #expect(Presentation(rings, now: now + 100).notices == [])
        let silent = state([arrived, .silent(proxy: proxy, seconds: 30)])
        #expect(Presentation(silent, now: now + 100).headline.title == "The ring has fallen silent")
    }

    @Test func figuresAreThoseOfWhatServes() {
        var traffic = Traffic()
        (traffic.tokensPerSecond, traffic.computingMilliseconds, traffic.waitingMilliseconds) = (12.345, 4.2, 0.333)
        traffic.busy = 0.517
        let serving = state([arrived, loading, loaded, .traffic(traffic)]) {
            ($0.health.free, $0.health.battery, $0.health.isCharging) = (3_210_000_000, 0.8, true)
        }
        let shown = Presentation(serving, now: now)
        #expect(shown.figures.map(\.label).count == Set(shown.figures.map(\.label)).count)
        let figures = Dictionary(uniqueKeysWithValues: shown.figures.map { ($0.label, $0.value) })
        #expect(figures["Package"] == "Layers 4-7 of gpt2" && figures["Proxy"] == proxy)
        #expect(figures["Speed"] == "12.3 tokens/s" && figures["Computing"] == "4.20 ms a request")
        #expect(figures["Waiting"] == "0.33 ms a request" && figures["Busy"] == "52%")
        #expect(figures["Unit"] == "Neural Engine 412 of 440 steps, CPU 28")
        #expect(figures["Self-test"] == "off by 0.0012" && figures["Loaded in"] == "2 min")
        #expect(figures["Free memory"] == "3.2 GB" && figures["Battery"] == "80%, charging")
        #expect(figures["Token"] == "1a2b 3c4d" && shown.address == "192.168.1.20:8000")
        #expect(Presentation(state([arrived]), now: now).figures.map(\.label) == ["Proxy", "Token"])
        #expect(Presentation(state([]) { $0.listening = .off }, now: now).address == nil)
    }

    @Test func numbers() {
        #expect(Figures.bytes(999) == "1 KB" && Figures.bytes(1_500_000) == "2 MB")
        #expect(Figures.bytes(999_499_999) == "999 MB" && Figures.bytes(999_500_000) == "1.0 GB")
        #expect(Figures.percent(99, of: 100) == 99 && Figures.percent(9_999_999, of: 10_000_000) == 99)
        #expect(Figures.percent(7, of: 7) == 100 && Figures.percent(0, of: 0) == 100 && Figures.percent(0, of: 9) == 0)
        #expect(Figures.short(0) == "0.00" && Figures.short(9.96) == "10.0" && Figures.short(99.6) == "100")
        #expect(Figures.decimals(-0.04, 1) == "0.0" && Figures.decimals(-1.26, 1) == "-1.3")
        #expect(Figures.decimals(.nan, 1) == "?" && Figures.decimals(.infinity, 0) == "?")
        #expect(Figures.decimals(0.0004, 4) == "0.0004" && Figures.decimals(1.99995, 4) == "2.0000")
        #expect(Figures.duration(2) == "2.0 s" && Figures.duration(89) == "89 s" && Figures.duration(90) == "2 min")
        #expect(Figures.layers(4..<5) == "Layer 4" && Figures.layers(0..<10) == "Layers 0-9")
    }
}

/// What another queue has found.
private final class Found: Sendable {
    let packages = Mutex<[KeptPackage]>([])
}

struct PageTests {
    @Test func packagesAreListedWithWhatCameOfThem() throws {
        let rig = try Rig()
        let proxy = try rig.proxy()
        try proxy.serve()
        let page = try #require(packages(of: rig).first)
        #expect(page.hash == rig.bundle.offer.bundle.description && page.bytes == UInt64(rig.bundle.bytes.count))
        #expect(page.title == "Layers 1-2 of small" && page.shortHash.count == 12)
        var state = NodeState()
        #expect(page.outcome(in: state) == "Not loaded since the app was started.")
        rig.reports.forEach { state.take($0, at: 0) }
        #expect(page.outcome(in: state) == "a copier; the self-test is off by 0.0000")
        state.take(.loading(model: "small", layers: 1..<3), at: 1)
        state.take(.loadFailed(why: "no"), at: 2)
        #expect(page.outcome(in: state) == "It cannot be run: no.")
        rig.server.delete(page.hash)
        #expect(packages(of: rig).isEmpty)
    }

    private func packages(of rig: Rig) -> [KeptPackage] {
        let (over, found) = (DispatchSemaphore(value: 0), Found())
        rig.server.packages { packages in
            found.packages.withLock { $0 = packages }
            over.signal()
        }
        over.wait()
        return found.packages.withLock { $0 }
    }

    @Test func theLogKeepsTheLastLines() {
        var log = EventLog(heading: "GPT2Node 1 on iPadOS 18")
        for number in 1...EventLog.kept + 7 {
            log.append("line \(number)", at: Date(timeIntervalSince1970: 0))
        }
        #expect(log.lines.count == EventLog.kept && log.lines.first?.text == "1970-01-01T00:00:00Z line 8")
        #expect(Set(log.lines.map(\.id)).count == EventLog.kept)
        #expect(log.text.hasPrefix("GPT2Node 1 on iPadOS 18\n1970") && log.text.hasSuffix("line 507\n"))
    }

    @Test func theLogIsOnTheDiskAndDoesNotGrowForEver() throws {
        let folder = try TemporaryFolder()
        for _ in 0..<3 { LogFile(folder: folder.path).append(String(repeating: "x", count: 1 << 20)) }
        #expect(folder.names == ["log.1.txt", "log.txt"])
        LogFile(folder: folder.path).append("last")
        #expect(try String(contentsOfFile: "\(folder.path)/log.txt", encoding: .utf8) == "last\n")
        LogFile(folder: "/dev/null/no").append("nowhere")
    }

    @Test func addressesOfUse() {
        let found = [
            ("lo", "169.254.1.1"), ("pdp_ip0", "10.0.0.1"), ("en0", "192.168.1.20"), ("utun3", "10.8.0.2"),
            ("en2", "10.10.0.5"),
        ]
        #expect(Addresses.sorted(found) == ["192.168.1.20", "10.10.0.5", "169.254.1.1"])
        #expect(!Addresses.here.contains { $0.hasPrefix("127.") })
    }
}
