// Frames between the proxy rank and the iPad: messages as bytes, and back. `ios_proxy/PROTOCOL.md` is the standard.
//
// Knows: the header, the checksum, where a frame ends. Sans I/O: bytes in, messages out.
// Must not know: what is in a payload (`Payloads.swift`), sockets,
// which message may follow which (`NodeSession.swift`).

extension Message {
    /// The message's bytes. Who makes the message keeps to the bounds that its kind has.
    public var frame: [UInt8] {
        let payload = payload
        assert(kind.lengths ~= payload.count, "\(kind.name) with \(payload.count) bytes")
        var frame = header.bytes(payloadLength: payload.count)
        var crc = CRC32()
        crc.update(frame)
        crc.update(payload)
        frame.removeLast(Header.size - Header.crcOffset)
        frame.append(littleEndian: crc.value)
        frame += payload
        return frame
    }
}

/// A reader of frames from bytes that come cut anywhere.
///
/// A length is checked before anything of its payload is kept, so that no more than one frame is held, and what was fed
/// since the last call of `next`.
public struct Frames: Sendable {
    private var buffer: [UInt8] = []
    /// Where the next frame begins; what is before it was read.
    private var start = 0
    /// The next frame's header, once it is there.
    private var pending: CheckedHeader?
    private var failure: WireError?

    public init() {}

    /// The number of bytes that were fed and not read.
    public var held: Int { buffer.count - start }

    /// Takes any bytes. Call `next` until it returns nil before feeding more.
    public mutating func feed(_ bytes: some Collection<UInt8>) {
        guard failure == nil else { return }
        buffer.append(contentsOf: bytes)
    }

    /// Returns the next message, or nil when more bytes are needed.
    ///
    /// `admit` decides by the header whether a message may come now, before its payload is waited for. After an error
    /// nothing more can be read: the same is thrown again.
    public mutating func next(admit: (Kind) -> Bool = { _ in true }) throws(WireError) -> Message? {
        if let failure { throw failure }
        do {
            return try read(admit)
        } catch {
            failure = error
            (buffer, start) = ([], 0)
            throw error
        }
    }

    private mutating func read(_ admit: (Kind) -> Bool) throws(WireError) -> Message? {
        guard let frame = try nextHeader(admit), held >= Header.size + frame.length else {
            moveToFront()
            return nil
        }
        let payload = buffer[(start + Header.size)...].prefix(frame.length)
        guard checksum(over: payload) == frame.crc else {
            throw .badFrame("a damaged frame: its checksum does not fit")
        }
        let message = try Message(frame.header, payload)
        start += Header.size + frame.length
        pending = nil
        return message
    }

    private mutating func nextHeader(_ admit: (Kind) -> Bool) throws(WireError) -> CheckedHeader? {
        if let pending { return pending }
        let bytes = buffer[start...].prefix(Header.size)
        guard bytes.count == Header.size else {
            try CheckedHeader.checkStart(bytes)
            return nil
        }
        let checked = try CheckedHeader(bytes)
        guard admit(checked.header.kind) else { throw .notAllowed(checked.header.kind) }
        pending = checked
        return checked
    }

    private func checksum(over payload: ArraySlice<UInt8>) -> UInt32 {
        var crc = CRC32()
        crc.update(buffer[start...].prefix(Header.crcOffset))
        crc.update([UInt8](repeating: 0, count: Header.size - Header.crcOffset))
        crc.update(payload)
        return crc.value
    }

    /// Drops the bytes that were read. What is left came with the last bytes that were fed: no byte moves
    /// twice.
    private mutating func moveToFront() {
        guard start > 0 else { return }
        buffer.removeSubrange(..<start)
        start = 0
    }
}
