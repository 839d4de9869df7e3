// The self-test of a bundle: calls with the outputs that float32 gives, replayed before a package is believed.
//
// Knows: the self-test's file, how far off is too far.
// Must not know: what computes, and what is tried next where it fails.

import Foundation

/// A package that loads and runs may still compute rubbish; this tells.
public enum SelfTest {
    private static let maxBytes = 256 << 20
    private static let parts = ["slot", "pos", "x", "y"]

    /// Replays the file at `path` on a fresh state; returns the largest difference that it finds.
    ///
    /// The difference of a token is its largest element's, divided by its largest value where that is above 1. Throws
    /// when one is above `tolerance` or no number, and for a file that is no self-test. The executor is reset before
    /// and after.
    public static func run(_ executor: Executor, path: String, tolerance: Double) throws(ComputeError) -> Double {
        let largest: Float
        do {
            let calls = try calls(at: path)
            try executor.reset()
            largest = try replay(calls, executor)
        } catch {
            // The first failure is the one to tell.
            try? executor.reset()
            throw error
        }
        try executor.reset()
        guard Double(largest) <= tolerance else {
            throw .failed("the package fails its self-test: off by \(largest), where \(tolerance) is allowed")
        }
        return Double(largest)
    }

    private static func replay(_ calls: [Call], _ executor: Executor) throws(ComputeError) -> Float {
        var largest: Float = 0
        for (number, call) in calls.enumerated() {
            let got: [UInt8]
            do {
                got = try call.replay(executor)
            } catch {
                throw .failed("the self-test's call \(number): \(error.text)")
            }
            largest = max(largest, call.difference(of: got))
        }
        return largest
    }

    private static func calls(at path: String) throws(ComputeError) -> [Call] {
        let file: Safetensors
        do {
            file = try Safetensors(bytes: Disk.read(path, limit: maxBytes))
        } catch let error as StoreError {
            throw .failed("the self-test cannot be read: \(error.text)")
        } catch {
            throw .failed("\(path) is no self-test: \((error as? SafetensorsError)?.text ?? "\(error)")")
        }
        let count = file.metadata.keys.count { $0.hasPrefix("kind.") }
        let names = (0..<count).flatMap { number in parts.map { "\(number).\($0)" } }
        guard count > 0, Set(file.tensors.keys) == Set(names) else {
            throw .failed("\(path) is no self-test: its tensors are not those of \(count) calls")
        }
        var calls: [Call] = []
        for number in 0..<count {
            guard let call = Call(file, number) else {
                throw .failed("\(path) is no self-test: its call \(number) is none of a prefill or a decode")
            }
            calls.append(call)
        }
        return calls
    }
}

/// One call of a self-test.
private struct Call {
    /// A call is a request, and it is the executor's affair which functions compute it.
    enum Kind: String {
        case prefill, decode
    }

    let kind: Kind
    let slots: [Int]
    let positions: [Int]
    let x: [UInt8]
    /// The outputs as they should be, (n, embed).
    let y: [Float]

    /// Returns nil unless the tensors are of one shape, and those of a prefill one slot's, one behind the other.
    init?(_ file: Safetensors, _ number: Int) {
        guard let kind = file.metadata["kind.\(number)"].flatMap(Kind.init),
            let slot = file.tensors["\(number).slot"], let pos = file.tensors["\(number).pos"],
            let x = file.tensors["\(number).x"], let y = file.tensors["\(number).y"],
            x.shape.count == 2, x.shape[0] > 0, x.shape[1] > 0, y.shape == x.shape,
            slot.shape == [x.shape[0]], pos.shape == slot.shape,
            (slot.dtype, pos.dtype, x.dtype, y.dtype) == (.int32, .int32, .float16, .float32)
        else { return nil }
        (self.kind, slots, positions) = (kind, slot.integers, pos.integers)
        (self.x, self.y) = (x.bytes, y.floats)
        if kind == .prefill {
            guard Set(slots).count == 1, zip(positions, positions.dropFirst()).allSatisfy({ $0 + 1 == $1 }) else {
                return nil
            }
        }
    }

    func replay(_ executor: Executor) throws(ComputeError) -> [UInt8] {
        switch kind {
        case .prefill: try executor.prefill(slot: slots[0], position: positions[0], x: x, tokens: slots.count)
        case .decode: try executor.decode(slots: slots, positions: positions, x: x)
        }
    }

    /// How far off some outputs are; infinitely where one is no number.
    func difference(of got: [UInt8]) -> Float {
        let embed = y.count / slots.count
        var largest: Float = 0
        for token in slots.indices {
            var (scale, off): (Float, Float) = (1, 0)
            for at in token * embed..<(token + 1) * embed {
                let value = Half.float(UInt16(got[2 * at]) | UInt16(got[2 * at + 1]) << 8)
                let difference = abs(value - y[at])
                guard difference.isFinite else { return .infinity }
                (scale, off) = (max(scale, abs(y[at])), max(off, difference))
            }
            largest = max(largest, off / scale)
        }
        return largest
    }
}
