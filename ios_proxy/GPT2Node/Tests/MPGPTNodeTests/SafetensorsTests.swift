// Safetensors: what Python wrote, what comes back, what is refused, and whatever comes.

import Dice
import MPGPTWire
import Testing

@testable import MPGPTNode

@Suite struct SafetensorsTests {
    static let some = Safetensors(
        tensors: [
            "half": Tensor(shape: [1, 3], float16: [0x3c00, 0xf0e2, 0]), "word": Tensor(shape: [2], int32: [-1, 7]),
            "float": Tensor(shape: [], float32: [0.5]), "none": Tensor(shape: [0, 5], float16: []),
        ], metadata: ["function": "decode", "\u{e9}": "\"quoted\"\n"])

    @Test func whatPythonWrote() throws {
        let bytes = try #require(golden("selftest")["file"]?.hexBytes)
        let file = try Safetensors(bytes: bytes)
        #expect(file.metadata == ["kind.0": "prefill", "kind.1": "decode", "kind.2": "prefill"])
        #expect(file.tensors.count == 12 && file.tensors["1.slot"]?.integers == [1, 0])
        #expect(file.tensors["0.x"]?.shape == [6, 4] && file.tensors["0.y"]?.floats[8] == 1)
        #expect(try Safetensors(bytes: file.encoded()) == file)
    }

    @Test func whatIsWrittenComesBack() throws {
        let bytes = Self.some.encoded()
        #expect(try Safetensors(bytes: bytes) == Self.some)
        #expect(Safetensors(tensors: [:]).encoded() == [8, 0, 0, 0, 0, 0, 0, 0] + "{}      ".utf8)
        #expect((bytes.count - 18) % 8 == 0, "the data begins where wide elements are aligned")
    }

    static let refused: [(String, Int)] = [
        (#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#, 3),
        (#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#, 5),
        (#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,2]}}"#, 2),
        (#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[4,0]}}"#, 4),
        (#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[-4,0]}}"#, 4),
        (#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[1,5]}}"#, 5),
        (#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4,4]}}"#, 4),
        (#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0.0,4.0]}}"#, 4),
        (#"{"a":{"dtype":"F16","shape":[-2],"data_offsets":[0,4]}}"#, 4),
        (#"{"a":{"dtype":"F16","shape":[-1,-2],"data_offsets":[0,4]}}"#, 4),
        (#"{"a":{"dtype":"F16","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#, 0),
        (#"{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}"#, 0),
        (#"{"a":{"dtype":"F16","shape":[9223372036854775807],"data_offsets":[0,9223372036854775807]}}"#, 0),
        (#"{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#, 8),
        (#"{"a":{"dtype":"F16","shape":2,"data_offsets":[0,4]}}"#, 4),
        (#"{"a":{"dtype":"F16","data_offsets":[0,4]}}"#, 4),
        (#"{"a":[]}"#, 0), (#"[]"#, 0), (#"{"#, 0), ("{}", 1), ("", 0),
        (#"{"__metadata__":{"a":1}}"#, 0), (#"{"__metadata__":[]}"#, 0),
        // Two that overlap, two with a gap, two names that Unicode calls equal.
        ("{\(entry("a", 0..<4)),\(entry("b", 2..<6))}", 6), ("{\(entry("a", 0..<2)),\(entry("b", 4..<6))}", 6),
        ("{\(entry("\u{e9}", 0..<2)),\(entry("e\u{301}", 2..<4))}", 4),
    ]

    @Test(arguments: refused) func whatIsRefused(header: String, data: Int) {
        #expect(throws: SafetensorsError.self) { try Safetensors(bytes: file(header, data)) }
    }

    @Test func entriesSideBySide() throws {
        let file = try Safetensors(bytes: file("{\(entry("b", 4..<6)),\(entry("a", 0..<4))}", 6))
        #expect(file.tensors["a"]?.shape == [2] && file.tensors["b"]?.shape == [1])
    }

    @Test func headersLongerThanTheFile() {
        for length in [UInt64(3), 1 << 31, 1 << 63, .max] {
            var bytes: [UInt8] = []
            bytes.append(littleEndian: length)
            #expect(throws: SafetensorsError.self) { try Safetensors(bytes: bytes + [0x7b, 0x7d]) }
        }
        for count in 0..<8 {
            #expect(throws: SafetensorsError.self) { try Safetensors(bytes: [UInt8](repeating: 0, count: count)) }
        }
    }

    @Test func whateverComes() throws {
        var dice = Dice(state: 1)
        let files = [Self.some.encoded(), try #require(golden("selftest")["file"]?.hexBytes)]
        var accepted = 0
        for _ in 0..<Dice.throwCount {
            let bytes = files[dice.below(2)]
            let length = Int(bytes[0]) + Int(bytes[1]) << 8
            var header = Array(bytes[8..<8 + length])
            dice.mutate(&header)
            var count: [UInt8] = []
            count.append(littleEndian: dice.below(16) == 0 ? dice.next() : UInt64(header.count))
            guard let file = try? Safetensors(bytes: count + header + bytes[(8 + length)...]) else { continue }
            accepted += 1
            #expect(try Safetensors(bytes: file.encoded()) == file)
        }
        #expect(accepted > 0)
    }
}

private func entry(_ name: String, _ bytes: Range<Int>) -> String {
    let offsets = "[\(bytes.lowerBound),\(bytes.upperBound)]"
    return "\"\(name)\":{\"dtype\":\"F16\",\"shape\":[\(bytes.count / 2)],\"data_offsets\":\(offsets)}"
}

private func file(_ header: String, _ data: Int) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.append(littleEndian: UInt64(header.utf8.count))
    return bytes + header.utf8 + [UInt8](repeating: 0, count: data)
}
