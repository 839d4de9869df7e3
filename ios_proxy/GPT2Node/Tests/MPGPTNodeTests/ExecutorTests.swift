// The executor: what a package is given, bit for bit as Python gives it, and what slots hold after a failure.

import MPGPTWire
import Testing

@testable import MPGPTNode

@Suite struct ExecutorTests {
    @Test(arguments: [0, 1]) func asPythonGivesIt(run: Int) throws {
        let section = try #require(golden("inputs").array?[run])
        let predictor = Recording()
        let executor = Executor(predictor: predictor, manifest: try sizes(section))
        for call in try #require(section["calls"]?.array) {
            predictor.calls = []
            let x = try #require(call["x"]?.hexBytes)
            let code = try outcome(of: call, x, executor)
            #expect(code == call["code"]?.string)
            #expect(executor.filled == call["filled"]?.integers)
            let given = try #require(call["given"]?.array)
            #expect(predictor.calls.map(\.function.rawValue) == given.compactMap { $0["function"]?.string })
            for (got, wanted) in zip(predictor.calls, given) {
                try compare(got.inputs, try #require(wanted["inputs"]?.object))
            }
        }
    }

    private func sizes(_ section: JSONValue) throws -> Manifest {
        var changes = try #require(section["sizes"]?.object)
        changes["rotary"] = section["rotary"]
        return try manifest(changes)
    }

