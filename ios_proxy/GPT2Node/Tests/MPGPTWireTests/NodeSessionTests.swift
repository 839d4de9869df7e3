// The course of a connection, from the node's end: which message may come when, and who gets which ERROR.

import MPGPTWire
import Testing

@Suite struct NodeSessionTests {
    // MARK: - The whole way

    @Test func answersAtEachStage() throws {
        var session = newSession()
        #expect(try session.receive(nextFrame(in: .new), now: 0) == [])
        let proof = token.nodeProof(proxyNonce: proxyNonce, nodeNonce: nodeNonce)
        #expect(try sent(&session) == [.challenge(Message.Challenge(nonce: nodeNonce, proof: proof))])

        #expect(!session.isAuthenticated)
        #expect(try session.receive(nextFrame(in: .challenged), now: 0) == [.proof])
        #expect(session.isAuthenticated)
        #expect(try sent(&session) == [])
        session.admit()
        #expect(try sent(&session) == [.info(Message.Info(facts: ["name": "iPad"]))])

        #expect(try session.receive(nextFrame(in: .known), now: 0) == [.offer(offer)])
        session.want(offset: 0)
        #expect(try sent(&session) == [.want(Message.Want(offset: 0))])

        #expect(
            try session.receive(nextFrame(in: .receiving), now: 0)
                == [.data(Message.Data(offset: 0, piece: piece))])
        session.stored()
        #expect(try sent(&session) == [.stored(Message.Stored(bundle: digest))])

