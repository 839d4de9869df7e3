// `mpgpt-node check`: a package on each unit, how far it is off, how long a token takes.
//
// Knows: what is measured, and the line that tells it.
// Must not know: what a unit is.

import Dispatch
import MPGPTNode

/// Tries a package on every unit, and prints a line for each; throws where it passes on none.
func check(_ path: String, _ options: Options) throws {
    let bundle = try MPGPTNode.Bundle(package: expanded(path))
    let folder = expanded(options.store)
    if Units.compiles { _ = try Store(folder: folder) }  // it is there then
    let ladder = Ladder(units: Units.make(options), folder: folder, system: Device.here(app: "").system)
    if options.triesAgain { ladder.forgetFailures() }
    var troubles: [String] = []
    for unit in ladder.units {
        if let why = ladder.reasonToLeaveOut(unit, for: bundle) {
            troubles.append("\(unit.name) is left out: \(why)")
        } else {
            do {
                say(try line(try ladder.load(bundle, on: unit)))
                continue
            } catch {
                troubles.append("\(unit.name): \(sentence(error))")
            }
        }
        if let trouble = troubles.last, ladder.units.count > 1 { say(trouble) }
    }
    if troubles.count == ladder.units.count { throw UnfitError(description: troubles.joined(separator: "; ")) }
}

/// A package that cannot be run here.
private struct UnfitError: Error, CustomStringConvertible {
    let description: String
}

/// What came of a unit, for a person.
private func line(_ package: LoadedPackage) throws -> String {
    let (token, prompt) = try (tokenMilliseconds(package), promptMilliseconds(package))
    let parts = [
        "\(package.unit): off by \(package.difference), where \(package.manifest.tolerance) is allowed",
        "\(rounded(token)) ms a token, \(rounded(prompt)) ms a token of a prompt", "loaded in \(package.seconds) s",
        package.placement?.summary,
    ]
    return parts.compactMap { $0 }.joined(separator: "; ")
}

/// The median of some tokens of one slot, one after another.
private func tokenMilliseconds(_ package: LoadedPackage) throws -> Double {
    try package.executor.reset()
    let x = values(1, package)
    let times = try (0..<min(16, package.manifest.context)).map { position in
        try milliseconds { _ = try package.executor.decode(slots: [0], positions: [position], x: x) }
    }
    return times.sorted()[times.count / 2]
}

/// Of the second of two chunks: the first may be slower than any after it.
private func promptMilliseconds(_ package: LoadedPackage) throws -> Double {
    try package.executor.reset()
    let tokens = package.manifest.chunk
    let x = values(tokens, package)
    let times = try (0..<2).map { _ in
        try milliseconds { _ = try package.executor.prefill(slot: 0, position: 0, x: x, tokens: tokens) }
    }
    return times[1] / Double(tokens)
}

/// Hidden states that are all 1, in float16.
private func values(_ tokens: Int, _ package: LoadedPackage) -> [UInt8] {
    Array(repeatElement([0x00, 0x3c], count: tokens * package.manifest.embed).joined())
}

private func milliseconds(_ work: () throws -> Void) rethrows -> Double {
    let begun = DispatchTime.now().uptimeNanoseconds
    try work()
    return Double(DispatchTime.now().uptimeNanoseconds - begun) / 1e6
}

private func rounded(_ value: Double) -> Double {
    (value * 100).rounded() / 100
}
