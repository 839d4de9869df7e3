// How a node keeps bundles: in pieces, damaged, with hostile names, on a full disk.

import Foundation
import MPGPTWire
import Testing

@testable import MPGPTNode

/// A bundle as a proxy has it.
private struct Sample {
    let offer: Message.Offer
    let bytes: [UInt8]

    var hash: [UInt8] { offer.bundle.bytes }
    var name: String { offer.bundle.description }

    init(_ seed: UInt8 = 0, manifest: [UInt8] = manifestFields.encoded) {
        let parts: [(String, [UInt8])] = [
            ("manifest.json", manifest),
            ("model.mlpackage/Data/weight.bin", [UInt8](repeating: seed, count: 5000)),
            ("model.mlpackage/Manifest.json", Array("{}".utf8)), ("model.mlpackage/empty", []),
            ("selftest.safetensors", Array("no test".utf8)),
        ]
        let files = parts.map { name, bytes in
            Message.File(name: name, length: UInt64(bytes.count), sha256: SHA256.hash(bytes))
        }
        offer = Message.Offer(bundle: Message.Offer.hash(of: files), files: files)
        bytes = parts.flatMap { $0.1 }
    }
}

@Suite struct StoreTests {
    private let folder: TemporaryFolder
    private let store: Store

    init() throws {
        folder = try TemporaryFolder()
        store = try Store(folder: folder.path)
    }

    @discardableResult
    private func keep(_ sample: Sample) throws -> MPGPTNode.Bundle {
        let partial = try store.receive(sample.offer)
        try partial.write(sample.bytes)
        return try partial.finish()
    }

    @Test func aBundleThatComesInPiecesAndAfterARestart() throws {
        let sample = Sample()
        let first = try store.receive(sample.offer)
        #expect(first.have == 0 && first.total == UInt64(sample.bytes.count) && store.find(sample.hash) == nil)
        try first.write(sample.bytes[..<1234])
        first.close()
        #expect(folder.names == ["\(sample.name).part"])

        let again = try Store(folder: folder.path).receive(sample.offer)
        #expect(again.have == 1234 && store.hashes() == [])
        try again.write(sample.bytes[1234..<1235])
        try again.write(sample.bytes[1235...])
        let kept = try again.finish()
        #expect(kept.hash == sample.hash && kept.length == again.total && kept.files == sample.offer.files)
        #expect(kept.manifest == (try manifest()) && folder.names == [sample.name] && store.hashes() == [sample.name])
        let weights = try Data(contentsOf: URL(filePath: "\(kept.package)/Data/weight.bin"))
        #expect(weights.count == 5000 && FileManager.default.fileExists(atPath: kept.selftest))
        #expect(store.find(sample.hash)?.hash == sample.hash)
        store.delete(sample.name)
        #expect(folder.names == [] && store.find(sample.hash) == nil)
    }

    @Test func whatCameDamagedIsNotKept() throws {
        let sample = Sample()
        for at in [0, sample.bytes.count / 2, sample.bytes.count - 1] {
            var bytes = sample.bytes
            bytes[at] ^= 1
            let partial = try store.receive(sample.offer)
            try partial.write(bytes)
            let error = try #require(throws: StoreError.self) { try partial.finish() }
            #expect(error.text.hasSuffix("was damaged on the way: its hash does not fit") && folder.names == [])
        }
        let cut = try store.receive(sample.offer)
        try cut.write(sample.bytes.dropLast())
        #expect(throws: StoreError("the package's selftest.safetensors is cut")) { try cut.finish() }
        let long = try store.receive(sample.offer)
        #expect(throws: StoreError.self) { try long.write(sample.bytes + [0]) }
        #expect(long.have == 0)
        long.close()
        #expect(throws: StoreError.self) { try long.write(sample.bytes) }
    }

    @Test func aManifestThatIsNone() throws {
        let sample = Sample(manifest: Array("{\"format\":1}".utf8))
        let partial = try store.receive(sample.offer)
        try partial.write(sample.bytes)
        let error = try #require(throws: StoreError.self) { try partial.finish() }
        #expect(error.text.hasPrefix("the manifest: model is missing") && error.kind == .other && folder.names == [])
    }

    @Test func whatWasDamagedLaterIsThrownAway() throws {
        for change in ["model.mlpackage/Data/weight.bin", "manifest.json", "model.mlpackage/more"] {
            let sample = Sample()
            try keep(sample)
            try folder.write([1], to: "\(sample.name)/\(change)")
            #expect(store.find(sample.hash) == nil && folder.names == [])
        }
        for part in ["model.mlpackage", "manifest.json", "selftest.safetensors"] {
            let sample = Sample()
            try keep(sample)
            Disk.erase("\(folder.path)/\(sample.name)/\(part)")
            #expect(store.find(sample.hash) == nil && folder.names == [])
        }
    }

    @Test func whatACrashLeaves() throws {
        let sample = Sample()
        try folder.write(sample.bytes + [1], to: "\(sample.name).part/bytes")
        try folder.write([1], to: "\(sample.name).part/files/manifest.json")
        try folder.write([1], to: "\(Sample(1).name).gone/manifest.json")
        let partial = try Store(folder: folder.path).receive(sample.offer)
        #expect(partial.have == 0 && folder.names == ["\(sample.name).part"], "longer than what was offered: another's")
        try partial.write(sample.bytes)
        #expect(try partial.finish().hash == sample.hash && folder.names == [sample.name])
    }

    // MARK: - Offers

