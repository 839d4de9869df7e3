// Manifests: the page's table, rule by rule.

import Dice
import MPGPTWire
import Testing

@testable import MPGPTNode

@Suite struct ManifestTests {
    @Test func allOfIt() throws {
        let plain = try manifest()
        #expect(plain.format == 1 && plain.model == "gpt2" && plain.family == "gpt2")
        #expect(plain.modelHash.hasPrefix("0a0a"))
        #expect(plain.modelLayers == 12 && plain.layers == 4..<8 && plain.embed == 4 && plain.heads == 2)
        #expect(plain.kvHeads == 2 && plain.headDim == 4 && plain.slots == 3 && plain.context == 12 && plain.chunk == 4)
        #expect(plain.weights == "float16" && plain.rotary == nil && plain.tolerance == 0.05)
        #expect(plain.madeBy == Manifest.MadeBy(mpgpt: "1.0", coremltools: "9.0", torch: "2.9"))
        let turning = try manifest(["rotary": ["inv_freq": [1, 0.05], "gain": 1.25]])
        #expect(turning.rotary == Manifest.Rotary(invFreq: [1, 0.05], gain: 1.25))
    }

    @Test func theBounds() throws {
        let large: JSONValue = 1_048_576
        _ = try manifest([
            "model_layers": large, "layers": [0, large], "embed": 2047, "slots": 64, "chunk": 512, "heads": large,
            "kv_heads": large, "head_dim": large, "context": 32768, "weights": "int8", "tolerance": 1,
            "model": .string(String(repeating: "\u{e9}", count: 200)),
        ])
        _ = try manifest(["context": large, "slots": 16, "chunk": 16, "embed": 16384])
        _ = try manifest([
            "context": 1, "chunk": 1, "embed": 1, "slots": 1, "layers": [0, 1], "model_layers": 1, "family": "",
        ])
    }

    static let wrong: [(JSONObject, String)] = [
        (["format": 2], "format must be 1, not 2"),
        (["format": "1"], "format must be 1, not \"1\""),
        (["model": 5], "model must be a text of at most 200 characters, not 5"),
        (["family": .string(String(repeating: "x", count: 201))], "family must be a text of at most 200 characters"),
        (["model_hash": .string(String(repeating: "0A", count: 32))], "model_hash must be 64 digits of lower-case hex"),
        (["model_hash": "0a"], "model_hash must be 64 digits of lower-case hex, not \"0a\""),
        (["model_layers": 0], "model_layers must be an integer from 1 to 1048576, not 0"),
        (["model_layers": 7], "layers ends at 8, and model_layers is 7"),
        (["layers": [4, 4]], "layers must be two integers that rise, from 0 to 1048576, not [4,4]"),
        (["layers": [-1, 4]], "layers must be two"), (["layers": [1, 2, 3]], "layers must be two"),
        (["layers": [1, 2.5]], "layers must be two"), (["layers": "4-8"], "layers must be two"),
        (["embed": 16385], "embed must be an integer from 1 to 16384"),
        (["slots": 65], "slots must be an integer from 1 to 64, not 65"),
        (["slots": 3.0], "slots must be an integer from 1 to 64, not 3.0"),
        (["slots": true], "slots must be an integer from 1 to 64, not true"),
        (["chunk": 513], "chunk must be an integer from 1 to 512"),
        (["chunk": 13], "chunk is 13, and context only 12"),
        (["chunk": 512, "context": 32769], "chunk times context is 16777728, and at most 16777216 is taken"),
        (["chunk": 256, "context": 1024, "embed": 4096], "chunk times embed is 1048576, and at most 1048572 is taken"),
        (["slots": 64, "context": 262_145], "slots times context is 16777280, and at most 16777216 is taken"),
        (["heads": 1_048_577], "heads must be"), (["kv_heads": -1], "kv_heads must be"),
        (["head_dim": .null], "head_dim must be an integer from 1 to 1048576, not null"),
        (["context": 0], "context must be"),
        (["weights": "int4"], "weights must be \"float16\" or \"int8\", not \"int4\""),
        (["rotary": []], "rotary must be an object or null, not []"),
        (["rotary": ["inv_freq": [1, 2, 3], "gain": 1]], "rotary.inv_freq has 3 numbers, and head_dim is 4"),
        (["rotary": ["inv_freq": [1, "2"], "gain": 1]], "rotary.inv_freq must be an array of numbers"),
        (["rotary": ["inv_freq": [1, 2]]], "rotary.gain is missing"),
        (["rotary": ["inv_freq": [1, 2], "gain": 1, "base": 1]], "the key rotary.\"base\" is unknown"),
        (["tolerance": 0], "tolerance must be a number above 0, not 0"), (["tolerance": .null], "tolerance must be"),
        (["made_by": .null], "made_by must be an object, not null"),
        (["made_by": ["mpgpt": "1", "torch": "2"]], "made_by.coremltools is missing"),
        (["made_by": ["mpgpt": 1, "torch": "2", "coremltools": "3"]], "made_by.mpgpt must be a text"),
        (["more": 1], "the key \"more\" is unknown"),
    ]

    @Test(arguments: wrong) func oneThingWrong(changes: JSONObject, sentence: String) throws {
        let error = try #require(throws: StoreError.self) { try manifest(changes) }
        #expect(error.text.hasPrefix("the manifest: \(sentence)") && !error.text.contains(";"), "\(error.text)")
    }

    @Test func somethingIsMissing() throws {
        for member in manifestFields.members {
            var fields = manifestFields
            fields[member.key] = nil
            let error = try #require(throws: StoreError.self) { try Manifest(json: fields.encoded) }
            #expect(error.text == "the manifest: \(member.key) is missing")
        }
        let error = try #require(throws: StoreError.self) { try manifest(["slots": 0, "chunk": 0, "one": 1, "two": 2]) }
        #expect(error.text.split(separator: ";").count == 4, "every problem is told")
    }

    @Test func noManifestAtAll() {
        let json = manifestFields.encoded
        let padding = [UInt8](repeating: UInt8(ascii: " "), count: Manifest.maxBytes - json.count)
        #expect(throws: Never.self) { try Manifest(json: json + padding) }
        #expect(throws: StoreError("the manifest is larger than 1 MiB")) { try Manifest(json: json + padding + [32]) }
        let twice = Array("{\"format\":1,".utf8) + json.dropFirst()
        for bytes in [[], Array("[]".utf8), Array(json.dropLast()), [0xef, 0xbb, 0xbf] + json, twice] {
            #expect(throws: StoreError.self) { try Manifest(json: bytes) }
        }
    }

    @Test func whateverComes() {
        var dice = Dice(state: 1)
        var turning = manifestFields
        turning["rotary"] = ["inv_freq": [1, 0.05], "gain": 1.25]
        let texts = [manifestFields.encoded, turning.encoded]
        var accepted = 0
        for _ in 0..<Dice.throwCount {
            var text = texts[dice.below(2)]
            dice.mutate(&text)
            guard let manifest = try? Manifest(json: text) else { continue }
            accepted += 1
            #expect(manifest.layers.upperBound <= manifest.modelLayers && manifest.chunk <= manifest.context)
            #expect(1...64 ~= manifest.slots && 1...16384 ~= manifest.embed && manifest.tolerance > 0)
        }
        #expect(accepted > 0)
    }
}
