// A NodeSession for tests in other languages: a session's steps in, what it did out, as lines of JSON.
//
// Knows: the lines below.
// Must not know: sockets, clocks, files; it is no node.
//
// Each line of stdin is one object, and a session of its own:
//
//     {"token": hex, "nonce": hex, "facts": {...}, "health": {...}, "steps": [step, ...]}
//
// The session begins at `now` 0. `facts` are INFO's, `health` is PONG's, and either may be absent. A step is one of:
//
//     {"now": 1.5, "bytes": hex}          bytes from the proxy
//     {"do": "admit"}
//     {"do": "want", "offset": n}
//     {"do": "stored"}
//     {"do": "loading", "text": text}
//     {"do": "ready", "facts": {...}}
//     {"do": "result", "request": i, "y": hex, "ns": n}
//     {"do": "error", "code": "BAD_POS", "text": text, "request": i or null}
//     {"do": "bye"}
//
// Request i is the i-th request among the commands so far, from 0 on; `y` has its shape. A step that the session's
// state does not allow is a mistake of the test, and may kill the probe; one after the end of the session is ignored.
// Each line of stdout is one object:
//
//     {"commands": [command, ...], "out": hex, "closed": null or closed}
//
// `commands` are those of all steps. When bytes end the session, the commands of that step are not there:
//
//     {"command": "proof"}
//     {"command": "offer", "bundle": hex, "files": [{"name": text, "length": n, "sha256": hex}, ...]}
//     {"command": "data", "offset": n, "piece": hex}
//     {"command": "load", "bundle": hex}
//     {"command": "reset", "epoch": n}
//     {"command": "prefill" or "decode", "epoch": n, "request": n, "positions": [[slot, position], ...],
//      "dtype": "float16" or "float32", "tokens": n, "embed": n, "x": hex}
//
// `out` is all that was sent. `closed` is {"code": code, "by": "node" or "proxy"}: the ERROR that was sent or that
// came, by its name, or its number where it has none, or "BYE". Integers above 2^63 - 1 are written as strings.
//
// A line that cannot be read gives {"problem": text}. Every answer is written before the next line is read.

import Foundation
import MPGPTWire

struct Problem: Error {
    let text: String
}

while let line = readLine() {
    let answer: JSONObject
    do {
        answer = try run(JSONObject(parsing: line.utf8))
    } catch let problem as Problem {
        answer = ["problem": .string(problem.text)]
    } catch {
        answer = ["problem": .string("\(error)")]
    }
    print(String(decoding: answer.encoded, as: UTF8.self))
    fflush(nil)
}

func run(_ line: JSONObject) throws -> JSONObject {
    guard let token = try Token(line.bytes("token")), let nonce = try Bytes32(line.bytes("nonce")) else {
        throw Problem(text: "a token or a nonce of the wrong length")
    }
    let health = line["health"]?.object ?? [:]
    var probe = Probe(
        session: NodeSession(token: token, nonce: nonce, now: 0, facts: line["facts"]?.object ?? [:]) { health })
    for step in line["steps"]?.array ?? [] where !probe.session.isOver {
        guard let step = step.object else { throw Problem(text: "a step that is no object") }
        try probe.take(step)
    }
    return probe.answer
}

struct Probe {
    var session: NodeSession
    var commands: [Command] = []
    var closed: JSONValue = .null

    var requests: [Request] {
        commands.compactMap { if case .request(let request) = $0 { request } else { nil } }
    }

    var answer: JSONObject {
        ["commands": .array(commands.map(described)), "out": .string(session.out.hex), "closed": closed]
    }

    mutating func take(_ step: JSONObject) throws {
        guard let action = step["do"]?.string else { return try receive(step) }
        switch action {
        case "admit": session.admit()
        case "want": session.want(offset: UInt64(try step.count("offset")))
        case "stored": session.stored()
        case "loading": session.loading(try step.text("text"))
        case "ready": session.ready(step["facts"]?.object ?? [:])
        case "result": try sendResult(step)
        case "error": try sendError(step)
        case "bye":
            session.bye()
            closed = ["code": "BYE", "by": "node"]
        default: throw Problem(text: "an unknown step")
        }
    }

