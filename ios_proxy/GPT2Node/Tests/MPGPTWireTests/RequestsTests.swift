// Requests while a node is serving: which are taken, and what is sent in which order.

import MPGPTWire
import Testing

@Suite struct RequestsTests {
    @Test func resultsComeInTheOrderOfTheRequests() throws {
        var session = try session(in: .serving)
        let requests = try session.requests(prefill(1), decode(2, slots: [3, 1]))
        for request in requests {
            session.result(request, request.x, computeNanoseconds: 9)
        }
        let results = try messages(in: session.out)
        #expect(
            results
                == requests.map {
                    .result(
                        Message.Result(
                            epoch: epoch, request: $0.number, positions: $0.positions, computeNanoseconds: 9, y: $0.x))
                })
    }

    static let refused: [(message: Message, why: String)] = [
        (prefill(0), "number 0"), (prefill(5), "the last number"), (prefill(4), "an older number"),
        (prefill(6, epoch: epoch - 1), "an older epoch"), (prefill(6, epoch: epoch + 1), "a newer epoch"),
        (prefill(6, x: values(tokens: 2, dtype: .float32)), "another dtype"),
        (prefill(6, x: values(tokens: 2, embed: 3)), "another width"), (prefill(6, slot: 4), "no slot"),
        (prefill(6, slot: .max), "no slot"), (decode(6, slots: [0, 4]), "no slot"),
        (decode(6, slots: [1, 1]), "a slot twice"),
    ]

    @Test(arguments: refused) func refuses(_ message: Message, _ why: String) throws {
        var session = try session(in: .serving)
        _ = try session.requests(prefill(5))
        #expect(try session.refusal(of: message.frame) == .badRequest)
        let error = try #require(try errors(in: session.out).first)
        #expect(littleEndian(error.epoch) + littleEndian(error.request) == Array(message.frame[8..<16]))
    }

    @Test func numbersBeginAtOneAndMaySkip() throws {
        var session = try session(in: .serving)
        #expect(try session.refusal(of: prefill(0).frame) == .badRequest)
        session = try MPGPTWireTests.session(in: .serving)
        #expect(try session.requests(prefill(1), prefill(9), prefill(.max)).count == 3)
    }

    @Test func numbersRiseAcrossEpochs() throws {
        var session = try session(in: .serving)
        _ = try session.requests(prefill(5), .reset(Message.Reset(epoch: 6)))
        #expect(try session.requests(prefill(6, epoch: 6)).count == 1)
        #expect(try session.refusal(of: prefill(6, epoch: 6).frame) == .badRequest)
    }

    @Test func readyWithoutFactsBoundsNothing() throws {
        var session = try session(in: .loading)
        session.ready([:])
        let wide = values(tokens: 1, embed: 9, dtype: .float32)
        let reset = Message.reset(Message.Reset(epoch: epoch))
        #expect(try session.requests(reset, prefill(1, slot: .max, x: wide)).count == 1)
        #expect(try session.refusal(of: decode(2, slots: [1, 1]).frame) == .badRequest)
    }

    @Test func takesAsManyAsTheQueueHas() throws {
        var session = try session(in: .serving)
        let requests = try session.requests(prefill(1), prefill(2), prefill(3))
        session.result(requests[0], requests[0].x, computeNanoseconds: 0)
        #expect(try session.requests(prefill(4)).count == 1)
        #expect(try session.refusal(of: prefill(5).frame) == .busy)
    }

    @Test func aResetFreesTheQueue() throws {
        var session = try session(in: .serving)
        _ = try session.requests(prefill(1), prefill(2), prefill(3), .reset(Message.Reset(epoch: 6)))
        #expect(try session.requests(prefill(4, epoch: 6), prefill(5, epoch: 6), prefill(6, epoch: 6)).count == 3)
    }

    @Test(arguments: [ErrorCode.badPos, .computeFailed, .busy, .loadFailed]) func nothingIsSentAboutADroppedRequest(
        _ code: ErrorCode
    ) throws {
        var session = try session(in: .serving)
        let old = try session.requests(prefill(1), decode(2, slots: [0]))
        let new = try session.requests(.reset(Message.Reset(epoch: epoch)), prefill(3))
        session.result(old[0], old[0].x, computeNanoseconds: 0)
        session.error(code, "failed", for: old[1])
        #expect(session.out.isEmpty && !session.isOver)
        session.result(new[0], new[0].x, computeNanoseconds: 0)
        session.result(new[0], new[0].x, computeNanoseconds: 0)
        #expect(try messages(in: session.out).count == 1)
    }

    @Test(arguments: [ErrorCode.badPos, .computeFailed]) func goesOnAfterAnErrorInPlaceOfAResult(
        _ code: ErrorCode
    ) throws {
        var session = try session(in: .serving)
        let requests = try session.requests(prefill(1), prefill(2))
        session.error(code, "slot 0 holds 3 positions", for: requests[0])
        session.result(requests[1], requests[1].x, computeNanoseconds: 0)
        let sent = try messages(in: session.out)
        #expect(
            sent.first
                == .error(Message.Error(code: code, text: "slot 0 holds 3 positions", epoch: epoch, request: 1)))
        #expect(sent.count == 2 && sent[1].kind == .result)
        #expect(try session.requests(prefill(3)).count == 1)
    }

    @Test func anyOtherErrorIsTheEnd() throws {
        for (code, isAboutOne) in [(ErrorCode.computeFailed, false), (.loadFailed, false), (.busy, true)] {
            var session = try session(in: .serving)
            let request = try #require(try session.requests(prefill(1)).first)
            session.error(code, "no more", for: isAboutOne ? request : nil)
            #expect(session.isOver)
            #expect(try errors(in: session.out).first?.request == (isAboutOne ? 1 : 0))
            session.result(request, request.x, computeNanoseconds: 0)
            #expect(try messages(in: session.out).count == 1)
        }
    }

    @Test func aResultOfAnotherShapeIsAFailure() throws {
        var session = try session(in: .serving)
        let request = try #require(try session.requests(prefill(1)).first)
        session.result(request, values(tokens: 1), computeNanoseconds: 0)
        #expect(try errors(in: session.out).map(\.code) == [.computeFailed])
        #expect(!session.isOver)
    }

    @Test func theLongestRequestHasAResult() throws {
        var session = try session(in: .loading)
        session.ready([:])
        // 8 x 64 bytes of positions and 4 x 64 x 16381 of values, 4 x 64 bytes fewer than there is room for.
        let positions = (0..<UInt32(64)).map { Position(slot: $0, position: 0) }
        let x = values(tokens: 64, embed: 16381, dtype: .float32)
        let longest = Message.decode(Message.Decode(epoch: epoch, request: 1, positions: positions, x: x))
        #expect(Limits.request - (longest.frame.count - headerSize) < 4 * 64)
        let request = try #require(try session.requests(.reset(Message.Reset(epoch: epoch)), longest).first)
        session.out = []
        session.result(request, x, computeNanoseconds: 0)
        guard case .result(let result)? = try messages(in: session.out).first else {
            Issue.record("there is no RESULT")
            return
        }
        #expect(result.y == x)
    }
}
