// JSON: the grammar of RFC 8259 and no more, and Python's bytes.

import MPGPTWire
import Testing

@Suite struct JSONTests {
    @Test(arguments: [
        "null", "true", "false", "0", "-7", "[]", "{}", "[1,2,[3,{}]]", "\"\"", "\"é€😀\u{7f}\"", "9223372036854775807",
        "-9223372036854775808", "\"\\\"\\\\/\\b\\f\\n\\r\\t\\u0000\\u001f\"", "{\"a\":1,\"b\":{\"c\":null}}",
    ]) func comesBack(_ text: String) throws {
        #expect(try rewritten(text) == text)
    }

    @Test(arguments: [
        (" [ 1 ,\t2 ]\r\n", "[1,2]"), ("\"\\u00e9\\u20AC\\ud83d\\uDE00\\/\"", "\"é€😀/\""), ("-0", "0"),
        ("1E2", "100.0"),
        ("{\"b\":1,\"a\":2,\"\":3,\"B\":4}", "{\"\":3,\"B\":4,\"a\":2,\"b\":1}"),
        ("{\"e\\u0301\":1,\"é\":2}", "{\"e\u{301}\":1,\"é\":2}"),
        ("{\"\\ud83d\\ude00\":1,\"\u{ff5e}\":2}", "{\"\u{ff5e}\":2,\"\u{1f600}\":1}"),
    ]) func isWrittenPlainly(_ text: String, _ expected: String) throws {
        #expect(try rewritten(text).utf8.elementsEqual(expected.utf8))
    }

    @Test(arguments: [
        "", " ", "nul", "nulll", "True", "NaN", "Infinity", "-Infinity", "-", "+1", "01", "-01", "1.", ".5", "1e",
        "1e+",
        "0x10", "1_000", "1e400", "-1e400", "[", "]", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "{", "{\"a\"", "{\"a\":",
        "{\"a\":1", "{\"a\":1,", "{\"a\":1,}", "{a:1}", "{1:1}", "{\"a\" 1}", "{\"a\":1 \"b\":2}", "{\"a\":1,\"a\":2}",
        "{\"a\":1,\"\\u0061\":2}", "\"", "\"\\", "\"\\x\"", "\"\\u12\"", "\"\\u12g4\"", "\"\\ud800\"", "\"\\udc00\"",
        "\"\\ud800\\u0061\"", "\"\\ud800\\ud800\"", "\"\\ud800x\"", "\"\n\"", "\"\t\"", "1 2", "{}{}", "[]]", "// x",
        "'a'", "\u{feff}{}", "\u{a0}1",
    ]) func isRefused(_ text: String) {
        #expect(throws: JSONError.self) { try rewritten(text) }
    }

    @Test(
        arguments: [[0xff], [0xc0, 0x80], [0xed, 0xa0, 0x80], [0xf4, 0x90, 0x80, 0x80], [0xe2, 0x82]] as [[UInt8]])
    func refusesWhatIsNotUTF8(_ bytes: [UInt8]) {
        #expect(throws: JSONError.self) { try JSONValue(parsing: [0x22] + bytes + [0x22]) }
        #expect(throws: JSONError.self) { try JSONValue(parsing: bytes) }
    }

    @Test func hasSixteenLevels() throws {
        func nested(_ depth: Int) -> String {
            String(repeating: "[", count: depth) + String(repeating: "]", count: depth)
        }
        #expect(try rewritten(nested(16)) == nested(16))
        #expect(throws: JSONError.self) { try rewritten(nested(17)) }
        #expect(throws: JSONError.self) { try rewritten(String(repeating: "[", count: 1_000_000)) }
        #expect(try rewritten("[\(nested(15)),\(nested(15))]") == "[\(nested(15)),\(nested(15))]")
    }

    /// As Python's repr.
    @Test(arguments: [
        (1e16, "1e+16"), (1e15, "1000000000000000.0"), (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
        (9_007_199_254_740_993.0, "9007199254740992.0"), (1.2345678901234568e16, "1.2345678901234568e+16"),
        (1.5e16, "1.5e+16"), (.greatestFiniteMagnitude, "1.7976931348623157e+308"), (.leastNonzeroMagnitude, "5e-324"),
        (1e-4, "0.0001"),
        (1e-5, "1e-05"), (0.1, "0.1"), (100.0, "100.0"), (-0.0, "-0.0"), (0.0, "0.0"), (1e22, "1e+22"),
        (-12345.678, "-12345.678"), (1.0 / 3, "0.3333333333333333"), (2.5e-7, "2.5e-07"), (1e100, "1e+100"),
        (17_179_869_184.0, "17179869184.0"), (0.00012345, "0.00012345"),
    ]) func writesDoublesAsPython(_ value: Double, _ expected: String) throws {
        #expect(text(.number(value)) == expected)
        #expect(try JSONValue(parsing: expected.utf8) == .number(value))
    }

    @Test func writesNullForWhatIsNoNumber() {
        #expect(text(.number(.nan)) == "null" && text([.number(.infinity)]) == "[null]")
    }

    @Test func tellsIntegersFromNumbers() throws {
        #expect(try JSONValue(parsing: "8".utf8).integer == 8)
        #expect(try JSONValue(parsing: "8.0".utf8).integer == nil)
        #expect(try JSONValue(parsing: "8e0".utf8).integer == nil)
        #expect(try JSONValue(parsing: "-9223372036854775808".utf8).integer == .min)
        #expect(throws: JSONError.self) { try JSONValue(parsing: "9223372036854775808".utf8) }
        #expect(try JSONValue(parsing: "9223372036854775808.0".utf8).number == 9_223_372_036_854_775_808)
        #expect(try JSONValue(parsing: "8".utf8).number == 8)
    }

    @Test func membersAreFoundByTheirBytes() {
        var object: JSONObject = ["b": 1, "a": 2, "c": 3]
        #expect(object["a"] == 2 && object["d"] == nil && object.members.map(\.key) == ["a", "b", "c"])
        object["e\u{301}"] = 4
        #expect(object["é"] == nil && object["e\u{301}"] == 4)
        object["b"] = nil
        object["a"] = 5
        #expect(object == ["a": 5, "c": 3, "e\u{301}": 4])
    }
}

private func rewritten(_ text: String) throws -> String {
    String(decoding: try JSONValue(parsing: text.utf8).encoded, as: UTF8.self)
}

private func text(_ value: JSONValue) -> String {
    String(decoding: value.encoded, as: UTF8.self)
}
