// mpgpt-node: the iPad's node as a program for Linux and macOS, from its options.
//
// Knows: what the options mean, signals, exit statuses.
// Must not know: the wire, how a package is kept or run.

import Foundation
import MPGPTNode

signal(SIGPIPE, SIG_IGN)  // a child that has died is an error like another
exit(run())

/// The exit status, where it is known before the node has served anybody.
func run() -> Int32 {
    do {
        let options = try Options(Array(CommandLine.arguments.dropFirst()))
        switch options.command {
        case .help: say(Options.help)
        case .check(let package): try check(package, options)
        case .serve: try serve(options)
        }
        return 0
    } catch let error as UsageError {
        complain(error.text)
        return 2
    } catch {
        complain(sentence(error))
    }
    return 1
}

/// Serves until a signal ends it.
func serve(_ options: Options) throws {
    let package = try options.package.map { try MPGPTNode.Bundle(package: expanded($0)) }
    let token = try options.token()
    var node = NodeServer.Options(
        token: token, device: .here(app: "mpgpt-node 0.1.0"), units: Units.make(options))
    (node.host, node.port, node.package) = (options.host, options.port, package)
    let store = try Store(folder: expanded(options.store), compiles: Units.compiles)
    let server = NodeServer(node, store: store) { report in
        if !report.isFigures { say(report.line) }
    }
    do {
        _ = try server.listen()
    } catch {
        throw UsageError(text: "cannot listen on \(options.host):\(options.port): \(error.text)")
    }
    for number in [SIGINT, SIGTERM] {
        signal(number, SIG_IGN)  // the source below is told all the same
        let source = DispatchSource.makeSignalSource(signal: number, queue: .global())
        source.setEventHandler {
            // Its handler keeps it: nothing that follows `dispatchMain` would, in an optimised build.
            withExtendedLifetime(source) { server.stop { exit(0) } }
        }
        source.resume()
    }
    remark("the token's fingerprint is \(token.fingerprint)")
    if options.triesAgain { server.tryAgain() }
    try server.loadPackage()
    server.start()
    dispatchMain()
}

func say(_ line: String) {
    try? FileHandle.standardOutput.write(contentsOf: Data("\(line)\n".utf8))
}

func complain(_ sentence: String) {
    remark("Error: \(sentence)")
}

/// Prints what is no result.
func remark(_ line: String) {
    try? FileHandle.standardError.write(contentsOf: Data("\(line)\n".utf8))
}
