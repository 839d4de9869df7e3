// The ladder: which unit a package ends up on, what markers a trial leaves, what is said.

import Foundation
import MPGPTWire
import Synchronization
import Testing

@testable import MPGPTNode

/// A bundle on the disk, a folder for markers, and what the units were asked for.
private final class Climb {
    /// What happens on the units, in order.
    final class Log: Sendable {
        private let lines = Mutex<[String]>([])
        var all: [String] { lines.withLock { $0 } }
        func add(_ line: String) { lines.withLock { $0.append(line) } }
    }

    let folder: TemporaryFolder
    let bundle: MPGPTNode.Bundle
    let log = Log()

    init() throws {
        folder = try TemporaryFolder()
        bundle = try Climb.bundle(SmallBundle(), in: folder, "bundle")
    }

    static func bundle(_ small: SmallBundle, in folder: TemporaryFolder, _ name: String) throws -> MPGPTNode.Bundle {
        for file in small.files { try folder.write(file.bytes, to: "\(name)/\(file.name)") }
        return try MPGPTNode.Bundle(folder: "\(folder.path)/\(name)")
    }

    var markers: [String] { folder.names.filter { $0.hasSuffix(".trying") } }

    /// A unit that copies, or fails with some words; it looks for its marker while it is opened.
    func unit(_ name: String, failure: String? = nil, byToken: Bool = false, mayEndProgram: Bool = true) -> ComputeUnit
    {
        ComputeUnit(name: name, promptsByToken: byToken, mayEndProgram: mayEndProgram) { [log, path = folder.path] _ in
            let marked = Disk.names(in: path).count { $0.hasSuffix(".trying") }
            log.add("\(name), \(marked) marked")
            if let failure { throw ComputeError.failed(failure) }
            return Logging(log)
        }
    }

    func ladder(_ units: ComputeUnit..., system: String = "18.3 (22D60)") -> Ladder {
        Ladder(units: units, folder: folder.path, system: system)
    }

    /// Leaves the marker that a trial leaves when it ends the program.
    func leave(_ unit: String, _ hash: [UInt8]? = nil, system: String = "18.3 (22D60)") throws {
        try Markers(folder: folder.path, system: system).begin(unit, hash ?? bundle.hash)
    }
}

/// y is x.
private final class Logging: Predictor {
    let unit = "a copier"
    let placement: Placement? = Placement([
        .prefill: .init(neuralEngine: 200, cpu: 20), .decode: .init(neuralEngine: 212, gpu: 3, cpu: 5),
    ])
    private let log: Climb.Log

    init(_ log: Climb.Log) { self.log = log }

    func predict(_ function: Function, _ inputs: Inputs) throws -> Tensor {
        log.add(function.rawValue)
        return try #require(inputs["x"])
    }

    func reset() {}
}

@Suite struct LadderTests {
    private let climb: Climb

    init() throws { climb = try Climb() }

    /// The reports of a load, as lines.
    private func load(_ ladder: Ladder, _ bundle: MPGPTNode.Bundle? = nil) throws -> (LoadedPackage, [String]) {
        var lines: [String] = []
        let loaded = try ladder.load(bundle ?? climb.bundle) { lines.append($0.line) }
        return (loaded, lines)
    }

    // MARK: - Markers

    @Test func aMarkerLiesThereForAsLongAsAUnitIsTried() throws {
        let ladder = climb.ladder(climb.unit("one", failure: "no"), climb.unit("two"))
        let (_, lines) = try load(ladder)
        #expect(climb.log.all == ["one, 1 marked", "two, 1 marked", "prefill"], "it is gone after an error")
        #expect(climb.markers == [] && lines == ["not on one: no"], "and after a success")
    }

    @Test func aUnitThatCannotEndTheProgramIsNotMarked() throws {
        _ = try load(climb.ladder(climb.unit("a child", mayEndProgram: false)))
        #expect(climb.log.all.first == "a child, 0 marked")
        try climb.leave("a child")
        _ = try load(climb.ladder(climb.unit("a child", mayEndProgram: false)))
        #expect(climb.log.all.count == 4)
    }

