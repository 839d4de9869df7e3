// Payloads that are none of their type, in frames whose header and checksum are right.

import MPGPTWire
import Testing

@Suite struct PayloadsTests {
    // MARK: - Requests

    @Test(arguments: ["PREFILL", "DECODE", "DECODE, float32", "RESULT"]) func refusesValuesOfNoShape(_ name: String) {
        let frame = Vector.frame(name)
        #expect(isBad(sealed(frame + [0])))
        #expect(isBad(sealed(frame.dropLast())))
        let withoutValues = headerSize + 8 * Int(frame[18]) + (frame[5] == Kind.result.rawValue ? 8 : 0)
        #expect(isBad(sealed(Array(frame.prefix(withoutValues)))))
    }

    @Test func takesTheWidestModelAndNoWider() throws {
        let widest = prefill(1, x: values(tokens: 1, embed: Limits.embed, dtype: .float32))
        #expect(try messages(in: widest.frame) == [widest])
        #expect(isBad(sealed(widest.frame + [0, 0, 0, 0])))
    }

    @Test func refusesAPrefillOfTwoPositions() {
        var frame = Vector.frame("DECODE")
        frame[5] = Kind.prefill.rawValue
        #expect(isBad(sealed(frame)))
    }

    @Test func refusesADecodeOfMoreTokensThanRows() {
        var frame = Vector.frame("PREFILL")
        frame[5] = Kind.decode.rawValue
        #expect(isBad(sealed(frame)))
    }

    @Test func valuesHaveTheBytesOfTheirShape() {
        let bytes = [UInt8](repeating: 0, count: 8)
        #expect(Values(dtype: .float16, tokens: 2, embed: 2, bytes: bytes) != nil)
        #expect(Values(dtype: .float32, tokens: 2, embed: 2, bytes: bytes) == nil)
        #expect(Values(dtype: .float16, tokens: 0, embed: 2, bytes: []) == nil)
        #expect(Values(dtype: .float16, tokens: 2, embed: -2, bytes: bytes) == nil)
        #expect(Values(dtype: .float16, tokens: .max, embed: .max, bytes: bytes) == nil)
    }

    // MARK: - Offers

    @Test func refusesAnOfferThatIsCut() {
        let frame = Vector.frame("OFFER")
        for count in headerSize + 32..<frame.count {
            #expect(isBad(sealed(Array(frame.prefix(count)))))
        }
        #expect(isBad(sealed(frame + [0])))
    }

    @Test func refusesAnOfferWithMoreOrFewerFilesThanItCounts() {
        for rows: UInt8 in [1, 3] {
            var frame = Vector.frame("OFFER")
            frame[18] = rows
            #expect(isBad(sealed(frame)))
        }
    }

    @Test func boundsNames() throws {
        for (count, isGood) in [(0, false), (1, true), (200, true), (201, false), (65535, false)] {
            #expect(isBad(offerFrame(name: [UInt8](repeating: 0x61, count: count))) == !isGood)
        }
        for name in [[0xff], [0xc3], [0xed, 0xa0, 0x80], [0xc0, 0x80]] as [[UInt8]] {
            #expect(isBad(offerFrame(name: name)))
        }
    }

    private func offerFrame(name: [UInt8]) -> [UInt8] {
        var frame = Message.offer(offer).frame.prefix(headerSize + 32)
        frame += littleEndian(UInt16(name.count)) + name + littleEndian(UInt64.max) + digest.bytes
        return sealed(Array(frame))
    }

    // MARK: - JSON and texts

    @Test(arguments: [
        "{}x", "{", "[]", "1", "null", "{\"a\":NaN}", "{\"a\":-Infinity}", "{\"a\":1e999}", "{\"a\":1,\"a\":1}",
        "{\"a\":01}", "{\"a\":\"\u{1}\"}", "\u{feff}{}", "{'a':1}", "{\"a\":1,}", "  ",
    ]) func refusesJSON(_ text: String) {
        #expect(isBad(frame(of: .info, Array(text.utf8))))
        #expect(isBad(frame(of: .ready, Array(text.utf8))))
        #expect(isBad(frame(of: .pong, [UInt8](repeating: 0, count: 8) + text.utf8)))
    }

    @Test func refusesJSONInAnotherEncoding() {
        #expect(isBad(frame(of: .info, Array("{}".utf16).flatMap(littleEndian))))
        #expect(isBad(frame(of: .info, Array("{\"".utf8) + [0xff] + "\":1}".utf8)))
    }

    @Test func takesJSONInAnyOrderWithSpaces() throws {
        let text = " {\r\n\t\"b\" : [ 1 , 2.5 ] , \"a\" : { } } "
        let read = try messages(in: frame(of: .info, Array(text.utf8)))
        #expect(read == [.info(Message.Info(facts: ["a": [:], "b": [1, 2.5]]))])
    }

    @Test func repairsTexts() throws {
        let bytes = Array("a\u{1b}[2J\u{202e}é\u{a0}ü\n".utf8) + [0xff, 0xe2, 0x82, 0x41]
        let text = "a\u{fffd}[2J\u{fffd}é\u{fffd}ü\u{fffd}\u{fffd}\u{fffd}A"
        #expect(try messages(in: frame(of: .loading, bytes)) == [.loading(Message.Loading(text: text))])
        let error = Message.Error(code: .busy, text: text)
        #expect(try messages(in: frame(of: .error, [11, 0] + bytes)) == [.error(error)])
    }

    @Test func cutsTextsBetweenCharacters() throws {
        for (character, count) in [("a", 500), ("é", 250), ("€", 166), ("😀", 125)] {
            for lead in 0..<5 {
                let text = String(repeating: "a", count: lead) + String(repeating: character, count: 600)
                let error = Message.Error(code: .busy, text: text)
                let cut = try #require(try errors(in: Message.error(error).frame).first)
                #expect(text.hasPrefix(cut.text))
                #expect(cut.text.utf8.count > 500 - 4 && cut.text.utf8.count <= 500)
                if lead == 0 { #expect(cut.text.count == count) }
            }
        }
    }

    @Test func keepsUnknownCodes() throws {
        for code: UInt16 in [0, 12, 65535] {
            let error = Message.Error(code: ErrorCode(rawValue: code), text: "new", epoch: 1, request: 2)
            #expect(try messages(in: Message.error(error).frame) == [.error(error)])
            #expect(error.code.name == nil && "\(error.code)" == "error \(code)")
        }
        #expect(ErrorCode.busy.name == "BUSY" && ErrorCode(name: "BUSY") == .busy && ErrorCode(name: "") == nil)
    }

    private func frame(of kind: Kind, _ payload: [UInt8]) -> [UInt8] {
        var frame = Array(Vector.frame("BYE").prefix(headerSize))
        frame[5] = kind.rawValue
        return sealed(frame + payload)
    }

    private func isBad(_ frame: some Collection<UInt8>) -> Bool {
        do {
            _ = try messages(in: Array(frame))
            return false
        } catch {
            if case .badFrame = error as? WireError { return true }
            return false
        }
    }
}
