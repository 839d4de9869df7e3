// Markers on the disk: which unit is being tried with which bundle. One that is found later tells what ended the program.
//
// Knows: their files, `HASH.UNIT.trying`, and when one counts.
// Must not know: what is tried, and what is done about it.

import MPGPTWire
import Synchronization

/// The markers of one folder.
final class Markers: Sendable {
    private struct Marker {
        let path: String
        let content: [UInt8]
    }

    private struct UnderWay {
        var marker: Marker?
        var isLifted = false
    }

    private static let suffix = ".trying"
    private let folder: String
    private let system: String
    private let underWay = Mutex(UnderWay())

    init(folder: String, system: String) {
        (self.folder, self.system) = (folder, system)
    }

    /// Marks what is about to be tried; when this returns, the marker outlives the program.
    func begin(_ unit: String, _ hash: [UInt8]) throws(StoreError) {
        let marker = Marker(path: path(unit, hash), content: content(unit, hash))
        try underWay.withLock { underWay throws(StoreError) in
            if !underWay.isLifted { try Disk.write(marker.content, durablyTo: marker.path) }
            underWay.marker = marker
        }
    }

    /// What was tried is over, and this program is still there.
    func end() {
        underWay.withLock { underWay in
            if let marker = underWay.marker { Disk.erase(marker.path) }
            underWay.marker = nil
        }
    }

    /// Takes the marker of what is under way off the disk, and leaves none until `restore`.
    func lift() {
        underWay.withLock { underWay in
            underWay.isLifted = true
            if let marker = underWay.marker { Disk.erase(marker.path) }
        }
    }

    func restore() {
        underWay.withLock { underWay in
            underWay.isLifted = false
            if let marker = underWay.marker { try? Disk.write(marker.content, durablyTo: marker.path) }
        }
    }

    /// Whether a trial of this unit and bundle has ended the program, under this very system.
    func areLeft(by unit: String, _ hash: [UInt8]) -> Bool {
        let path = path(unit, hash)
        guard Disk.kind(of: path) == .file else { return false }
        if let found = try? Disk.read(path, limit: 1 << 16), found == content(unit, hash) { return true }
        Disk.erase(path)
        return false
    }

    /// Removes all of them.
    func forget() {
        for name in Disk.names(in: folder) where name.hasSuffix(Markers.suffix) {
            Disk.erase("\(folder)/\(name)")
        }
    }

    private func path(_ unit: String, _ hash: [UInt8]) -> String {
        let name = unit.map { $0.isASCII && ($0.isLetter || $0.isNumber) ? $0 : "-" }
        return "\(folder)/\(hash.hex).\(String(name))\(Markers.suffix)"
    }

    private func content(_ unit: String, _ hash: [UInt8]) -> [UInt8] {
        let facts: JSONObject = ["bundle": .string(hash.hex), "system": .string(system), "unit": .string(unit)]
        return facts.encoded
    }
}
