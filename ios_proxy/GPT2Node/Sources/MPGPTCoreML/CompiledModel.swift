// A package, compiled once: where it lies, and how to wait for what Core ML only does asynchronously.
//
// Knows: `MLModel.compileModel`, one path for each package.
// Must not know: what is loaded from there.

#if canImport(CoreML)

    import CoreML
    import Foundation
    import MPGPTNode
    import Synchronization

    enum CompiledModel {
        /// The compiled package in a folder; it is compiled where it is not there yet, and never again.
        static func url(of package: String, in folder: String) throws -> URL {
            let name = URL(filePath: package).deletingPathExtension().lastPathComponent
            let place = URL(filePath: folder).appending(path: "\(name).mlmodelc")
            let files = FileManager.default
            guard !files.fileExists(atPath: place.path(percentEncoded: false)) else { return place }
            do {
                let temporary = try blocking { try await MLModel.compileModel(at: URL(filePath: package)) }
                try files.createDirectory(at: place.deletingLastPathComponent(), withIntermediateDirectories: true)
                // It may be on another disk: what is at its place is always whole.
                let beside = place.appendingPathExtension("new")
                try? files.removeItem(at: beside)
                try files.moveItem(at: temporary, to: beside)
                try files.moveItem(at: beside, to: place)
            } catch {
                throw ComputeError.failed("the package cannot be compiled: \(error.localizedDescription)")
            }
            return place
        }
    }

    /// Waits for work that is only to be had asynchronously. Not to be called from an async function, whose thread it
    /// would hold.
    func blocking<T: Sendable>(_ work: @escaping @Sendable () async throws -> T) throws -> T {
        let outcome = Outcome<T>()
        Task.detached(priority: .userInitiated) {
            let result: Result<T, any Error>
            do {
                result = .success(try await work())
            } catch {
                result = .failure(error)
            }
            outcome.set(result)
        }
        return try outcome.wait().get()
    }

    private final class Outcome<T: Sendable>: Sendable {
        private let result = Mutex<Result<T, any Error>?>(nil)
        private let isThere = DispatchSemaphore(value: 0)

        func set(_ result: Result<T, any Error>) {
            self.result.withLock { $0 = result }
            isThere.signal()
        }

        func wait() throws -> Result<T, any Error> {
            isThere.wait()
            guard let result = result.withLock({ $0 }) else { throw ComputeError.failed("nothing came of it") }
            return result
        }
    }

#endif
