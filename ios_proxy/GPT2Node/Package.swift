// swift-tools-version: 6.0
// The Swift package of the iPad's node: libraries of Swift alone, so that Swift Playground on an iPad builds them too.
//
// MPGPTWire is the link's protocol without I/O. MPGPTNode keeps packages, runs them and listens. MPGPTCoreML has Core ML
// execute them, and is empty where there is none (`Typecheck` checks it there). mpgpt-node is the program for Linux and
// macOS; on Linux a Python child executes packages.
//
// An iPad builds the app from it (Swift Playground), and a Mac does from App/GPT2Node.xcodeproj. There are no programs
// on an iPad: mpgpt-node starts a child, and is left out there.

import PackageDescription

#if canImport(AppleProductTypes) && os(iOS)
    import AppleProductTypes

    let products: [Product] = [
        .iOSApplication(
            name: "GPT2Node", targets: ["GPT2NodeApp"], bundleIdentifier: "org.mpgpt.node", displayVersion: "0.1.0",
            bundleVersion: "1", appIcon: .placeholder(icon: .tablet), accentColor: .presetColor(.blue),
            supportedDeviceFamilies: [.pad],
            supportedInterfaceOrientations: [
                .portrait, .portraitUpsideDown, .landscapeLeft, .landscapeRight,
            ],
            additionalInfoPlistContentFilePath: "App/Info.plist")
    ]
    let others: [Target] = [
        .executableTarget(
            name: "GPT2NodeApp", dependencies: ["MPGPTCoreML", "MPGPTNode", "MPGPTWire"], path: "App/Sources",
            resources: [.process("PrivacyInfo.xcprivacy")])
    ]
#else
    let products: [Product] = [
        .library(name: "MPGPTWire", targets: ["MPGPTWire"]),
        .library(name: "MPGPTNode", targets: ["MPGPTNode"]),
        .library(name: "MPGPTCoreML", targets: ["MPGPTCoreML"]),
        .executable(name: "mpgpt-node", targets: ["mpgpt-node"]),
    ]
    let others: [Target] = [
        .executableTarget(name: "mpgpt-node", dependencies: ["MPGPTCoreML", "MPGPTNode", "MPGPTWire"]),
        .executableTarget(name: "mpgpt-wire-probe", dependencies: ["MPGPTWire"]),
        .target(name: "Dice", path: "Tests/Dice"),
        .executableTarget(
            name: "mpgpt-doomed-node", dependencies: ["MPGPTNode", "MPGPTWire"], path: "Tests/mpgpt-doomed-node"),
        .testTarget(name: "MPGPTWireTests", dependencies: ["MPGPTWire", "Dice"]),
        .testTarget(name: "MPGPTNodeTests", dependencies: ["MPGPTNode", "MPGPTWire", "Dice", "mpgpt-doomed-node"]),
    ]
#endif

let package = Package(
    name: "GPT2Node",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: products,
    targets: [
        .target(name: "MPGPTWire"),
        .target(name: "MPGPTNode", dependencies: ["MPGPTWire"]),
        .target(name: "MPGPTCoreML", dependencies: ["MPGPTNode"]),
    ] + others,
    swiftLanguageModes: [.v6]
)
