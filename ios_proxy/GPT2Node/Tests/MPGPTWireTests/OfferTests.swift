// Which offers can be a bundle.

import MPGPTWire
import Testing

@Suite struct OfferTests {
    static let weights = "model.mlpackage/Data/weight.bin"

    @Test func takesABundle() throws {
        try check(["manifest.json", "model.mlpackage/Data/a-b_c.mlmodel", Self.weights, "selftest.safetensors"])
        try check(["manifest.json", "model.mlpackage/a", "selftest.safetensors"])
        try check(["manifest.json", "model.mlpackage/A/x", "model.mlpackage/a/y", "selftest.safetensors"])
        try check(["manifest.json", "model.mlpackage/a", "model.mlpackage/a.b", "selftest.safetensors"])
        try check(["manifest.json", "model.mlpackage/...", "model.mlpackage/.a", "selftest.safetensors"])
        try check(["manifest.json", "model.mlpackage/\(String(repeating: "x", count: 184))", "selftest.safetensors"])
    }

    @Test(arguments: [
        "model.mlpackage", "model.mlpackage/", "model.mlpackage//a", "model.mlpackage/a/", "model.mlpackage/./a",
        "model.mlpackage/a/.", "model.mlpackage/..", "model.mlpackage/../a", "model.mlpackage/a/../../b",
        "/model.mlpackage/a", "model.mlpackage/é", "model.mlpackage/a b", "model.mlpackage/a\\b", "model.mlpackage/a:b",
        "model.mlpackage/a\u{0}", "model.mlpackage/a\n", "model.mlpackage/~", "Model.mlpackage/a", "model.mlpackagf/a",
        "nothing", "Manifest.json", "..", "/", "", "manifest.json/a", "selftest.safetensors/a",
        "model.mlpackage/%2e%2e",
        "model.mlpackage/\(String(repeating: "x", count: 185))",
    ]) func refusesAName(_ name: String) {
        #expect(isRefused(["manifest.json", Self.weights, name, "selftest.safetensors"].sorted(by: byBytes)))
    }

    @Test func needsItsParts() {
        #expect(isRefused(["manifest.json", Self.weights]))
        #expect(isRefused([Self.weights, "selftest.safetensors"]))
        #expect(isRefused(["manifest.json", "selftest.safetensors"]))
        #expect(isRefused([]))
    }

    @Test func needsItsOrder() {
        #expect(isRefused(["manifest.json", "selftest.safetensors", Self.weights]))
        #expect(isRefused(["manifest.json", Self.weights, Self.weights, "selftest.safetensors"]))
        #expect(isRefused(["manifest.json", "manifest.json", Self.weights, "selftest.safetensors"]))
    }

    @Test func refusesNamesThatADiskMayNotTellApart() {
        for other in [["A", "a"], ["a", "a/b"], ["A", "a/b"], ["a/B/c", "a/b"], ["x/WEIGHT", "x/weight"]] {
            let files = other.map { "model.mlpackage/\($0)" }
            #expect(isRefused((["manifest.json"] + files + ["selftest.safetensors"]).sorted(by: byBytes)), "\(other)")
        }
    }

    @Test func boundsTheLengths() throws {
        let names = ["manifest.json", Self.weights, "selftest.safetensors"]
        try check(names, lengths: [1, 1 << 36 - 2, 1])
        #expect(isRefused(names, lengths: [1, 1 << 36 - 1, 1]))
        #expect(isRefused(names, lengths: [.max, 1, 1]))
        #expect(isRefused(names, lengths: [.max, .max, 2]))
    }

    @Test func checksItsHash() {
        var offer = offer(["manifest.json", Self.weights, "selftest.safetensors"])
        offer.files[1].length += 1
        #expect(throws: OfferError.self) { try offer.check() }
    }

    /// As `mpgpt_ios.bundle.bundle_hash` has it.
    @Test func hashes() {
        let files = [
            Message.File(name: "manifest.json", length: 5, sha256: digest),
            Message.File(name: "model.mlpackage/a", length: 1 << 33, sha256: nodeNonce),
        ]
        #expect(
            Message.Offer.hash(of: files).description
                == "57250ffb6608ccab12f8577a280d6158257042cfd652e0b03afd03eaa00425d0")
        #expect(Message.Offer.hash(of: []) == SHA256.hash([]))
    }

    private func offer(_ names: [String], lengths: [UInt64]? = nil) -> Message.Offer {
        let lengths = lengths ?? names.map { _ in 3 }
        let files = zip(names, lengths).map { Message.File(name: $0, length: $1, sha256: digest) }
        return Message.Offer(bundle: Message.Offer.hash(of: files), files: files)
    }

    private func check(_ names: [String], lengths: [UInt64]? = nil) throws {
        try offer(names, lengths: lengths).check()
    }

    private func isRefused(_ names: [String], lengths: [UInt64]? = nil) -> Bool {
        do {
            try check(names, lengths: lengths)
            return false
        } catch {
            return true
        }
    }

    private func byBytes(_ one: String, _ other: String) -> Bool {
        one.utf8.lexicographicallyPrecedes(other.utf8)
    }
}
