// The golden frames of `tests/golden/ipad.json`: the bytes that Python writes, and what it says is in them.

import MPGPTWire
import Testing

@Suite struct GoldenTests {
    @Test func hasEveryKind() {
        #expect(Set(Vector.all.map { $0.frame[5] }) == Set(Kind.allCases.map(\.rawValue)))
    }

    @Test(arguments: Vector.all) func holdsInBothDirections(_ vector: Vector) throws {
        let message = try #require(try messages(in: vector.frame).first)
        #expect(message.fields == vector.fields)
        #expect(message.frame == vector.frame)
        #expect(vector.name.hasPrefix(message.kind.name))
    }
}

extension Message {
    /// The message as the golden file tells it.
    fileprivate var fields: JSONObject {
        switch self {
        case .hello(let hello): ["nonce": told(hello.nonce)]
        case .challenge(let challenge): ["nonce": told(challenge.nonce), "proof": told(challenge.proof)]
        case .proof(let proof): ["proof": told(proof.proof)]
        case .info(let info): ["facts": .object(info.facts)]
        case .offer(let offer): ["bundle": told(offer.bundle), "files": .array(offer.files.map(told))]
        case .want(let want): ["offset": told(want.offset)]
        case .data(let data): ["offset": told(data.offset), "piece": .string(data.piece.hex)]
        case .stored(let stored): ["bundle": told(stored.bundle)]
        case .load(let load): ["bundle": told(load.bundle)]
        case .loading(let loading): ["text": .string(loading.text)]
        case .ready(let ready): ["facts": .object(ready.facts)]
        case .reset(let reset): ["epoch": told(reset.epoch)]
        case .prefill(let prefill): told(.prefill(prefill))
        case .decode(let decode): told(.decode(decode))
        case .result(let result):
            [
                "epoch": told(result.epoch), "request": told(result.request), "positions": told(result.positions),
                "compute_ns": told(result.computeNanoseconds), "y": told(result.y),
            ]
        case .error(let error):
            [
                "code": .string("\(error.code)"), "text": .string(error.text), "epoch": told(error.epoch),
                "request": told(error.request),
            ]
        case .ping(let ping): ["number": told(ping.number)]
        case .pong(let pong): ["number": told(pong.number), "facts": .object(pong.facts)]
        case .bye: [:]
        }
    }
}

private func told(_ request: Request) -> JSONObject {
    [
        "epoch": told(request.epoch), "request": told(request.number), "positions": told(request.positions),
        "x": told(request.x),
    ]
}

private func told(_ bytes: Bytes32) -> JSONValue { .string(bytes.description) }

private func told(_ number: some UnsignedInteger) -> JSONValue { .integer(Int(number)) }

private func told(_ file: Message.File) -> JSONValue {
    ["name": .string(file.name), "length": told(file.length), "sha256": told(file.sha256)]
}

private func told(_ positions: [Position]) -> JSONValue {
    .array(positions.map { [told($0.slot), told($0.position)] })
}

private func told(_ values: Values) -> JSONValue {
    var reader = ByteReader(values.bytes)
    let rows = (0..<values.tokens).map { _ in
        JSONValue.array((0..<values.embed).map { _ in .number(number(values.dtype, &reader)) })
    }
    return ["dtype": .string(values.dtype.name), "values": .array(rows)]
}

/// The next number; of float16 only those that are normal, which is all that the golden file has.
private func number(_ dtype: DType, _ reader: inout ByteReader) -> Double {
    guard dtype == .float16 else { return Double(Float(bitPattern: reader.integer() ?? 0)) }
    let bits: UInt16 = reader.integer() ?? 0
    let significand = 1 + Double(bits & 0x3ff) / 1024
    return Double(
        sign: bits >> 15 == 0 ? .plus : .minus, exponent: Int(bits >> 10 & 31) - 15, significand: significand)
}
