// swift-tools-version: 6.0
// What only Apple's systems can build, checked on Linux: our own sources against stubs of Apple's frameworks.
//
// Stubs/NAME declares what we use of the framework NAME, as its interface has it, and does nothing. Checked/NAME is a link
// to the real sources of the target NAME; `#if canImport(...)` is true there, since the stub is a module like another.
// What a stub says wrongly is not found out, nor is anything that happens when it runs.

import PackageDescription

/// Declarations of one of Apple's frameworks.
func stub(_ name: String, needs: [String] = []) -> Target {
    .target(name: name, dependencies: needs.map(Target.Dependency.init(stringLiteral:)), path: "Stubs/\(name)")
}

/// Sources of ours.
func checked(_ name: String, needs: [String] = []) -> Target {
    .target(name: name, dependencies: needs.map(Target.Dependency.init(stringLiteral:)), path: "Checked/\(name)")
}

let package = Package(
    name: "Typecheck",
    targets: [
        stub("CoreML"),
        stub("Security"),
        stub("UIKit"),
        stub("SwiftUI", needs: ["UIKit"]),
        checked("MPGPTWire"),
        checked("MPGPTNode", needs: ["MPGPTWire"]),
        checked("MPGPTCoreML", needs: ["CoreML", "MPGPTNode"]),
        .executableTarget(
            name: "mpgpt-node", dependencies: ["MPGPTCoreML", "MPGPTNode", "MPGPTWire"], path: "Checked/mpgpt-node"),
        .executableTarget(
            name: "GPT2NodeApp",
            dependencies: ["MPGPTCoreML", "MPGPTNode", "MPGPTWire", "Security", "SwiftUI", "UIKit"],
            path: "Checked/GPT2NodeApp"),
    ],
    swiftLanguageModes: [.v6]
)