    @Test func offersAsPythonTakesThem() throws {
        let store = try Store(folder: folder.path) { _ in .max }
        for entry in try #require(golden("offers").array) {
            var frames = Frames()
            frames.feed(try #require(entry["frame"]?.hexBytes))
            guard case .offer(let offer) = try frames.next() else { throw StoreError("no offer") }
            var refusal: StoreError?
            do {
                _ = try store.receive(offer)
            } catch {
                refusal = error
            }
            #expect((refusal == nil) == entry["taken"]?.bool, "\(entry["what"]?.string ?? "")")
            #expect(refusal?.kind != .noSpace)
            store.delete(offer.bundle.description)
            #expect(folder.names == [])
        }
    }

    @Test func noRoom() throws {
        let sample = Sample()
        let needed = 2 * UInt64(sample.bytes.count) + Store.spare
        let full = try Store(folder: folder.path) { _ in needed - 1 }
        let error = try #require(throws: StoreError.self) { try full.receive(sample.offer) }
        #expect(error.kind == .noSpace && error.text.hasPrefix("there is no room for a package of 0 MB"))
        #expect(folder.names == [])
        let fits = try Store(folder: folder.path) { _ in needed }
        let partial = try fits.receive(sample.offer)
        try partial.write(sample.bytes[..<1000])
        partial.close()
        let left = needed - 1000 + UInt64(sample.bytes.count)
        let compiling = try Store(folder: folder.path, compiles: true) { _ in left }
        #expect(try compiling.receive(sample.offer).have == 1000)
        let tight = try Store(folder: folder.path, compiles: true) { _ in left - 1 }
        #expect(throws: StoreError.self) { try tight.receive(sample.offer) }
    }

    @Test func aFolderThatCannotBe() throws {
        try folder.write([], to: "file")
        #expect(throws: StoreError.self) { try Store(folder: "\(folder.path)/file") }
        #expect(throws: StoreError.self) { try Store(folder: "\(folder.path)/file/below") }
        #expect(try Disk.freeSpace(at: folder.path) > 0)
    }

    // MARK: - Making room

    @Test func oldBundlesMakeRoom() throws {
        let samples = (0..<7).map { Sample(UInt8($0)) }
        for (at, sample) in samples[..<4].enumerated() {
            try keep(sample)
            #expect(store.hashes().count == at + 1)
        }
        #expect(store.find(samples[0].hash) != nil)
        try keep(samples[4])
        #expect(store.hashes() == [0, 2, 3, 4].map { samples[$0].name }.sorted())
        let partial = try store.receive(samples[5].offer)
        partial.close()
        #expect(folder.names.count == Store.kept, "what came half is counted too")
        try keep(samples[6])
        #expect(folder.names == (["\(samples[5].name).part"] + [0, 4, 6].map { samples[$0].name }).sorted())
        try keep(samples[5])
        #expect(store.hashes() == [0, 4, 5, 6].map { samples[$0].name }.sorted())
    }

    @Test func whatIsCompiledGoesWithItsBundle() throws {
        let samples = (0..<5).map { Sample(UInt8($0)) }
        for sample in samples[..<4] {
            try keep(sample)
            let compiled = Store.compiledFolder(of: sample.hash, in: folder.path)
            try folder.write([1], to: "\(compiled.dropFirst(folder.path.count))/model.mlmodelc/weights")
        }
        let stray = Store.compiledFolder(of: [UInt8](repeating: 7, count: 32), in: folder.path)
        try folder.write([1], to: "\(stray.dropFirst(folder.path.count))/model.mlmodelc/weights")
        #expect(store.hashes() == samples[..<4].map(\.name).sorted(), "it is no bundle, and takes no bundle's room")
        try keep(samples[4])
        #expect(store.hashes() == samples[1...].map(\.name).sorted() && folder.names.count == 4 + 3 + 1)
        store.delete(samples[1].name)
        #expect(folder.names.count == 3 + 2 + 1 && Disk.kind(of: stray) == .folder)
        for at in 0..<6 {
            try folder.write([1], to: "\([UInt8](repeating: UInt8(at), count: 32).hex).compiled/model.mlmodelc/weights")
        }
        try keep(samples[0])
        #expect(folder.names.filter { $0.hasSuffix(".compiled") }.count == 2 + Store.kept, "strays are few")
    }

    @Test func whatIsNoHashIsLeftAlone() throws {
        try folder.write([1], to: "other/file")
        try folder.write([1], to: "\(String(repeating: "0A", count: 32))/file")
        #expect(store.hashes() == [])
        store.delete("other")
        store.delete("../other")
        #expect(folder.names.count == 2)
    }
}

@Suite struct BundleTests {
    @Test func besideEachOther() throws {
        let folder = try TemporaryFolder()
        let sample = Sample()
        let parts = sample.offer.files.map(\.name)
        var at = 0
        for (name, file) in zip(parts, sample.offer.files) {
            let bytes = Array(sample.bytes[at..<at + Int(file.length)])
            at += Int(file.length)
            let inside = name.hasPrefix("model.mlpackage/") ? "small.mlpackage/\(name.dropFirst(16))" : "small.\(name)"
            try folder.write(bytes, to: inside)
        }
        for path in ["\(folder.path)/small.mlpackage", "\(folder.path)/small.mlpackage/"] {
            let bundle = try MPGPTNode.Bundle(package: path)
            #expect(bundle.hash == sample.hash && bundle.length == UInt64(sample.bytes.count))
            #expect(bundle.manifestPath == "\(folder.path)/small.manifest.json")
        }
        #expect(throws: StoreError.self) { try MPGPTNode.Bundle(package: "\(folder.path)/none.mlpackage") }
        #expect(throws: StoreError.self) { try MPGPTNode.Bundle(folder: folder.path) }
    }
}