    private mutating func receive(_ step: JSONObject) throws {
        let now = step["now"]?.number ?? session.lastHeard
        do {
            commands += try session.receive(step.bytes("bytes"), now: now)
        } catch let end as SessionError {
            closed =
                switch end.reason {
                case .refused(let code): ["code": described(code), "by": "node"]
                case .received(let code): ["code": described(code), "by": "proxy"]
                case .bye: ["code": "BYE", "by": "proxy"]
                }
        }
    }

    private mutating func sendResult(_ step: JSONObject) throws {
        let request = try request(step.count("request"))
        let x = request.x
        guard let y = Values(dtype: x.dtype, tokens: x.tokens, embed: x.embed, bytes: try step.bytes("y")) else {
            throw Problem(text: "a result that has not the shape of its request")
        }
        session.result(request, y, computeNanoseconds: UInt64(try step.count("ns")))
    }

    private mutating func sendError(_ step: JSONObject) throws {
        guard let code = ErrorCode(name: try step.text("code")) else { throw Problem(text: "an unknown code") }
        let request = try step["request"]?.integer.map(request)
        session.error(code, try step.text("text"), for: request)
        if session.isOver { closed = ["code": described(code), "by": "node"] }
    }

    private func request(_ index: Int) throws -> Request {
        guard requests.indices.contains(index) else { throw Problem(text: "no request \(index)") }
        return requests[index]
    }
}

// MARK: - JSON in

extension JSONObject {
    func text(_ key: String) throws -> String {
        guard let text = self[key]?.string else { throw Problem(text: "no text \"\(key)\"") }
        return text
    }

    func bytes(_ key: String) throws -> [UInt8] {
        guard let bytes = [UInt8](hex: try text(key)) else { throw Problem(text: "\"\(key)\" is not hex") }
        return bytes
    }

    func count(_ key: String) throws -> Int {
        guard let count = self[key]?.integer, count >= 0 else { throw Problem(text: "no number \"\(key)\"") }
        return count
    }
}

// MARK: - JSON out

func described(_ command: Command) -> JSONValue {
    switch command {
    case .proof: ["command": "proof"]
    case .offer(let offer):
        ["command": "offer", "bundle": .string(offer.bundle.description), "files": .array(offer.files.map(described))]
    case .data(let data):
        ["command": "data", "offset": described(data.offset), "piece": .string(data.piece.hex)]
    case .load(let load): ["command": "load", "bundle": .string(load.bundle.description)]
    case .reset(let reset): ["command": "reset", "epoch": described(UInt64(reset.epoch))]
    case .request(let request): described(request)
    }
}

func described(_ request: Request) -> JSONValue {
    let name =
        switch request {
        case .prefill: "prefill"
        case .decode: "decode"
        }
    let positions = request.positions.map { position -> JSONValue in
        [described(UInt64(position.slot)), described(UInt64(position.position))]
    }
    return [
        "command": .string(name), "epoch": described(UInt64(request.epoch)),
        "request": described(UInt64(request.number)), "positions": .array(positions),
        "dtype": .string(request.x.dtype.name), "tokens": .integer(request.x.tokens),
        "embed": .integer(request.x.embed), "x": .string(request.x.bytes.hex),
    ]
}

func described(_ file: Message.File) -> JSONValue {
    ["name": .string(file.name), "length": described(file.length), "sha256": .string(file.sha256.description)]
}

func described(_ number: UInt64) -> JSONValue {
    Int(exactly: number).map(JSONValue.integer) ?? .string(String(number))
}

func described(_ code: ErrorCode) -> JSONValue {
    code.name.map(JSONValue.string) ?? .integer(Int(code.rawValue))
}
