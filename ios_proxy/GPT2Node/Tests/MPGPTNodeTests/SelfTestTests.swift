// The self-test: as far off as Python finds it, what fails, and what is none.

import MPGPTWire
import Testing

@testable import MPGPTNode

@Suite struct SelfTestTests {
    private let folder: TemporaryFolder
    private let file: Safetensors
    private let predictor = Recording()
    private let executor: Executor

    init() throws {
        folder = try TemporaryFolder()
        file = try Safetensors(bytes: try #require(golden("selftest")["file"]?.hexBytes))
        executor = Executor(predictor: predictor, manifest: try manifest())
    }

    private func run(_ bytes: [UInt8], tolerance: Double = 1) throws -> Double {
        try folder.write(bytes, to: "test")
        return try SelfTest.run(executor, path: "\(folder.path)/test", tolerance: tolerance)
    }

    @Test func asFarOffAsPythonFindsIt() throws {
        let bytes = try #require(golden("selftest")["file"]?.hexBytes)
        let largest = try #require(golden("selftest")["largest"]?.number)
        #expect(try run(bytes) == largest)
        #expect(try run(bytes, tolerance: largest) == largest)
        #expect(predictor.resets == 4 && executor.filled == [0, 0, 0])
        let error = try #require(throws: ComputeError.self) { try run(bytes, tolerance: largest.nextDown) }
        #expect(error.text.hasPrefix("the package fails its self-test: off by 0.04296875"))
    }

    @Test func aPackageThatLies() throws {
        predictor.answer = { x in
            var y = x
            y.bytes[1] = 0x7e
            return y
        }
        let error = try #require(throws: ComputeError.self) { try run(file.encoded(), tolerance: 1e30) }
        #expect(error.text.contains("off by inf"))
        predictor.failure = predictor.calls.count + 1
        let failure = try #require(throws: ComputeError.self) { try run(file.encoded()) }
        #expect(failure == .failed("the self-test's call 0: no more") && executor.filled == [0, 0, 0])
    }

    @Test func whatIsNoSelfTest() throws {
        let changes: [(inout Safetensors) -> Void] = [
            { $0.tensors["3.x"] = $0.tensors["2.x"] }, { $0.tensors["0.y"] = nil }, { $0.metadata = [:] },
            { $0.metadata["kind.1"] = "decide" }, { $0.metadata["kind.2"] = "step" },
            { $0.metadata["kind.3"] = "decode" },
            { $0.metadata["kind.01"] = $0.metadata.removeValue(forKey: "kind.1") },
            { $0.metadata["kind.1"] = "prefill" },
            { $0.tensors["0.pos"] = Tensor(shape: [6], int32: [0, 1, 2, 3, 5, 4]) },
            { $0.tensors["0.slot"] = Tensor(shape: [6], int32: [0, 0, 0, 0, 0, 1]) },
            { $0.tensors["0.slot"] = Tensor(shape: [1], int32: [0]) },
            { $0.tensors["0.slot"] = Tensor(shape: [6], int32: [3, 3, 3, 3, 3, 3]) },
            { $0.tensors["0.pos"] = Tensor(shape: [6], int32: [-1, 0, 1, 2, 3, 4]) },
            { $0.tensors["1.slot"] = Tensor(shape: [2], int32: [1, 1]) },
            { $0.tensors["1.pos"] = Tensor(shape: [2], int32: [0, .max]) },
            { $0.tensors["1.pos"] = Tensor(shape: [2], float32: [0, 6]) },
            { $0.tensors["1.x"] = Tensor(shape: [2, 2], float16: [0, 0, 0, 0]) },
            { file in
                file.tensors["1.x"] = Tensor(shape: [2, 2], float16: [0, 0, 0, 0])
                file.tensors["1.y"] = Tensor(shape: [2, 2], float32: [0, 0, 0, 0])
            },
            { file in
                for part in ["x", "y", "slot", "pos"] {
                    file.tensors["1.\(part)"]?.shape[0] = 0
                    file.tensors["1.\(part)"]?.bytes = []
                }
            },
        ]
        for (number, change) in changes.enumerated() {
            var file = file
            change(&file)
            let error = try #require(throws: ComputeError.self, "change \(number)") { try run(file.encoded()) }
            guard case .failed = error else { Issue.record("\(error)"); continue }
        }
        #expect(throws: ComputeError.self) { try run([1, 2, 3]) }
        #expect(throws: ComputeError.self) { try SelfTest.run(executor, path: "\(folder.path)/none", tolerance: 1) }
        #expect(executor.filled == [0, 0, 0])
    }
}