    /// Makes a call, whose answer must be x; returns the code where there is none.
    private func outcome(of call: JSONValue, _ x: [UInt8], _ executor: Executor) throws -> String? {
        let (slots, positions) = (try #require(call["slots"]?.integers), try #require(call["positions"]?.integers))
        do {
            let y = slots.count == 1
                ? try executor.prefill(slot: slots[0], position: positions[0], x: x, tokens: x.count / 8)
                : try executor.decode(slots: slots, positions: positions, x: x)
            #expect(y == x)
            return nil
        } catch ComputeError.badPosition {
            return "BAD_POS"
        }
    }

    private func compare(_ got: Inputs, _ wanted: JSONObject) throws {
        #expect(got.keys.sorted() == wanted.members.map(\.key))
        for member in wanted.members {
            let tensor = try #require(got[member.key])
            let bytes = try #require(member.value["bytes"]?.hexBytes)
            #expect(tensor.shape == member.value["shape"]?.integers)
            #expect(tensor.dtype == (["pos", "row"].contains(member.key) ? .int32 : .float16))
            if ["cos", "sin"].contains(member.key) {
                let off = zip(ordered(tensor.bytes), ordered(bytes)).map { abs($0 - $1) }
                #expect(tensor.bytes.count == bytes.count && off.max() ?? 0 <= 1, "\(member.key)")
            } else {
                #expect(tensor.bytes == bytes, "\(member.key)")
            }
        }
    }

    /// float16 values as integers, of which neighbours differ by 1.
    private func ordered(_ bytes: [UInt8]) -> [Int] {
        stride(from: 0, to: bytes.count, by: 2).map { at in
            let magnitude = Int(bytes[at]) + Int(bytes[at + 1] & 0x7f) << 8
            return bytes[at + 1] & 0x80 == 0 ? magnitude : -magnitude
        }
    }

    @Test func oneTokenOfOneSlotIsAStepWhateverItIsOf() throws {
        let predictor = Recording()
        let executor = Executor(predictor: predictor, manifest: try manifest())
        _ = try executor.prefill(slot: 2, position: 0, x: halves(0..<20), tokens: 5)
        _ = try executor.prefill(slot: 1, position: 0, x: halves(0..<4), tokens: 1)
        #expect(try executor.decode(slots: [2], positions: [5], x: halves(4..<8)) == halves(4..<8))
        #expect(predictor.calls.map(\.function) == [.prefill, .step, .step, .step])
        let inputs = try #require(predictor.calls.last?.inputs)
        #expect(inputs.keys.sorted() == ["mask", "pos", "row", "x"])
        #expect(inputs["x"] == Tensor(shape: [1, 4, 1, 1], dtype: .float16, bytes: halves(4..<8)))
        #expect(inputs["pos"]?.integers == [5] && inputs["row"]?.integers == [4])
        let mask = [UInt16](repeating: 0, count: 6) + [UInt16](repeating: 0xf0e2, count: 6)
        #expect(inputs["mask"] == Tensor(shape: [1, 1, 1, 12], float16: mask))
        predictor.calls = []
        _ = try executor.decode(slots: [2, 1], positions: [6, 1], x: halves(0..<8))
        _ = try executor.prefill(slot: 2, position: 7, x: halves(0..<12), tokens: 3)
        _ = try executor.prefill(slot: 2, position: 9, x: halves(0..<12), tokens: 3)
        #expect(predictor.calls.map(\.function) == [.decode, .prefill, .step, .step, .step], "no chunk fits behind 9")
    }

    // MARK: - Failures

    @Test func afterAFailureASlotIsFilledToWhereTheRequestBegins() throws {
        let predictor = Recording()
        let executor = Executor(predictor: predictor, manifest: try manifest())
        _ = try executor.prefill(slot: 0, position: 0, x: halves(0..<24), tokens: 6)
        _ = try executor.prefill(slot: 1, position: 0, x: halves(0..<8), tokens: 2)
        predictor.failure = predictor.calls.count + 1
        #expect(throws: ComputeError.failed("no more")) {
            try executor.prefill(slot: 0, position: 3, x: halves(0..<32), tokens: 8)
        }
        #expect(executor.filled == [3, 2, 0])
        predictor.failure = predictor.calls.count
        #expect(throws: ComputeError.failed("no more")) {
            try executor.decode(slots: [1, 0], positions: [1, 3], x: halves(0..<8))
        }
        #expect(executor.filled == [3, 1, 0])
        #expect(try executor.decode(slots: [1, 0], positions: [1, 3], x: halves(0..<8)) == halves(0..<8))
        #expect(executor.filled == [4, 2, 0])
        try executor.reset()
        #expect(executor.filled == [0, 0, 0] && predictor.resets == 1)
    }

    @Test func badPositionsLeaveEverythingAsItWas() throws {
        let predictor = Recording()
        let executor = Executor(predictor: predictor, manifest: try manifest())
        _ = try executor.prefill(slot: 0, position: 0, x: halves(0..<8), tokens: 2)
        let error = try #require(throws: ComputeError.self) {
            try executor.decode(slots: [0, 1], positions: [1, 1], x: halves(0..<8))
        }
        #expect(error == .badPosition("slot 1 holds 0 of 12 positions: 1 at 1 cannot follow"))
        for (position, tokens) in [(-1, 1), (3, 1), (2, 11), (0, 13), (Int.max, 1), (Int.min, 1)] {
            let error = try #require(throws: ComputeError.self) {
                try executor.prefill(slot: 0, position: position, x: halves(0..<4 * tokens), tokens: tokens)
            }
            guard case .badPosition = error else { Issue.record("\(error)"); continue }
        }
        #expect(executor.filled == [2, 0, 0] && predictor.calls.count == 1)
    }

    @Test func whatNoRequestMayBe() throws {
        let predictor = Recording()
        let executor = Executor(predictor: predictor, manifest: try manifest())
        let x = halves(0..<8)
        for (slots, positions, values) in [
            ([0, 0], [0, 0], x), ([0], [0, 0], x), ([3], [0], halves(0..<4)), ([-1], [0], halves(0..<4)), ([], [], []),
            ([0, 1], [0, 0], halves(0..<4)), ([0, 1], [0, 0], Array(x.dropLast())),
        ] {
            let error = try #require(throws: ComputeError.self) {
                try executor.decode(slots: slots, positions: positions, x: values)
            }
            guard case .failed = error else { Issue.record("\(error)"); continue }
        }
        for tokens in [0, -1, 1, 3, Int.max] {
            #expect(throws: ComputeError.self) { try executor.prefill(slot: 0, position: 0, x: x, tokens: tokens) }
        }
        #expect(predictor.calls.isEmpty && executor.filled == [0, 0, 0])
    }

    // MARK: - Outputs

    @Test func float32IsRounded() throws {
        let predictor = Recording()
        predictor.answer = { x in
            let floats = stride(from: 0, to: x.bytes.count, by: 2).map {
                2 * Half.float(UInt16(x.bytes[$0]) | UInt16(x.bytes[$0 + 1]) << 8)
            }
            return Tensor(shape: x.shape, float32: floats)
        }
        let executor = Executor(predictor: predictor, manifest: try manifest())
        let y = try executor.prefill(slot: 0, position: 0, x: halves(0..<24), tokens: 6)
        #expect(y == halves((0..<24).map { 2 * $0 }))
        let large = Tensor(shape: [], float16: [0x7bff, 0xfbff, 0x7e00, 0]).bytes
        let doubled = Tensor(shape: [], float16: [0x7c00, 0xfc00, 0x7e00, 0]).bytes
        #expect(try executor.decode(slots: [2], positions: [0], x: large) == doubled, "infinite or NaN, as it came")
    }

    @Test func outputsOfAnotherShape() throws {
        let predictor = Recording()
        let executor = Executor(predictor: predictor, manifest: try manifest())
        let wrong: [(Tensor) -> Tensor] = [
            { Tensor(shape: $0.shape.reversed(), dtype: $0.dtype, bytes: $0.bytes) },
            { Tensor(shape: $0.shape, dtype: $0.dtype, bytes: $0.bytes.dropLast()) },
            { Tensor(shape: $0.shape, dtype: .float32, bytes: $0.bytes) },
            { Tensor(shape: $0.shape, dtype: .int32, bytes: $0.bytes + $0.bytes) },
            { Tensor(shape: [], dtype: .float16, bytes: Array($0.bytes.prefix(2))) },
        ]
        for answer in wrong {
            predictor.answer = answer
            #expect(throws: ComputeError.self) {
                try executor.prefill(slot: 0, position: 0, x: halves(0..<8), tokens: 2)
            }
            for slots in [[1], [1, 2]] {
                let x = halves(0..<4 * slots.count)
                #expect(throws: ComputeError.self) {
                    try executor.decode(slots: slots, positions: slots.map { _ in 0 }, x: x)
                }
            }
        }
    }
}
