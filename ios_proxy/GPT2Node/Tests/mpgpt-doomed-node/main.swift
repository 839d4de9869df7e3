// A node whose first compute unit ends the program, and whose second copies: what happens to an app at its next start.
//
// mpgpt-doomed-node STORE PACKAGE SYSTEM [again] loads the package, prints what happened, and serves with the token of the
// tests until it is ended. `again` has it forget failures first.

import Foundation
import MPGPTNode
import MPGPTWire

/// y is x.
private final class Copier: Predictor {
    let unit = "a copier"

    func predict(_ function: Function, _ inputs: Inputs) throws -> Tensor {
        guard let x = inputs["x"] else { throw ComputeError.failed("no x") }
        return x
    }

    func reset() {}
}

@Sendable private func say(_ line: String) {
    FileHandle.standardOutput.write(Data("\(line)\n".utf8))
}

private func fail(_ text: String) -> Never {
    say(text)
    exit(1)
}

let arguments = CommandLine.arguments
guard arguments.count >= 4, let token = Token(Array("a token that both ends have".utf8)) else {
    fail("usage: mpgpt-doomed-node STORE PACKAGE SYSTEM [again]")
}
// The system ends an app in this way, and no handler runs.
let deadly = ComputeUnit(name: "a deadly unit", mayEndProgram: true) { _ in
    kill(getpid(), SIGKILL)
    return Copier()
}
let copying = ComputeUnit(name: "a copier", mayEndProgram: true) { _ in Copier() }
do {
    let device = Device(name: "doomed", system: arguments[3], app: "a test", memory: 0)
    var options = NodeServer.Options(token: token, device: device, units: [deadly, copying])
    options.port = 0
    options.package = try MPGPTNode.Bundle(folder: arguments[2])
    let server = NodeServer(options, store: try Store(folder: arguments[1])) { say($0.line) }
    if arguments.count > 4 { server.tryAgain() }
    _ = try server.listen()
    try server.loadPackage()
    server.start()
    withExtendedLifetime(server) { dispatchMain() }
} catch {
    fail(sentence(error))
}
