// What UIKit tells of the device, and what it is asked for: all of it on the main actor.
//
// Knows: battery, name, the screen's timer, time in the background.
// Must not know: what a node does with any of it.

import MPGPTNode
import Synchronization
import UIKit

/// The device's state as it was last sampled. The net queue reads it for PONG.
final class SampledHealth: Sendable {
    private let value = Mutex(Health())

    var last: Health { value.withLock { $0 } }

    @MainActor func sample() -> Health {
        let device = UIDevice.current
        device.isBatteryMonitoringEnabled = true
        var health = Health.now
        health.battery = device.batteryLevel < 0 ? nil : Double(device.batteryLevel)
        health.isCharging =
            switch device.batteryState {
            case .charging, .full: true
            case .unplugged: false
            default: nil
            }
        value.withLock { $0 = health }
        return health
    }
}

extension Device {
    /// This device, by the name that it shows.
    @MainActor static func shown(app: String) -> Device {
        var device = Device.here(app: app)
        device.name = UIDevice.current.name
        return device
    }
}

/// Keeps the screen from locking, which would suspend the app.
@MainActor func stayAwake() {
    UIApplication.shared.isIdleTimerDisabled = true
}

/// Time that the system gives an app which is no longer shown: some seconds.
@MainActor final class BackgroundTime {
    private var identifier = UIBackgroundTaskIdentifier.invalid

    init(for purpose: String) {
        identifier = UIApplication.shared.beginBackgroundTask(withName: purpose) { [weak self] in self?.end() }
    }

    /// Must be called, or the system ends the app; it does itself when the time is over.
    func end() {
        guard identifier != .invalid else { return }
        UIApplication.shared.endBackgroundTask(identifier)
        identifier = .invalid
    }
}
