// TCP sockets by POSIX, the same on Linux and on Apple's systems: none ever blocks, and none kills the program.
//
// Knows: system calls and their errors.
// Must not know: queues, when a socket is ready, what is sent.

import Foundation

#if canImport(Glibc)
    import Glibc
#elseif canImport(Musl)
    import Musl
#endif

/// What the system says of a socket that cannot be used.
public struct SocketError: Error, Sendable, Hashable {
    public let text: String

    init(_ text: String) {
        self.text = text
    }

    /// The system's words for the last error.
    static var last: SocketError { SocketError(String(cString: strerror(errno))) }
}

/// A descriptor that does not block; whoever made it closes it.
struct Socket: Sendable {
    let descriptor: Int32

    /// Bytes taken at once.
    static let piece = 256 << 10

    enum Received {
        case bytes([UInt8])
        /// Nothing is there now.
        case nothing
        case end
    }

    /// Takes over a descriptor, and sets what every socket here has.
    private init(_ descriptor: Int32) {
        self.descriptor = descriptor
        _ = fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) | O_NONBLOCK)
        _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
        #if canImport(Darwin)
            set(SOL_SOCKET, SO_NOSIGPIPE)
        #endif
    }

    private func set(_ level: Int32, _ option: Int32) {
        var on: Int32 = 1
        _ = setsockopt(descriptor, level, option, &on, socklen_t(MemoryLayout<Int32>.size))
    }

    func close() {
        #if canImport(Darwin)
            _ = Darwin.close(descriptor)
        #elseif canImport(Glibc)
            _ = Glibc.close(descriptor)
        #else
            _ = Musl.close(descriptor)
        #endif
    }

    // MARK: - Listening

    /// Listens at an address; port 0 takes any that is free.
    static func listening(host: String, port: Int) throws(SocketError) -> Socket {
        var hints = addrinfo()
        hints.ai_flags = AI_PASSIVE
        hints.ai_socktype = stream
        var found: UnsafeMutablePointer<addrinfo>?
        let failure = getaddrinfo(host.isEmpty ? nil : host, String(port), &hints, &found)
        guard failure == 0, let address = found else { throw SocketError(String(cString: gai_strerror(failure))) }
        defer { freeaddrinfo(found) }
        let descriptor = socket(address.pointee.ai_family, stream, 0)
        guard descriptor >= 0 else { throw .last }
        let made = Socket(descriptor)
        made.set(SOL_SOCKET, SO_REUSEADDR)
        let isBound = bind(descriptor, address.pointee.ai_addr, address.pointee.ai_addrlen) == 0
        guard isBound, listen(descriptor, 16) == 0 else {
            let error = SocketError.last
            made.close()
            throw error
        }
        return made
    }

    /// The port at which it listens.
    var port: Int {
        var storage = sockaddr_storage()
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        withUnsafeMutablePointer(to: &storage) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { _ = getsockname(descriptor, $0, &length) }
        }
        return Int(Socket.parts(of: storage, length).port) ?? 0
    }

    /// The next connection that waits, and the address of its other end; nil where there is none.
    func accept() throws(SocketError) -> (Socket, String)? {
        var storage = sockaddr_storage()
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        let accepted = withUnsafeMutablePointer(to: &storage) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { systemAccept(descriptor, $0, &length) }
        }
        guard accepted >= 0 else {
            if [EAGAIN, EWOULDBLOCK, EINTR, ECONNABORTED].contains(errno) { return nil }
            throw .last
        }
        let made = Socket(accepted)
        made.set(Int32(IPPROTO_TCP), TCP_NODELAY)
        let (host, port) = Socket.parts(of: storage, length)
        return (made, host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)")
    }

    private static func parts(of address: sockaddr_storage, _ length: socklen_t) -> (host: String, port: String) {
        var host = [CChar](repeating: 0, count: Int(NI_MAXHOST))
        var port = [CChar](repeating: 0, count: Int(NI_MAXSERV))
        _ = withUnsafePointer(to: address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                getnameinfo(
                    $0, length, &host, socklen_t(host.count), &port, socklen_t(port.count),
                    NI_NUMERICHOST | NI_NUMERICSERV)
            }
        }
        return (text(host), text(port))
    }

    private static func text(_ characters: [CChar]) -> String {
        String(decoding: characters.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    private static var stream: Int32 {
        #if canImport(Glibc)
            Int32(SOCK_STREAM.rawValue)
        #else
            SOCK_STREAM
        #endif
    }

    // MARK: - A connection

    func receive() throws(SocketError) -> Received {
        var count = 0
        let bytes = [UInt8](unsafeUninitializedCapacity: Socket.piece) { buffer, initialized in
            count = recv(descriptor, buffer.baseAddress, buffer.count, 0)
            initialized = max(0, count)
        }
        if count > 0 { return .bytes(bytes) }
        if count == 0 { return .end }
        if [EAGAIN, EWOULDBLOCK, EINTR].contains(errno) { return .nothing }
        throw .last
    }

    /// Sends some of the bytes, and returns how many; 0 while the other end takes none.
    func send(_ bytes: [UInt8]) throws(SocketError) -> Int {
        #if canImport(Darwin)
            let flags: Int32 = 0
        #else
            let flags = Int32(MSG_NOSIGNAL)
        #endif
        let count = bytes.withUnsafeBytes { systemSend(descriptor, $0.baseAddress, $0.count, flags) }
        if count >= 0 { return count }
        if [EAGAIN, EWOULDBLOCK, EINTR].contains(errno) { return 0 }
        throw .last
    }

    /// Tells the other end that nothing more comes.
    func shutDownSending() {
        _ = shutdown(descriptor, Int32(SHUT_WR))
    }
}

// The methods above have the names of these functions.
private func systemAccept(
    _ descriptor: Int32, _ address: UnsafeMutablePointer<sockaddr>, _ length: UnsafeMutablePointer<socklen_t>
) -> Int32 {
    accept(descriptor, address, length)
}

private func systemSend(_ descriptor: Int32, _ bytes: UnsafeRawPointer?, _ count: Int, _ flags: Int32) -> Int {
    send(descriptor, bytes, count, flags)
}
