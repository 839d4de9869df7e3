// A package that a Python program executes: `python3 -m mpgpt_ios.predicting`, over its standard input and output.
//
// Knows: the pipe, its messages (a uint32 with the length, then a safetensors file), when the child is dead.
// Must not know: what is computed, slots, positions.
//
// The child is asked one thing at a time. When it dies every further call fails, a reset included: that tells the node
// to open the package anew, with another child, when it is next loaded.

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
    private var hasDied = false

    /// Starts the child, and returns when it has loaded the package.
    init(python: String, package: String, threads: Int) throws {
        process.executableURL = URL(filePath: "/usr/bin/env")
        process.arguments = [python, "-m", "mpgpt_ios.predicting", package, "--threads", String(threads)]
        process.standardInput = toChild
        process.standardOutput = fromChild
        do {
            try process.run()
        } catch {
            throw ChildError(description: "\(python) cannot be started: \(error.localizedDescription)")
        }
        do {
            _ = try receive()
        } catch where hasDied {
            throw ChildError(description: "\(python) has ended before it had loaded the package: has it mpgpt_ios?")
        }
    }

    deinit {
        process.terminate()
    }

    func predict(_ function: Function, _ inputs: Inputs) throws -> Tensor {
        guard let y = try ask(function.rawValue, inputs)["y"] else { throw ChildError(description: "there is no y") }
        return y
    }

    func reset() throws {
        _ = try ask("reset", [:])
    }

    private func ask(_ function: String, _ inputs: Inputs) throws -> [String: Tensor] {
        guard !hasDied else { throw death }
        let file = Safetensors(tensors: inputs, metadata: ["function": function]).encoded()
        var message: [UInt8] = []
        message.append(littleEndian: UInt32(file.count))
        do {
            try toChild.fileHandleForWriting.write(contentsOf: message + file)
        } catch {
            hasDied = true
            throw death
        }
        return try receive()
    }

    private func receive() throws -> [String: Tensor] {
        var start = ByteReader(try read(4))
        let file = try Safetensors(bytes: try read(Int(start.integer() ?? UInt32(0))))
        if let error = file.metadata["error"] { throw ChildError(description: error) }
        return file.tensors
    }

    private func read(_ count: Int) throws -> [UInt8] {
        var bytes: [UInt8] = []
        while bytes.count < count {
            let more = try? fromChild.fileHandleForReading.read(upToCount: count - bytes.count)
            guard let more, !more.isEmpty else {
                hasDied = true
                throw death
            }
            bytes += more
        }
        return bytes
    }

    private var death: ChildError { ChildError(description: "the program that computes has ended") }
}
