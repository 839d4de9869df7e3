// swift-tools-version: 6.0
// The Swift package of the iPad's node: libraries of Swift alone, so that Swift Playground on an iPad builds them too.
//
// MPGPTWire is the link's protocol without I/O. MPGPTNode keeps packages, runs them and listens. mpgpt-node is the
// program for Linux and macOS; on Linux a Python child executes packages.

import PackageDescription

let package = Package(
    name: "GPT2Node",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "MPGPTWire", targets: ["MPGPTWire"]),
        .library(name: "MPGPTNode", targets: ["MPGPTNode"]),
        .executable(name: "mpgpt-node", targets: ["mpgpt-node"]),
    ],
    targets: [
        .target(name: "MPGPTWire"),
        .target(name: "MPGPTNode", dependencies: ["MPGPTWire"]),
        .executableTarget(name: "mpgpt-node", dependencies: ["MPGPTNode", "MPGPTWire"]),
        .executableTarget(name: "mpgpt-wire-probe", dependencies: ["MPGPTWire"]),
        .target(name: "Dice", path: "Tests/Dice"),
        .testTarget(name: "MPGPTWireTests", dependencies: ["MPGPTWire", "Dice"]),
        .testTarget(name: "MPGPTNodeTests", dependencies: ["MPGPTNode", "MPGPTWire", "Dice"]),
    ],
    swiftLanguageModes: [.v6]
)
