// swift-tools-version: 6.0
// The Swift package of the iPad's node: libraries of Swift alone, so that Swift Playground on an iPad builds them too.
//
// MPGPTWire is the link's protocol without I/O. What keeps packages, runs them and listens depends on it, never the
// other way round.

import PackageDescription

let package = Package(
    name: "GPT2Node",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "MPGPTWire", targets: ["MPGPTWire"]),
        .library(name: "MPGPTNode", targets: ["MPGPTNode"]),
    ],
    targets: [
        .target(name: "MPGPTWire"),
        .target(name: "MPGPTNode", dependencies: ["MPGPTWire"]),
        .executableTarget(name: "mpgpt-wire-probe", dependencies: ["MPGPTWire"]),
        .testTarget(name: "MPGPTWireTests", dependencies: ["MPGPTWire"]),
        .testTarget(name: "MPGPTNodeTests", dependencies: ["MPGPTNode", "MPGPTWire"]),
    ],
    swiftLanguageModes: [.v6]
)
