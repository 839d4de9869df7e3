// What the tests share: the golden file, frames as a liar would send them, sessions in every state.
//
// Knows: the golden file's place in the repository, the messages that bring a session into a state.
// Must not know: what any test expects.

import Foundation
import MPGPTWire
import Testing

struct Vector: Sendable, CustomTestStringConvertible {
    let name: String
    let fields: JSONObject
    let frame: [UInt8]

    var testDescription: String { name }

    /// The frames of `tests/golden/ipad.json`, which the Python side wrote.
    static let all: [Vector] = {
        var root = URL(filePath: #filePath)
        for _ in 0..<5 { root.deleteLastPathComponent() }
        do {
            let golden = try JSONObject(parsing: Data(contentsOf: root.appending(path: "tests/golden/ipad.json")))
            return (golden["frames"]?.array ?? []).compactMap { entry in
                guard let entry = entry.object, let name = entry["name"]?.string, let fields = entry["fields"]?.object,
                    let frame = entry["frame"]?.string.flatMap([UInt8].init(hex:))
                else { return nil }
                return Vector(name: name, fields: fields, frame: frame)
            }
        } catch {
            fatalError("the golden file: \(error)")
        }
    }()

    static func frame(_ name: String) -> [UInt8] {
        all.first { $0.name == name }?.frame ?? []
    }
}

let headerSize = 32

/// The same frame with the length and the checksum that fit it.
func sealed(_ frame: [UInt8]) -> [UInt8] {
    var frame = frame
    frame.replaceSubrange(24..<28, with: littleEndian(UInt32(frame.count - headerSize)))
    return checksummed(frame)
}

/// The same frame with the checksum that fits it.
func checksummed(_ frame: [UInt8]) -> [UInt8] {
    var frame = frame
    frame.replaceSubrange(28..<32, with: [0, 0, 0, 0])
    var crc = CRC32()
    crc.update(frame)
    frame.replaceSubrange(28..<32, with: littleEndian(crc.value))
    return frame
}

func littleEndian<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.append(littleEndian: value)
    return bytes
}

/// All messages in whole frames.
func messages(in bytes: [UInt8]) throws -> [Message] {
    var frames = Frames()
    frames.feed(bytes)
    var messages: [Message] = []
    while let message = try frames.next() {
        messages.append(message)
    }
    return messages
}

func errors(in bytes: [UInt8]) throws -> [Message.Error] {
    try messages(in: bytes).compactMap { if case .error(let error) = $0 { error } else { nil } }
}

// MARK: - Sessions

/// The states of the page's table, and those in which the driver is at work.
enum Stage: Int, CaseIterable, Sendable {
    case new, challenged, proved, known, offered, receiving, received, stored, loading, loaded, serving
}

let token = Token(Array("the shared token".utf8))!
let proxyNonce = Bytes32([UInt8](repeating: 0, count: 32))!
let nodeNonce = Bytes32([UInt8](0..<32))!
let digest = Bytes32([UInt8](32..<64))!
let piece = Array("twelve bytes".utf8)
let offer = Message.Offer(
    bundle: digest, files: [Message.File(name: BundleFile.manifest, length: 12, sha256: digest)])
let readyFacts: JSONObject = ["dtype": "float16", "queue": 3, "embed": 2, "slots": 4]
let epoch: UInt32 = 5

func newSession(now: Double = 0) -> NodeSession {
    NodeSession(token: token, nonce: nodeNonce, now: now, facts: ["name": "iPad"]) { ["thermal": "nominal"] }
}

/// What the proxy sends in a stage that waits for it; it leads to the next.
func nextFrame(in stage: Stage) -> [UInt8] {
    let proof = token.proxyProof(proxyNonce: proxyNonce, nodeNonce: nodeNonce)
    return switch stage {
    case .new: Message.hello(Message.Hello(nonce: proxyNonce)).frame
    case .challenged: Message.proof(Message.Proof(proof: proof)).frame
    case .known: Message.offer(offer).frame
    case .receiving: Message.data(Message.Data(offset: 0, piece: piece)).frame
    case .stored: Message.load(Message.Load(bundle: digest)).frame
    case .loaded: Message.reset(Message.Reset(epoch: epoch)).frame
    case .proved, .offered, .received, .loading, .serving: []
    }
}

/// A session in a stage, whose `out` is empty.
func session(in stage: Stage) throws -> NodeSession {
    var session = newSession()
    for earlier in Stage.allCases where earlier.rawValue < stage.rawValue {
        _ = try session.receive(nextFrame(in: earlier), now: 0)
        switch earlier {
        case .proved: session.admit()
        case .offered: session.want(offset: 0)
        case .received: session.stored()
        case .loading: session.ready(readyFacts)
        default: break
        }
    }
    session.out = []
    return session
}

func values(tokens: Int, embed: Int = 2, dtype: DType = .float16) -> Values {
    let bytes = (0..<tokens * embed * dtype.size).map { UInt8(truncatingIfNeeded: $0) }
    return Values(dtype: dtype, tokens: tokens, embed: embed, bytes: bytes)!
}

func prefill(_ number: UInt32, epoch: UInt32 = epoch, slot: UInt32 = 0, x: Values = values(tokens: 2)) -> Message {
    .prefill(
        Message.Prefill(epoch: epoch, request: number, position: Position(slot: slot, position: 7), x: x))
}

func decode(_ number: UInt32, epoch: UInt32 = epoch, slots: [UInt32]) -> Message {
    .decode(
        Message.Decode(
            epoch: epoch, request: number, positions: slots.map { Position(slot: $0, position: 9) },
            x: values(tokens: slots.count)))
}

extension NodeSession {
    /// Takes messages, and returns the requests among them.
    mutating func requests(_ messages: Message...) throws -> [Request] {
        try receive(messages.flatMap(\.frame), now: 0).compactMap {
            if case .request(let request) = $0 { request } else { nil }
        }
    }

    /// The code of the ERROR that ends the session when it receives some bytes, and that it sends; nil if it goes on.
    mutating func refusal(of bytes: [UInt8]) throws -> ErrorCode? {
        let before = out.count
        do {
            _ = try receive(bytes, now: 0)
            return nil
        } catch {
            guard case .refused(let code) = error.reason else { throw error }
            let sent = try errors(in: Array(out[before...]))
            return isOver && sent.last?.code == code ? code : nil
        }
    }
}
