// The state of the device: what PONG carries, and who the device is, for INFO.
//
// Knows: where each system says it.
// Must not know: who asks. UIKit: the app hands in a battery that it has sampled on its main queue.

import Foundation
import MPGPTWire

#if canImport(Glibc)
    import Glibc
#elseif canImport(os)
    import os
#endif

/// The device's state at one moment; nil is what is not known.
public struct Health: Sendable, Hashable {
    public var thermal = "unknown"
    /// 0 to 1.
    public var battery: Double?
    public var isCharging: Bool?
    /// Bytes of memory.
    public var free: Int?

    public init() {}

    /// All that this system tells without a user interface.
    public static var now: Health {
        var health = Health()
        health.thermal = thermalState
        health.free = freeMemory
        return health
    }

    /// Whether a person has the system save the battery.
    public static var isLowPower: Bool {
        #if canImport(Darwin)
            ProcessInfo.processInfo.isLowPowerModeEnabled
        #else
            false
        #endif
    }

    public var facts: JSONObject {
        [
            "thermal": .string(thermal), "battery": battery.map(JSONValue.number) ?? .null,
            "charging": isCharging.map(JSONValue.bool) ?? .null, "free": free.map(JSONValue.integer) ?? .null,
        ]
    }
}

/// What a node says of itself.
public struct Device: Sendable, Hashable {
    public var name: String
    public var system: String
    /// The program's name and version.
    public var app: String
    /// Bytes.
    public var memory: Int

    public init(name: String, system: String, app: String, memory: Int) {
        (self.name, self.system, self.app, self.memory) = (name, system, app, memory)
    }

    /// This machine, with its name in the network.
    public static func here(app: String) -> Device {
        var name = [CChar](repeating: 0, count: 256)
        gethostname(&name, name.count - 1)
        let process = ProcessInfo.processInfo
        return Device(
            name: String(decoding: name.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self),
            system: process.operatingSystemVersionString, app: app, memory: Int(clamping: process.physicalMemory))
    }

    /// The machine's model, as its maker numbers them.
    public static var hardware: String {
        var info = utsname()
        uname(&info)
        return withUnsafeBytes(of: info.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    }

    /// INFO's.
    func facts(bundles: [String]) -> JSONObject {
        [
            "name": .string(name), "system": .string(system), "app": .string(app), "protocol": 1,
            "memory": .integer(memory), "bundles": .array(bundles.map(JSONValue.string)),
        ]
    }
}

private var thermalState: String {
    #if canImport(Darwin)
        switch ProcessInfo.processInfo.thermalState {
        case .nominal: "nominal"
        case .fair: "fair"
        case .serious: "serious"
        case .critical: "critical"
        @unknown default: "unknown"
        }
    #else
        "unknown"
    #endif
}

private var freeMemory: Int? {
    #if os(iOS)
        os_proc_available_memory()
    #elseif os(Linux)
        availableMemory(in: contents(of: "/proc/meminfo"))
    #else
        nil
    #endif
}

/// Linux's estimate of what a program can still have.
func availableMemory(in meminfo: String) -> Int? {
    let line = meminfo.split(separator: "\n").first { $0.hasPrefix("MemAvailable:") }
    let kibibytes = line?.split(separator: " ").dropFirst().first.flatMap { Int($0) }
    return kibibytes.map { $0 << 10 }
}

/// The beginning of a file that has no length, as those in /proc.
private func contents(of path: String) -> String {
    let descriptor = open(path, O_RDONLY)
    guard descriptor >= 0 else { return "" }
    defer { close(descriptor) }
    let bytes = [UInt8](unsafeUninitializedCapacity: 4096) { buffer, count in
        count = max(0, read(descriptor, buffer.baseAddress, buffer.count))
    }
    return String(decoding: bytes, as: UTF8.self)
}
