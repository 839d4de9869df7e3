// The command line of mpgpt-node, which is that of `mpgpt ipad-node`.
//
// Knows: which options there are, their bounds and defaults, how a token file is read.
// Must not know: what is done with them.

import Foundation
import MPGPTWire

/// A command line that asks for something impossible.
struct UsageError: Error {
    let text: String
}

struct Options {
    enum Command {
        case serve
        case check(package: String)
        case help
    }

    var command = Command.serve
    var package: String?
    var host = "127.0.0.1"
    var port = 8000
    var tokenFile: String?
    var store = "\(ProcessInfo.processInfo.environment["MPGPT_HOME"] ?? "~/.cache/mpgpt")/ipad"
    /// What packages are run on, in the order in which it is tried.
    var units = Units.default
    var triesAgain = false
    var threads = 1
    var python = "python3"
    /// Seconds.
    var timeout = 60

    static let help = """
        Usage: mpgpt-node [OPTIONS]
               mpgpt-node check PACKAGE [--units LIST] [--try-again] [--python PATH] [--threads N] [--timeout N]

        Run a Core ML package for the proxy rank that dials. Without --package it waits for one that the proxy sends,
        and keeps it. `check` loads a package on each unit, runs its self-test, and says how far it is off and how long a
        token takes.

          --package PATH     What `mpgpt convert coreml` wrote.  [default: none yet]
          --host TEXT        Where to listen.  [default: 127.0.0.1]
          --port N           0: any that is free.  [default: 8000]
          --token-file PATH  Holds the token that the proxy rank has too.
          --store PATH       Keeps the packages that a proxy sends.  [default: ~/.cache/mpgpt/ipad, or MPGPT_HOME/ipad]
          --units LIST       What packages are run on, in this order: \(Units.help).
                             [default: \(Units.default.joined(separator: ","))]
          --try-again        Tries units again that ended the program.
          --threads N        Of the evaluator.  [default: 1]
          --python PATH      Has mpgpt, and is the evaluator.  [default: python3]
          --timeout N        Seconds that the evaluator may take for a call; ten times as many to load a package.
                             [default: 60]
        """

    init(_ arguments: [String]) throws(UsageError) {
        var rest = arguments[...]
        if rest.first == "check" {
            rest.removeFirst()
            guard let package = rest.popFirst(), !package.hasPrefix("-") else {
                throw UsageError(text: "check needs a package: mpgpt-node check NAME.mlpackage")
            }
            command = .check(package: package)
        }
        while let option = rest.popFirst() {
            if option == "--help" {
                command = .help
                return
            }
            if option == "--try-again" {
                triesAgain = true
                continue
            }
            let parts = option.split(separator: "=", maxSplits: 1).map(String.init)
            let name = parts.first ?? ""
            guard Options.names.contains(name) else { throw UsageError(text: "there is no option \(option)") }
            guard let value = parts.count == 2 ? parts[1] : rest.popFirst() else {
                throw UsageError(text: "\(name) needs a value")
            }
            try set(name, value)
        }
    }

    private static let names = [
        "--package", "--host", "--port", "--token-file", "--store", "--units", "--threads", "--python", "--timeout",
    ]

    private mutating func set(_ name: String, _ value: String) throws(UsageError) {
        switch name {
        case "--package": package = value
        case "--host": host = value
        case "--port": port = try number(name, value, in: 0...65535)
        case "--token-file": tokenFile = value
        case "--store": store = value
        case "--units": units = try Units.parse(value)
        case "--threads": threads = try number(name, value, in: 1...1024)
        case "--python": python = value
        case "--timeout": timeout = try number(name, value, in: 1...86400)
        default: preconditionFailure("an option without a meaning")
        }
    }

    private func number(_ name: String, _ value: String, in range: ClosedRange<Int>) throws(UsageError) -> Int {
        guard let number = Int(value), range.contains(number) else {
            throw UsageError(text: "\(name) is \(range.lowerBound) to \(range.upperBound), not \(value)")
        }
        return number
    }

    /// The token, which both ends were given.
    func token() throws(UsageError) -> Token {
        guard let tokenFile else {
            throw UsageError(text: "an iPad node needs --token-file, the same token as the proxy rank's")
        }
        let how = "make one with: mpgpt ipad-token \(tokenFile)"
        guard let file = FileHandle(forReadingAtPath: expanded(tokenFile)) else {
            throw UsageError(
                text: "there is no token file \(tokenFile) that could be read; \(how); the iPad needs the same")
        }
        let bytes = (try? file.read(upToCount: 2 * Limits.token.upperBound)) ?? nil
        guard let token = Token(Array(bytes ?? Data())) else {
            let bounds = "\(Limits.token.lowerBound) to \(Limits.token.upperBound)"
            throw UsageError(text: "the token in \(tokenFile) does not have the \(bounds) bytes that are taken; \(how)")
        }
        return token
    }
}

/// A path whose `~` is the home folder.
func expanded(_ path: String) -> String {
    NSString(string: path).expandingTildeInPath
}