        #expect(try session.receive(nextFrame(in: .stored), now: 0) == [.load(Message.Load(bundle: digest))])
        session.loading("compiling")
        session.ready(readyFacts)
        #expect(
            try sent(&session)
                == [.loading(Message.Loading(text: "compiling")), .ready(Message.Ready(facts: readyFacts))])

        #expect(try session.receive(nextFrame(in: .loaded), now: 0) == [.reset(Message.Reset(epoch: epoch))])
        #expect(try sent(&session) == [])
    }

    @Test func readyAddsAQueue() throws {
        var session = try session(in: .loading)
        session.ready(["dtype": "float32"])
        #expect(try sent(&session) == [.ready(Message.Ready(facts: ["dtype": "float32", "queue": 8]))])
    }

    @Test func isTheSameHoweverBytesAreCut() throws {
        let stream = [Step.ping, .prefill(1), .decode(2), .reset, .prefill(3)].flatMap(\.frame)
        var whole = try session(in: .serving)
        var bytewise = whole
        let commands = try whole.receive(stream, now: 1)
        #expect(try stream.flatMap { try bytewise.receive([$0], now: 1) } == commands)
        #expect(commands.count == 4 && bytewise.out == whole.out)
    }

    private enum Step {
        case ping, reset
        case prefill(UInt32)
        case decode(UInt32)

        var frame: [UInt8] {
            switch self {
            case .ping: Message.ping(Message.Ping(number: 1)).frame
            case .reset: Message.reset(Message.Reset(epoch: epoch)).frame
            case .prefill(let number): MPGPTWireTests.prefill(number).frame
            case .decode(let number): MPGPTWireTests.decode(number, slots: [1, 3]).frame
            }
        }
    }

    // MARK: - Every message in every stage

    static let allowed: [Stage: Set<Kind>] = [
        .new: [.hello], .challenged: [.proof], .proved: [.ping], .known: [.offer, .ping], .offered: [.ping],
        .receiving: [.data, .ping], .received: [.ping], .stored: [.load, .ping], .loading: [.ping],
        .loaded: [.reset, .ping], .serving: [.reset, .prefill, .decode, .ping],
    ]

    @Test(arguments: Stage.allCases) func refusesWhatTheStageDoesNotAllow(_ stage: Stage) throws {
        for vector in Vector.all {
            let kind = try #require(Kind(rawValue: vector.frame[5]))
            guard kind != .error && kind != .bye else { continue }
            var session = try session(in: stage)
            let header = vector.frame.prefix(headerSize)
            if Self.allowed[stage, default: []].contains(kind) {
                #expect(try session.refusal(of: Array(header)) == nil, "\(vector.name)")
                #expect(!session.isOver)
            } else {
                #expect(try session.refusal(of: Array(header)) == .badState, "\(vector.name)")
                #expect(try sent(&session).count == 1)
                #expect(try session.receive(vector.frame, now: 0) == [] && session.out.isEmpty)
            }
        }
    }

    static let ends: [(message: Message, reason: SessionError.Reason)] = [
        (.bye, .bye),
        (.error(Message.Error(code: .badToken, text: "secret")), .received(.badToken)),
        (
            .error(Message.Error(code: ErrorCode(rawValue: 77), text: "secret")),
            .received(ErrorCode(rawValue: 77))
        ),
    ]

    @Test(arguments: Stage.allCases, ends) func answersNeitherErrorNorBye(
        _ stage: Stage, _ example: (message: Message, reason: SessionError.Reason)
    ) throws {
        var session = try session(in: stage)
        let end = #expect(throws: SessionError.self) { try session.receive(example.message.frame, now: 0) }
        #expect(end?.reason == example.reason)
        #expect(session.out.isEmpty && session.isOver)
        let isStranger = stage == .new || stage == .challenged
        #expect(end?.text.contains("secret") == (example.reason != .bye && !isStranger))
    }

    @Test(arguments: Stage.allCases) func answersAPingOnceProved(_ stage: Stage) throws {
        var session = try session(in: stage)
        let frame = Message.ping(Message.Ping(number: .max)).frame
        guard stage != .new && stage != .challenged else {
            #expect(try session.refusal(of: frame) == .badState)
            return
        }
        #expect(try session.receive(frame, now: 0) == [])
        #expect(try sent(&session) == [.pong(Message.Pong(number: .max, facts: ["thermal": "nominal"]))])
    }

    @Test(arguments: Stage.allCases) func refusesBadFrames(_ stage: Stage) throws {
        var damaged = Message.bye.frame
        damaged[31] ^= 1
        for (bytes, code) in [
            (Array("GET /".utf8), .badFrame), (Array("mpIP\u{2}".utf8), .badVersion),
            ([UInt8](repeating: 0, count: 40), .badFrame), (damaged, .badFrame),
        ] as [([UInt8], ErrorCode)] {
            var session = try session(in: stage)
            #expect(try session.refusal(of: bytes) == code)
        }
    }

    // MARK: - What is refused for what it says

    @Test func refusesAnotherToken() throws {
        var session = try session(in: .challenged)
        let own = token.nodeProof(proxyNonce: proxyNonce, nodeNonce: nodeNonce)
        #expect(try session.refusal(of: Message.proof(Message.Proof(proof: own)).frame) == .badToken)
        #expect(!session.isAuthenticated)
    }

    @Test(arguments: [
        Message.Data(offset: 1, piece: [1]), Message.Data(offset: 0, piece: [UInt8](repeating: 0, count: 13)),
        Message.Data(offset: .max, piece: [1]),
    ]) func refusesDataElsewhere(_ data: Message.Data) throws {
        var session = try session(in: .receiving)
        #expect(try session.refusal(of: Message.data(data).frame) == .badBundle)
    }

    @Test func takesUpABundleWhereItWasLeft() throws {
        var session = try session(in: .offered)
        session.want(offset: 5)
        let first = Message.data(Message.Data(offset: 5, piece: [1, 2])).frame
        let last = Message.data(Message.Data(offset: 7, piece: [3, 4, 5, 6, 7])).frame
        #expect(try session.receive(first + last, now: 0).count == 2)
        #expect(try session.refusal(of: Message.data(Message.Data(offset: 12, piece: [1])).frame) == .badState)
    }

    @Test func wantsNothingOfABundleThatIsHere() throws {
        var session = try session(in: .offered)
        session.want(offset: 12)
        session.stored()
        #expect(
            try sent(&session) == [.want(Message.Want(offset: 12)), .stored(Message.Stored(bundle: digest))])
        #expect(try session.receive(nextFrame(in: .stored), now: 0).count == 1)
    }

    @Test func takesNoBytesOfAnOfferBeyondAllNumbers() throws {
        var session = try session(in: .known)
        var huge = offer
        huge.files = [.max, .max].map { Message.File(name: "x", length: $0, sha256: digest) }
        #expect(try session.receive(Message.offer(huge).frame, now: 0) == [.offer(huge)])
        session.want(offset: .max - 3)
        let frame = Message.data(Message.Data(offset: .max - 3, piece: [1, 2, 3, 4])).frame
        #expect(try session.refusal(of: frame) == .badBundle)
    }

    @Test func refusesToLoadAnotherBundle() throws {
        var session = try session(in: .stored)
        #expect(try session.refusal(of: Message.load(Message.Load(bundle: nodeNonce)).frame) == .badBundle)
    }

    @Test func mayRefuseAProxyThatProvedItself() throws {
        var session = try session(in: .proved)
        session.error(.busy, "another proxy is served")
        #expect(try errors(in: session.out).map(\.code) == [.busy])
        #expect(session.isOver && session.isAuthenticated)
        session.admit()
        #expect(try errors(in: session.out).count == 1)
    }

    @Test func saysGoodByeOnlyToWhoeverIsProved() throws {
        for stage in Stage.allCases {
            var session = try session(in: stage)
            session.bye()
            session.bye()
            let isStranger = stage == .new || stage == .challenged
            #expect(try sent(&session) == (isStranger ? [] : [.bye]))
            #expect(session.isOver)
        }
    }

    // MARK: - Times

    @Test func isLateWithItsProof() throws {
        var session = newSession(now: 100)
        _ = try session.receive(nextFrame(in: .new), now: 109)
        #expect(!session.isLate(110) && session.isLate(110.1))
        _ = try session.receive(nextFrame(in: .challenged), now: 110)
        #expect(!session.isLate(140) && session.isLate(140.1))
        _ = try session.receive([0x6d], now: 150)
        #expect(session.lastHeard == 150 && !session.isLate(180) && session.isLate(180.1))
        _ = try session.receive([], now: 170)
        #expect(session.lastHeard == 150)
    }

    private func sent(_ session: inout NodeSession) throws -> [Message] {
        defer { session.out = [] }
        return try messages(in: session.out)
    }
}
