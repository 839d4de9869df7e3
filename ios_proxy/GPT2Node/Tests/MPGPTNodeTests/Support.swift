// What the tests share: the golden file, a manifest, a package whose y is x, folders that vanish, dice.

import Dice
import Foundation
import MPGPTWire
import Testing

@testable import MPGPTNode

/// A section of `tests/golden/ipad_more.json`, which the Python side wrote.
func golden(_ section: String) throws -> JSONValue {
    try #require(goldenFile[section])
}

private let goldenFile: JSONObject = {
    var root = URL(filePath: #filePath)
    for _ in 0..<5 { root.deleteLastPathComponent() }
    do {
        return try JSONObject(parsing: Data(contentsOf: root.appending(path: "tests/golden/ipad_more.json")))
    } catch {
        fatalError("the golden file: \(error)")
    }
}()

extension JSONValue {
    subscript(key: String) -> JSONValue? { object?[key] }
    var integers: [Int]? { array?.compactMap(\.integer) }
    var hexBytes: [UInt8]? { string.flatMap([UInt8].init(hex:)) }
}

let manifestFields: JSONObject = [
    "format": 1, "model": "gpt2", "family": "gpt2", "model_hash": .string(String(repeating: "0a", count: 32)),
    "model_layers": 12, "layers": [4, 8], "embed": 4, "heads": 2, "kv_heads": 2, "head_dim": 4, "slots": 3,
    "context": 12, "chunk": 4, "weights": "float16", "rotary": .null, "tolerance": 0.05,
    "made_by": ["mpgpt": "1.0", "coremltools": "9.0", "torch": "2.9"],
]

func manifest(_ changes: JSONObject = [:]) throws -> Manifest {
    var fields = manifestFields
    for member in changes.members { fields[member.key] = member.value }
    return try Manifest(json: fields.encoded)
}

/// A package whose y is x, and that keeps what it is given.
final class Recording: Predictor {
    let unit = "nothing"
    var calls: [(function: Function, inputs: Inputs)] = []
    var resets = 0
    /// The number of the call that fails.
    var failure: Int?
    /// What becomes of x.
    var answer: (Tensor) -> Tensor = { $0 }

    func predict(_ function: Function, _ inputs: Inputs) throws -> Tensor {
        calls.append((function, inputs))
        if calls.count - 1 == failure { throw ComputeError.failed("no more") }
        return answer(try #require(inputs["x"]))
    }

    func reset() {
        resets += 1
    }
}

/// float16 bytes of whole numbers.
func halves(_ values: some Sequence<Int>) -> [UInt8] {
    Tensor(shape: [], float16: values.map { Half.bits(Float($0)) }).bytes
}

/// A folder that is removed with its last owner.
final class TemporaryFolder {
    let path: String

    init() throws {
        path = FileManager.default.temporaryDirectory.appending(path: "mpgpt-\(UUID().uuidString)").path()
        try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    }

    deinit { try? FileManager.default.removeItem(atPath: path) }

    var names: [String] { Disk.names(in: path).sorted() }

    func write(_ bytes: [UInt8], to name: String) throws {
        let url = URL(filePath: "\(path)/\(name)")
        try FileManager.default.createDirectory(at: url.deletingLastPathComponent(), withIntermediateDirectories: true)
        try Data(bytes).write(to: url)
    }
}

extension Dice {
    /// How many throws a test has: MPGPT_FUZZ in the environment, or 10000.
    static let throwCount = ProcessInfo.processInfo.environment["MPGPT_FUZZ"].flatMap { Int($0) } ?? 10_000

    /// A number that something might stumble over.
    mutating func edge() -> String {
        let edges = ["0", "1", "-1", "8", "65", "1048577", "\(Int.max)", "9223372036854775808", "1e308", "0.5", "null"]
        return edges[below(edges.count)]
    }

    /// Changes some of a text's bytes, and now and then a whole number in it.
    mutating func mutate(_ bytes: inout [UInt8]) {
        for _ in 0...below(3) where !bytes.isEmpty {
            let at = below(bytes.count)
            switch below(5) {
            case 0: bytes[at] ^= 1 << below(8)
            case 1: bytes.removeSubrange(at..<min(bytes.count, at + 1 + below(8)))
            case 2: bytes.insert(contentsOf: bytes[at..<min(bytes.count, at + 1 + below(24))], at: below(at + 1))
            default: replaceNumber(&bytes, from: at)
            }
        }
    }

    private mutating func replaceNumber(_ bytes: inout [UInt8], from at: Int) {
        let digits = UInt8(ascii: "0")...UInt8(ascii: "9")
        guard let start = bytes[at...].firstIndex(where: { digits ~= $0 }) else { return }
        let end = bytes[start...].firstIndex { !(digits ~= $0) } ?? bytes.endIndex
        bytes.replaceSubrange(start..<end, with: edge().utf8)
    }
}
