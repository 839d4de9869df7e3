// A node that a compute unit takes down with it, as a program of its own: what the next start does.

import Foundation
import MPGPTWire
import Testing

@testable import MPGPTNode

/// `mpgpt-doomed-node`, from its start to its end.
private final class Doomed {
    private static let program: URL = {
        var root = URL(filePath: #filePath)
        for _ in 0..<3 { root.deleteLastPathComponent() }
        return root.appending(path: ".build/debug/mpgpt-doomed-node")
    }()

    private let process = Process()
    private let output = Pipe()

    init(_ arguments: String...) throws {
        process.executableURL = Doomed.program
        process.arguments = arguments
        process.standardOutput = output
        try process.run()
    }

    deinit { process.terminate() }

    /// The lines until it listens, or ends.
    func lines() throws -> [String] {
        var text = ""
        while !(text.contains("listening on") && text.hasSuffix("\n")),
            let more = try output.fileHandleForReading.read(upToCount: 1), !more.isEmpty
        {
            text += String(decoding: more, as: UTF8.self)
        }
        return text.split(separator: "\n").map(String.init)
    }

    /// Whether a signal has ended it.
    func wasKilled() -> Bool {
        process.waitUntilExit()
        return process.terminationReason == .uncaughtSignal
    }
}

@Suite struct DoomedNodeTests {
    @Test func theNextStartLeavesTheUnitOutAndServes() throws {
        let folder = try TemporaryFolder()
        let small = SmallBundle()
        for file in small.files { try folder.write(file.bytes, to: "package/\(file.name)") }
        let (store, package) = ("\(folder.path)/store", "\(folder.path)/package")

        let first = try Doomed(store, package, "18.3")
        #expect(try first.lines() == [] && first.wasKilled())
        let names = Disk.names(in: store)
        #expect(names.count == 1 && names[0].hasSuffix(".a-deadly-unit.trying"))

        let second = try Doomed(store, package, "18.3")
        let lines = try second.lines()
        #expect(lines.count == 2 && lines[0].hasPrefix("a deadly unit is left out: the program ended while"))
        let port = try #require(lines.last?.split(separator: ":").last.flatMap { Int($0) })
        let proxy = try ByHand(port: port, bundle: small)
        #expect(try proxy.serve()["unit"] == "a copier")
        proxy.send(request(1, at: 0))
        guard case .result(let result) = try proxy.hear() else { throw ProxyTrouble(text: "no RESULT") }
        #expect(result.request == 1)
        #expect(Disk.names(in: store) == names, "it stays until somebody asks")

        #expect(try Doomed(store, package, "18.4").wasKilled(), "another system may do better")
        #expect(try Doomed(store, package, "18.4", "again").wasKilled())
        #expect(try Doomed(store, package, "18.4").lines().count == 2)
    }
}
