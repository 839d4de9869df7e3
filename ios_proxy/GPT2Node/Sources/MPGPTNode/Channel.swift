// A connected socket on a queue: it says when bytes may have come or may be sent, and is closed once.
//
// Knows: dispatch sources, and in which order they and a descriptor may end.
// Must not know: what goes in and out.
//
// A descriptor may be closed only when no source watches it any more, and a source may be given up only while it is not
// suspended.

import Dispatch

/// One connection's socket and the sources that watch it. All of it is used on the queue alone.
final class Channel {
    private let socket: Socket
    private let reading: any DispatchSourceRead
    private let writing: any DispatchSourceWrite
    private(set) var isClosed = false

    /// Whether it is told when something can be read. While it is not, the other end's bytes stay where they are.
    var wantsToRead = false {
        didSet { set(reading, from: oldValue, to: wantsToRead) }
    }
    /// Whether it is told when something can be sent.
    var wantsToWrite = false {
        didSet { set(writing, from: oldValue, to: wantsToWrite) }
    }

    init(_ socket: Socket, queue: DispatchQueue) {
        self.socket = socket
        reading = DispatchSource.makeReadSource(fileDescriptor: socket.descriptor, queue: queue)
        writing = DispatchSource.makeWriteSource(fileDescriptor: socket.descriptor, queue: queue)
        let watchers = DispatchGroup()
        for source in [reading, writing] as [any DispatchSourceProtocol] {
            watchers.enter()
            source.setCancelHandler { watchers.leave() }
        }
        watchers.notify(queue: queue) { socket.close() }
    }

    deinit {
        close()
    }

    /// Begins to read; to be called once.
    func watch(onReadable: @escaping @Sendable () -> Void, onWritable: @escaping @Sendable () -> Void) {
        reading.setEventHandler(handler: onReadable)
        writing.setEventHandler(handler: onWritable)
        wantsToRead = true
    }

    func receive() throws(SocketError) -> Socket.Received {
        isClosed ? .nothing : try socket.receive()
    }

    /// Sends what the other end takes of the bytes, and removes it from them.
    func send(_ bytes: inout [UInt8]) throws(SocketError) {
        while !bytes.isEmpty, !isClosed {
            let count = try socket.send(bytes)
            if count == 0 { return }
            if count == bytes.count { bytes = [] } else { bytes.removeFirst(count) }
        }
    }

    func shutDownSending() {
        if !isClosed { socket.shutDownSending() }
    }

    func close() {
        guard !isClosed else { return }
        (wantsToRead, wantsToWrite) = (true, true)
        isClosed = true
        reading.cancel()
        writing.cancel()
    }

    private func set(_ source: any DispatchSourceProtocol, from old: Bool, to new: Bool) {
        guard old != new, !isClosed else { return }
        if new { source.resume() } else { source.suspend() }
    }
}
