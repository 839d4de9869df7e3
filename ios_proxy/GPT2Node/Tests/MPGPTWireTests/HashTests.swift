// Checksums, hashes and proofs against published vectors, and bytes.

import MPGPTWire
import Testing

@Suite struct HashTests {
    /// FIPS 180-4's examples and the empty message.
    @Test(arguments: [
        ("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
        ),
        (
            "abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmno"
                + "ijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
            "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"
        ),
    ]) func sha256(_ text: String, _ expected: String) {
        #expect(SHA256.hash(text.utf8).description == expected)
    }

    @Test func sha256OfAMillionLetters() {
        var sha = SHA256()
        for _ in 0..<1000 {
            sha.update([UInt8](repeating: UInt8(ascii: "a"), count: 1000))
        }
        #expect(sha.finalize().description == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0")
    }

    /// The hash, by Python's hashlib, of the hashes of all lengths around three blocks.
    @Test func sha256OfEveryLength() {
        var all = SHA256()
        for length in 0..<200 {
            all.update(SHA256.hash((0..<length).map { UInt8(truncatingIfNeeded: $0) }).bytes)
        }
        #expect(all.finalize().description == "ba7b0fcea7d10c06b855b43d2b4dce1e3e842fff6be0acefb0faf4f2dd05bb47")
    }

    @Test func sha256IsTheSameHoweverItIsCut() {
        let bytes = (0..<300).map { UInt8(truncatingIfNeeded: $0 * 7) }
        for size in 1..<130 {
            var sha = SHA256()
            for at in stride(from: 0, to: bytes.count, by: size) {
                sha.update(bytes[at..<min(at + size, bytes.count)])
            }
            #expect(sha.finalize() == SHA256.hash(bytes))
        }
    }

    /// RFC 4231, but for the fifth case, whose output is cut.
    static let rfc4231: [(key: [UInt8], message: [UInt8], hmac: String)] = [
        (
            bytes(0x0b, 20), Array("Hi There".utf8),
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
        ),
        (
            Array("Jefe".utf8), Array("what do ya want for nothing?".utf8),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        ),
        (bytes(0xaa, 20), bytes(0xdd, 50), "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"),
        ([UInt8](1...25), bytes(0xcd, 50), "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"),
        (
            bytes(0xaa, 131), Array("Test Using Larger Than Block-Size Key - Hash Key First".utf8),
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
        ),
        (
            bytes(0xaa, 131),
            Array(
                """
                This is a test using a larger than block-size key and a larger than block-size data. \
                The key needs to be hashed before being used by the HMAC algorithm.
                """.utf8),
            "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"
        ),
    ]

    @Test(arguments: rfc4231) func hmac(key: [UInt8], message: [UInt8], expected: String) {
        var hmac = HMAC(key: key)
        hmac.update(message)
        #expect(hmac.finalize().description == expected)
    }

    @Test func crc32() {
        for (bytes, expected) in [
            ([], 0), (Array("a".utf8), 0xe8b7_be43), (Array("123456789".utf8), 0xcbf4_3926),
            ((0..<1280).map { UInt8(truncatingIfNeeded: $0) }, 0x1e7a_6d24),
        ] as [([UInt8], UInt32)] {
            for cut in 0...min(bytes.count, 20) {
                var crc = CRC32()
                crc.update(bytes[..<cut])
                crc.update(bytes[cut...])
                #expect(crc.value == expected)
            }
        }
    }

    /// Both as the Python side makes them.
    @Test func proofs() {
        #expect(
            token.nodeProof(proxyNonce: proxyNonce, nodeNonce: nodeNonce).description
                == "382f6bb4ad5b07bf93e100618e25d0014ca9bc6c7d5af7bd8c3621c9b094862b")
        #expect(
            token.proxyProof(proxyNonce: proxyNonce, nodeNonce: nodeNonce).description
                == "c86f464a7f77b7d54ed3c6a9991907f7518db4b3d0d941e24989370c5d20606b")
    }

    @Test func tokens() {
        let plain = Array("the shared token".utf8)
        let spaced = Token(Array(" \t".utf8) + plain + Array("\r\n".utf8))
        #expect(
            spaced?.nodeProof(proxyNonce: proxyNonce, nodeNonce: nodeNonce)
                == token.nodeProof(proxyNonce: proxyNonce, nodeNonce: nodeNonce))
        #expect(Token(plain.dropLast()) == nil && Token([]) == nil && Token(bytes(0x20, 40)) == nil)
        #expect(Token(bytes(0x61, 1024)) != nil && Token(bytes(0x61, 1025)) == nil)
    }

    @Test func hex() {
        #expect([UInt8](hex: "00fFa0") == [0, 255, 160] && [0, 255, 160].hex == "00ffa0")
        #expect([UInt8](hex: "0") == nil && [UInt8](hex: "0g") == nil && [UInt8](hex: "é") == nil)
        #expect(Bytes32(hex: digest.description) == digest && Bytes32(hex: "00") == nil && Bytes32([]) == nil)
    }

    @Test func readerStopsAtTheEnd() {
        var reader = ByteReader([1, 2, 3, 4, 5][1...])
        #expect(reader.integer(UInt16.self) == 0x0302 && reader.integer(UInt32.self) == nil && reader.remaining == 2)
        #expect(reader.take(-1) == nil && reader.take(3) == nil && reader.take(.max) == nil)
        #expect(reader.takeRest().elementsEqual([4, 5]) && reader.integer(UInt8.self) == nil)
    }
}

private func bytes(_ byte: UInt8, _ count: Int) -> [UInt8] {
    [UInt8](repeating: byte, count: count)
}
