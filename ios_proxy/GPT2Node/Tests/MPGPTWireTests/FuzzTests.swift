// Bytes that nobody would send: whatever comes, nothing traps, and what is accepted means what it says.
//
// MPGPT_FUZZ in the environment sets how many frames are tried, MPGPT_FUZZ_SEED where the dice begin.

import Dice
import Foundation
import MPGPTWire
import Testing

@Suite struct FuzzTests {
    private static let count = setting("MPGPT_FUZZ") ?? 100_000
    private static let seed = UInt64(setting("MPGPT_FUZZ_SEED") ?? 1)

    private static func setting(_ name: String) -> Int? {
        ProcessInfo.processInfo.environment[name].flatMap { Int($0) }
    }

    /// A frame that is accepted is written again as it came, but for its texts and its JSON, which have several forms.
    @Test func framesMeanWhatTheySay() throws {
        var dice = Dice(state: Self.seed)
        var accepted = 0
        for _ in 0..<Self.count / 2 {
            let frame = mutated(dice.pick(Vector.all).frame, &dice)
            guard let message = try? messages(in: frame).first else { continue }
            accepted += 1
            let again = message.frame
            switch message.kind {
            case .info, .ready, .pong, .loading, .error: #expect(try messages(in: again) == [message])
            default: #expect(frame.starts(with: again))
            }
        }
        #expect(accepted > Self.count / 100)
    }

    @Test func sessionsEndWithOneError() throws {
        var dice = Dice(state: ~Self.seed)
        let sessions = try Stage.allCases.map { ($0, try session(in: $0)) }
        for _ in 0..<Self.count / 4 {
            let (stage, session) = dice.pick(sessions)
            let start = dice.below(2) == 0 ? nextFrame(in: stage) : dice.pick(Vector.all).frame
            let bytes = mutated(start, &dice) + mutated(dice.pick(Vector.all).frame, &dice)
            var whole = session
            var pieces = session
            let ends = try end(of: &whole, receiving: [bytes[...]])
            #expect(try end(of: &pieces, receiving: cut(bytes, &dice)) == ends)
            #expect(pieces.out == whole.out)
            let sent = try errors(in: whole.out)
            if case .refused(let code) = ends { #expect(sent.map(\.code) == [code]) } else { #expect(sent.isEmpty) }
        }
    }

    @Test func jsonIsReadOrRefused() throws {
        var dice = Dice(state: Self.seed &+ 1)
        let texts = [
            "{\"a\":[1,-2.5e-7,true,null],\"b\\u00e9\\ud83d\\ude00\":{\"\":\"\\n\"}}", "[[[[[[[[1]]]]]]]]",
            "{\"dtype\":\"float16\",\"queue\":8,\"load_s\":12.25}",
        ]
        for _ in 0..<Self.count / 4 {
            var text = Array(dice.pick(texts).utf8)
            for _ in 0...dice.below(3) { mutate(&text, &dice) }
            guard let value = try? JSONValue(parsing: text) else { continue }
            #expect(try JSONValue(parsing: value.encoded).encoded == value.encoded)
        }
    }

    @Test func offersAreTakenOrRefused() {
        var dice = Dice(state: Self.seed &+ 2)
        let names = ["manifest.json", "model.mlpackage/a", "model.mlpackage/a/b", "selftest.safetensors"]
        for _ in 0..<Self.count / 20 {
            let files = (0..<dice.below(6)).map { _ in
                var name = Array(dice.pick(names).utf8)
                if dice.below(4) == 0 { mutate(&name, &dice) }
                return Message.File(
                    name: String(decoding: name, as: UTF8.self), length: dice.next() >> dice.below(64), sha256: digest)
            }
            let offer = Message.Offer(bundle: Message.Offer.hash(of: files), files: files)
            guard (try? offer.check()) != nil else { continue }
            #expect(files.count >= 3 && (offer.length ?? .max) <= Limits.bundle)
        }
    }

    private func end(
        of session: inout NodeSession, receiving pieces: [ArraySlice<UInt8>]
    ) throws -> SessionError.Reason? {
        do {
            for piece in pieces {
                _ = try session.receive(piece, now: 0)
            }
            return nil
        } catch {
            return error.reason
        }
    }

    private func cut(_ bytes: [UInt8], _ dice: inout Dice) -> [ArraySlice<UInt8>] {
        var pieces: [ArraySlice<UInt8>] = []
        var rest = bytes[...]
        while !rest.isEmpty {
            let size = dice.below(4) == 0 ? 1 : 1 + dice.below(rest.count)
            pieces.append(rest.prefix(size))
            rest = rest.dropFirst(size)
        }
        return pieces
    }
}
