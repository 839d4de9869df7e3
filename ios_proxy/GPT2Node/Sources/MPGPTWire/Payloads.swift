// The payloads of frames: every message as a header and bytes, and back.
//
// Knows: how each kind's payload is laid out, the bounds of what is counted inside it.
// Must not know: how a frame is found in a stream, checked or cut (`Frames.swift`).

extension Message {
    public var kind: Kind {
        switch self {
        case .hello: .hello
        case .challenge: .challenge
        case .proof: .proof
        case .info: .info
        case .offer: .offer
        case .want: .want
        case .data: .data
        case .stored: .stored
        case .load: .load
        case .loading: .loading
        case .ready: .ready
        case .reset: .reset
        case .prefill: .prefill
        case .decode: .decode
        case .result: .result
        case .error: .error
        case .ping: .ping
        case .pong: .pong
        case .bye: .bye
        }
    }
}

// MARK: - Messages to payloads

extension Message {
    var header: Header {
        switch self {
        case .offer(let offer):
            Header(kind: kind, rows: UInt16(clamping: offer.files.count))
        case .reset(let reset):
            Header(kind: kind, epoch: reset.epoch)
        case .prefill(let prefill):
            Header(kind: kind, epoch: prefill.epoch, request: prefill.request, rows: 1, values: prefill.x)
        case .decode(let decode):
            Header(
                kind: kind, epoch: decode.epoch, request: decode.request, rows: decode.positions.count,
                values: decode.x)
        case .result(let result):
            Header(
                kind: kind, epoch: result.epoch, request: result.request, rows: result.positions.count,
                values: result.y)
        case .error(let error):
            Header(kind: kind, epoch: error.epoch, request: error.request)
        default:
            Header(kind: kind)
        }
    }

    var payload: [UInt8] {
        switch self {
        case .hello(let hello): hello.nonce.bytes
        case .challenge(let challenge): challenge.nonce.bytes + challenge.proof.bytes
        case .proof(let proof): proof.proof.bytes
        case .info(let info): info.facts.encoded
        case .offer(let offer): offer.bundle.bytes + offer.files.flatMap(\.bytes)
        case .want(let want): littleEndian(want.offset)
        case .data(let data): littleEndian(data.offset) + data.piece
        case .stored(let stored): stored.bundle.bytes
        case .load(let load): load.bundle.bytes
        case .loading(let loading): clipped(loading.text)
        case .ready(let ready): ready.facts.encoded
        case .prefill(let prefill): prefill.position.bytes + prefill.x.bytes
        case .decode(let decode): decode.positions.flatMap(\.bytes) + decode.x.bytes
        case .result(let result):
            littleEndian(result.computeNanoseconds) + result.positions.flatMap(\.bytes) + result.y.bytes
        case .error(let error): littleEndian(error.code.rawValue) + clipped(error.text)
        case .ping(let ping): littleEndian(ping.number)
        case .pong(let pong): littleEndian(pong.number) + pong.facts.encoded
        case .reset, .bye: []
        }
    }
}

extension Header {
    fileprivate init(kind: Kind, epoch: UInt32, request: UInt32, rows: Int, values: Values) {
        self.init(
            kind: kind, epoch: epoch, request: request, dtype: values.dtype, rows: UInt16(clamping: rows),
            tokens: UInt16(clamping: values.tokens))
    }
}

extension Message.File {
    fileprivate var bytes: [UInt8] {
        let name = Array(name.utf8)
        return littleEndian(UInt16(clamping: name.count)) + name + littleEndian(length) + sha256.bytes
    }
}

extension Position {
    fileprivate var bytes: [UInt8] { littleEndian(slot) + littleEndian(position) }
}

private func littleEndian<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.append(littleEndian: value)
    return bytes
}

// MARK: - Payloads to messages

extension Message {
    /// Reads the message in a payload whose header and length were checked.
    init(_ header: Header, _ payload: ArraySlice<UInt8>) throws(WireError) {
        var reader = ByteReader(payload)
        guard let message = try Message.read(header, from: &reader) else {
            throw .badFrame("\(header.kind.name) whose payload is cut or out of bounds")
        }
        guard reader.remaining == 0 else {
            throw .badFrame("\(header.kind.name) with \(reader.remaining) bytes too many")
        }
        self = message
    }

