// A package that a Python program executes: `python3 -m mpgpt_ios.predicting`, over its standard input and output.
//
// Knows: the pipe, its messages (a uint32 with the length, then a safetensors file), when the child is dead, how long it may
// take.
// Must not know: what is computed, slots, positions.
//
// The child is asked one thing at a time. One that does not answer in time is killed: its next answer would be taken for
// that to the next call. When it has died every further call fails, a reset included: that tells the node to open the
// package anew, with another child, when it is next loaded.

import Foundation
import MPGPTNode
import MPGPTWire

/// What keeps the child from answering.
struct ChildError: Error, CustomStringConvertible {
    let description: String
}

/// A child that has a package loaded.
final class ChildPredictor: Predictor {
    let unit = "evaluator, declared"
    private let process = Process()
    private let toChild = Pipe()
    private let fromChild = Pipe()
    /// Seconds that a call may take.
    private let timeout: Int
    /// Why every call fails from now on.
    private var death: ChildError?

    /// Starts the child, and returns when it has loaded the package.
    init(python: String, package: String, threads: Int, timeout: Int) throws {
        self.timeout = timeout
        process.executableURL = URL(filePath: "/usr/bin/env")
        process.arguments = [python, "-m", "mpgpt_ios.predicting", package, "--threads", String(threads)]
        process.standardInput = toChild
        process.standardOutput = fromChild
        do {
            try process.run()
        } catch {
            throw ChildError(description: "\(python) cannot be started: \(error.localizedDescription)")
        }
        // A full pipe must not hold a call up for longer than an empty one may.
        let end = toChild.fileHandleForWriting.fileDescriptor
        _ = fcntl(end, F_SETFL, fcntl(end, F_GETFL) | O_NONBLOCK)
        do {
            _ = try receive(within: ChildPredictor.loadingShare * timeout)
        } catch {
            guard death?.description == ChildPredictor.ended else { throw error }
            throw ChildError(description: "\(python) has ended before it had loaded the package: has it mpgpt_ios?")
        }
    }

    deinit {
        if process.isRunning { process.terminate() }
    }

    func predict(_ function: Function, _ inputs: Inputs) throws -> Tensor {
        guard let y = try ask(function.rawValue, inputs)["y"] else { throw ChildError(description: "there is no y") }
        return y
    }

    func reset() throws {
        _ = try ask("reset", [:])
    }

    private func ask(_ function: String, _ inputs: Inputs) throws -> [String: Tensor] {
        if let death { throw death }
        let file = Safetensors(tensors: inputs, metadata: ["function": function]).encoded()
        var message: [UInt8] = []
        message.append(littleEndian: UInt32(file.count))
        try send(message + file)
        return try receive(within: timeout)
    }

    private func send(_ message: [UInt8]) throws {
        let end = toChild.fileHandleForWriting.fileDescriptor
        let deadline = Deadline(seconds: timeout)
        var rest = message[...]
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes { write(end, $0.baseAddress, $0.count) }
            if count > 0 {
                rest = rest.dropFirst(count)
            } else if errno == EAGAIN || errno == EINTR {
                guard deadline.wait(for: POLLOUT, of: end) else { throw late(timeout) }
            } else {
                throw die(ChildPredictor.ended)
            }
        }
    }

    private func receive(within seconds: Int) throws -> [String: Tensor] {
        let deadline = Deadline(seconds: seconds)
        var start = ByteReader(try read(4, deadline, seconds))
        let file = try Safetensors(bytes: try read(Int(start.integer() ?? UInt32(0)), deadline, seconds))
        if let error = file.metadata["error"] { throw ChildError(description: error) }
        return file.tensors
    }

    private func read(_ count: Int, _ deadline: Deadline, _ seconds: Int) throws -> [UInt8] {
        let end = fromChild.fileHandleForReading.fileDescriptor
        var bytes = [UInt8](repeating: 0, count: count)
        var have = 0
        while have < count {
            guard deadline.wait(for: POLLIN, of: end) else { throw late(seconds) }
            let more = bytes.withUnsafeMutableBytes { systemRead(end, $0.baseAddress! + have, count - have) }
            if more < 0 && errno == EINTR { continue }
            guard more > 0 else { throw die(ChildPredictor.ended) }
            have += more
        }
        return bytes
    }

    // MARK: - The child's end

    private static let ended = "the program that computes has ended"
    /// To load a package may take this many times as long as a call: the child reads all of its weights, from a disk that
    /// may be slow, and imports torch before that.
    private static let loadingShare = 10

    private func late(_ seconds: Int) -> ChildError {
        die(
            "the program that computes has not answered for \(seconds) s, and was ended; "
                + "where it is only slow, give it more with --timeout")
    }

    /// The child is good for nothing any more.
    private func die(_ why: String) -> ChildError {
        let error = ChildError(description: why)
        death = error
        // It may be too stuck to heed anything milder.
        if process.isRunning { kill(process.processIdentifier, SIGKILL) }
        return error
    }
}

/// A moment until which something is waited for.
private struct Deadline {
    private let end: DispatchTime

    init(seconds: Int) {
        end = .now() + .seconds(seconds)
    }

    /// Whether a descriptor is ready, or has no other end any more, in time.
    func wait(for event: some BinaryInteger, of descriptor: Int32) -> Bool {
        while true {
            let (now, last) = (DispatchTime.now().uptimeNanoseconds, end.uptimeNanoseconds)
            let milliseconds = last > now ? Int32(clamping: (last - now) / 1_000_000 + 1) : 0
            var ask = pollfd(fd: descriptor, events: Int16(event), revents: 0)
            let ready = poll(&ask, 1, milliseconds)
            if ready < 0 && errno == EINTR { continue }
            return ready > 0
        }
    }
}

/// The system's `read`, which a predictor's own would hide.
private func systemRead(_ descriptor: Int32, _ buffer: UnsafeMutableRawPointer, _ count: Int) -> Int {
    read(descriptor, buffer, count)
}
