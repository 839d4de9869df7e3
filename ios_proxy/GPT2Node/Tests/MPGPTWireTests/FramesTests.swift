// Frames: what is refused, as early as it can be, and that bytes may be cut anywhere.

import MPGPTWire
import Testing

@Suite struct FramesTests {
    // MARK: - Headers

    /// A change of a header's bytes that no frame may have: where, which bytes, in which golden frame.
    static let damages: [(offset: Int, bytes: [UInt8], name: String)] = [
        (0, [0x6e], "HELLO"), (3, [0x51], "BYE"),  // magic
        (5, [0], "BYE"), (5, [20], "BYE"), (5, [255], "HELLO"),  // type
        (6, [1], "HELLO"), (7, [1], "PREFILL"),  // flags
        (8, [1], "HELLO"), (11, [1], "PING"), (8, [1], "BYE"),  // epoch
        (12, [1], "RESET"), (15, [1], "OFFER"), (12, [1], "WANT"),  // request
        (16, [1], "HELLO"), (16, [2], "ERROR"), (16, [0], "PREFILL"), (16, [3], "DECODE"),  // dtype
        (17, [1], "DECODE"), (17, [1], "BYE"), (22, [1], "RESULT"), (23, [1], "DATA"),  // zeros
        (18, [1], "DATA"), (18, [0, 0], "OFFER"), (18, [0xe9, 3], "OFFER"),  // rows
        (18, [0, 0], "DECODE"), (18, [65, 0], "DECODE"), (18, [3, 0], "DECODE"), (18, [2], "PREFILL"),
        (20, [1], "HELLO"), (20, [1], "OFFER"),  // tokens
        (20, [0, 0], "PREFILL"), (20, [1, 2], "PREFILL"), (20, [3, 0], "DECODE"), (20, [1, 0], "DECODE"),
    ]

    @Test(arguments: damages) func refusesDamage(at offset: Int, bytes: [UInt8], name: String) {
        var frame = Vector.frame(name)
        frame.replaceSubrange(offset..<offset + bytes.count, with: bytes)
        #expect(isBad(checksummed(frame)))
    }

    @Test(arguments: Kind.allCases) func boundsLengths(_ kind: Kind) throws {
        let frame = try #require(Vector.all.first { $0.frame[5] == kind.rawValue }).frame
        let (least, most) = (kind.lengths.lowerBound, kind.lengths.upperBound)
        for length in [least - 1, most + 1, 4 << 20 + 1, 1 << 31, (1 << 32) - 1] where length >= 0 {
            guard !(kind.lengths ~= length) else { continue }
            var header = Array(frame.prefix(headerSize))
            header.replaceSubrange(24..<28, with: littleEndian(UInt32(length)))
            #expect(isBad(header), "\(kind) with \(length) bytes")
        }
    }

    @Test func knowsAnotherVersionFromFiveBytes() {
        for version: UInt8 in [0, 2, 255] {
            #expect(failure(Array("mpIP".utf8) + [version]) == .badVersion(version))
        }
        #expect(failure(Array("mpIX".utf8) + [2]) != .badVersion(2))
    }

    @Test func knowsAStrangerFromOneByte() {
        #expect(isBad([0x47]))
        #expect(isBad(Array("mpI".utf8) + [0]))
        #expect(failure(Array("mpI".utf8)) == nil)
    }

    @Test func asksBeforeItWaits() throws {
        var frames = Frames()
        frames.feed(Vector.frame("PREFILL").prefix(headerSize))
        var asked: [Kind] = []
        #expect(throws: WireError.notAllowed(.prefill)) {
            try frames.next { kind in
                asked.append(kind)
                return false
            }
        }
        #expect(asked == [.prefill])
        #expect(frames.held == 0)
    }

    @Test func asksOnceAMessage() throws {
        var frames = Frames()
        var asked = 0
        for byte in Vector.frame("PREFILL") {
            frames.feed([byte])
            _ = try frames.next { _ in
                asked += 1
                return true
            }
        }
        #expect(asked == 1)
    }

    @Test func noticesEveryFlippedBit() {
        for vector in Vector.all {
            for bit in 0..<8 * vector.frame.count where !(8 * 24..<8 * 28 ~= bit) {
                var frame = vector.frame
                frame[bit / 8] ^= 1 << (bit % 8)
                #expect(failure(frame) != nil, "\(vector.name), bit \(bit)")
            }
        }
    }

    @Test func readsNothingAfterAnError() throws {
        var frames = Frames()
        frames.feed([0])
        let first = failure(&frames)
        frames.feed(Vector.frame("HELLO"))
        #expect(first != nil && failure(&frames) == first)
    }

    // MARK: - Streams

    @Test func readsBytesCutAnywhere() throws {
        let stream = Vector.all.flatMap(\.frame)
        let whole = try messages(in: stream)
        #expect(whole.count == Vector.all.count)
        for size in [1, 2, 31, 32, 33, 100] {
            var frames = Frames()
            var got: [Message] = []
            for at in stride(from: 0, to: stream.count, by: size) {
                frames.feed(stream[at..<min(at + size, stream.count)])
                while let message = try frames.next() {
                    got.append(message)
                }
                #expect(frames.held < headerSize + 200)
            }
            #expect(got == whole && frames.held == 0)
        }
    }

    @Test func holdsNoMoreThanTheLongestFrame() throws {
        let longest = Message.data(Message.Data(offset: 0, piece: [UInt8](repeating: 7, count: Limits.piece))).frame
        var frames = Frames()
        var count = 0
        for _ in 0..<20 {
            for at in stride(from: 0, to: longest.count, by: 65536) {
                frames.feed(longest[at..<min(at + 65536, longest.count)])
                while try frames.next() != nil { count += 1 }
                #expect(frames.held <= longest.count)
            }
        }
        #expect(count == 20 && frames.held == 0)
    }

    private func isBad(_ bytes: [UInt8]) -> Bool {
        if case .badFrame = failure(bytes) { true } else { false }
    }

    private func failure(_ bytes: [UInt8]) -> WireError? {
        var frames = Frames()
        frames.feed(bytes)
        return failure(&frames)
    }

    private func failure(_ frames: inout Frames) -> WireError? {
        do {
            while try frames.next() != nil {}
            return nil
        } catch {
            return error
        }
    }
}