    @Test func aUnitThatEndedTheProgramIsLeftOut() throws {
        try climb.leave("one")
        let ladder = climb.ladder(climb.unit("one"), climb.unit("two"))
        for _ in 0..<2 {
            let (_, lines) = try load(ladder)
            #expect(
                lines == [
                    "one is left out: the program ended while this package was tried there; it is tried again when you "
                        + "ask for it, or after an update of the system"
                ])
        }
        #expect(climb.log.all == ["two, 2 marked", "prefill", "two, 2 marked", "prefill"])
        ladder.forgetFailures()
        #expect(climb.markers == [])
        #expect(try load(ladder).1 == [] && climb.log.all.last == "prefill" && climb.log.all[4] == "one, 1 marked")
    }

    @Test func anotherSystemOrBundleOrUnitIsTried() throws {
        try climb.leave("one", system: "18.2 (22C152)")
        let other = try Climb.bundle(SmallBundle(weights: 999), in: climb.folder, "other")
        try climb.leave("one", other.hash)
        try climb.leave("One")
        #expect(try load(climb.ladder(climb.unit("one"))).1 == [])
        #expect(climb.log.all == ["one, 3 marked", "prefill"], "the other system's was replaced")
        #expect(throws: LoadError.self) { try load(climb.ladder(climb.unit("one")), other) }
        #expect(climb.markers.count == 2)
    }

    @Test func aMarkerThatWasCutIsNone() throws {
        try climb.leave("one")
        let name = try #require(climb.markers.first)
        try climb.folder.write([], to: name)
        _ = try load(climb.ladder(climb.unit("one")))
        #expect(climb.markers == [])
    }

    @Test func aMarkerThatCannotBeWritten() throws {
        let nowhere = Ladder(units: [climb.unit("one")], folder: "\(climb.folder.path)/nowhere", system: "")
        let error = try #require(throws: LoadError.self) { try load(nowhere) }
        #expect(error.text.contains("nowhere") && climb.log.all == [], "what cannot be marked is not tried")
    }

    @Test func whoIsAskedToStopBlamesNobody() throws {
        let ladder = Mutex<Ladder?>(nil)
        let (log, folder) = (climb.log, climb.folder.path)
        let unit = ComputeUnit(name: "one", mayEndProgram: true) { _ in
            let marked = { "\(Disk.names(in: folder).count { $0.hasSuffix(".trying") })" }
            log.add(marked())
            ladder.withLock { $0?.acquit() }
            log.add(marked())
            ladder.withLock { $0?.watch() }
            log.add(marked())
            ladder.withLock { $0?.acquit() }
            return Logging(log)
        }
        ladder.withLock { $0 = climb.ladder(unit) }
        _ = try load(try #require(ladder.withLock { $0 }))
        #expect(log.all == ["1", "0", "1", "prefill"] && climb.markers == [])
    }

    // MARK: - What is said

    @Test func noUnitWillDo() throws {
        try climb.leave("one")
        let ladder = climb.ladder(climb.unit("one"), climb.unit("two", failure: "too small"))
        let error = try #require(throws: LoadError.self) { try load(ladder) }
        #expect(error.text.hasPrefix("one: the program ended while") && error.text.hasSuffix("; two: too small"))
        let alone = try #require(throws: LoadError.self) { try load(climb.ladder(climb.unit("three", failure: "no"))) }
        #expect(alone.text == "no")
        #expect(throws: LoadError(text: "there is nothing here that could run it")) { try load(climb.ladder()) }
    }

    @Test func readySaysWhereThingsAre() throws {
        let facts = try load(climb.ladder(climb.unit("one"))).0.facts
        let prefill: JSONValue = ["ne": 200, "gpu": 0, "cpu": 20]
        #expect(facts["placement"] == ["prefill": prefill, "decode": ["ne": 212, "gpu": 3, "cpu": 5]])
        #expect(facts["unit"] == "a copier" && facts["layers"] == [1, 3])
        let placement = try #require(try load(climb.ladder(climb.unit("one"))).0.placement)
        #expect(placement.summary == "Neural Engine 412 of 440 steps, CPU 25, GPU 3")
        #expect(Placement([.decode: .init(cpu: 3)]).summary == "CPU 3 of 3 steps")
        #expect(Placement([:]).summary == "nothing is planned")
        let report = Report.loaded(unit: "x", seconds: 1, difference: 0.5, placement: placement)
        #expect(report.line.hasSuffix("off by 0.5; Neural Engine 412 of 440 steps, CPU 25, GPU 3"))
    }

    // MARK: - Prompts token by token

    @Test func aUnitThatTakesPromptsByTokenNeverRunsPrefill() throws {
        let (loaded, _) = try load(climb.ladder(climb.unit("one", byToken: true)))
        let x = halves(0..<width * 6)
        #expect(try loaded.executor.prefill(slot: 1, position: 0, x: x, tokens: 6) == x)
        #expect(climb.log.all.count == 1 + 2 + 6 && !climb.log.all.contains("prefill"), "in the self-test too")
        #expect(loaded.executor.filled == [0, 6, 0])
    }
}