    private static func read(_ header: Header, from reader: inout ByteReader) throws(WireError) -> Message? {
        switch header.kind {
        case .hello: reader.bytes32().map { .hello(Hello(nonce: $0)) }
        case .challenge: readChallenge(&reader).map(Message.challenge)
        case .proof: reader.bytes32().map { .proof(Proof(proof: $0)) }
        case .info: .info(Info(facts: try readFacts(header.kind, &reader)))
        case .offer: try readOffer(header, &reader).map(Message.offer)
        case .want: reader.integer().map { .want(Want(offset: $0)) }
        case .data: reader.integer().map { .data(Data(offset: $0, piece: Array(reader.takeRest()))) }
        case .stored: reader.bytes32().map { .stored(Stored(bundle: $0)) }
        case .load: reader.bytes32().map { .load(Load(bundle: $0)) }
        case .loading: .loading(Loading(text: readable(reader.takeRest())))
        case .ready: .ready(Ready(facts: try readFacts(header.kind, &reader)))
        case .reset: .reset(Reset(epoch: header.epoch))
        case .prefill: readPrefill(header, &reader).map(Message.prefill)
        case .decode: readDecode(header, &reader).map(Message.decode)
        case .result: readResult(header, &reader).map(Message.result)
        case .error: readError(header, &reader).map(Message.error)
        case .ping: reader.integer().map { .ping(Ping(number: $0)) }
        case .pong: try readPong(header.kind, &reader).map(Message.pong)
        case .bye: .bye
        }
    }

    private static func readChallenge(_ reader: inout ByteReader) -> Challenge? {
        guard let nonce = reader.bytes32(), let proof = reader.bytes32() else { return nil }
        return Challenge(nonce: nonce, proof: proof)
    }

    private static func readFacts(_ kind: Kind, _ reader: inout ByteReader) throws(WireError) -> JSONObject {
        do {
            return try JSONObject(parsing: reader.takeRest())
        } catch {
            throw .badFrame("\(kind.name) whose JSON has \(error.text)")
        }
    }

    private static func readOffer(_ header: Header, _ reader: inout ByteReader) throws(WireError) -> Offer? {
        guard let bundle = reader.bytes32() else { return nil }
        var files: [File] = []
        for _ in 0..<header.rows {
            guard let size: UInt16 = reader.integer(), 1...Limits.name ~= Int(size), let name = reader.take(Int(size)),
                let length: UInt64 = reader.integer(), let digest = reader.bytes32()
            else { return nil }
            guard let text = String(validating: name, as: UTF8.self) else {
                throw .badFrame("OFFER with a file's name that is not UTF-8")
            }
            files.append(File(name: text, length: length, sha256: digest))
        }
        return Offer(bundle: bundle, files: files)
    }

    private static func readPrefill(_ header: Header, _ reader: inout ByteReader) -> Prefill? {
        guard header.rows == 1, let position = readPosition(&reader), let x = readValues(header, &reader) else {
            return nil
        }
        return Prefill(epoch: header.epoch, request: header.request, position: position, x: x)
    }

    private static func readDecode(_ header: Header, _ reader: inout ByteReader) -> Decode? {
        guard header.rows == header.tokens, let positions = readPositions(header, &reader),
            let x = readValues(header, &reader)
        else { return nil }
        return Decode(epoch: header.epoch, request: header.request, positions: positions, x: x)
    }

    private static func readResult(_ header: Header, _ reader: inout ByteReader) -> Result? {
        guard let nanoseconds: UInt64 = reader.integer(), let positions = readPositions(header, &reader),
            let y = readValues(header, &reader)
        else { return nil }
        return Result(
            epoch: header.epoch, request: header.request, positions: positions, computeNanoseconds: nanoseconds, y: y)
    }

    private static func readPosition(_ reader: inout ByteReader) -> Position? {
        guard let slot: UInt32 = reader.integer(), let position: UInt32 = reader.integer() else { return nil }
        return Position(slot: slot, position: position)
    }

    private static func readPositions(_ header: Header, _ reader: inout ByteReader) -> [Position]? {
        var positions: [Position] = []
        for _ in 0..<header.rows {
            guard let position = readPosition(&reader) else { return nil }
            positions.append(position)
        }
        return positions
    }

    /// All bytes that are left, as so many tokens; their number tells how wide the model is.
    private static func readValues(_ header: Header, _ reader: inout ByteReader) -> Values? {
        guard let dtype = header.dtype, header.tokens > 0 else { return nil }
        let tokens = Int(header.tokens)
        let embed = reader.remaining / (tokens * dtype.size)
        return Values(dtype: dtype, tokens: tokens, embed: embed, bytes: Array(reader.takeRest()))
    }

    private static func readError(_ header: Header, _ reader: inout ByteReader) -> Error? {
        guard let code: UInt16 = reader.integer() else { return nil }
        let text = readable(reader.takeRest())
        return Error(code: ErrorCode(rawValue: code), text: text, epoch: header.epoch, request: header.request)
    }

    private static func readPong(_ kind: Kind, _ reader: inout ByteReader) throws(WireError) -> Pong? {
        guard let number: UInt64 = reader.integer() else { return nil }
        return Pong(number: number, facts: try readFacts(kind, &reader))
    }
}
