// What lets a job find out, on another queue, whether anybody still waits for it.
//
// Knows: numbers. Must not know: jobs, queues, why something is over.

import Synchronization

/// The epochs of one proxy: a RESET begins another, and its leaving ends the last.
final class Epochs: Sendable {
    private let current = Atomic<Int>(0)

    /// The epoch that is under way.
    var ticket: Ticket { Ticket(epochs: self, number: current.load(ordering: .acquiring)) }

    /// Makes every ticket so far worthless.
    func advance() {
        current.add(1, ordering: .acquiringAndReleasing)
    }

    fileprivate func isCurrent(_ number: Int) -> Bool {
        current.load(ordering: .acquiring) == number
    }
}

/// A job's epoch. A job without an epoch any more is left undone: nothing would be sent about it.
struct Ticket: Sendable {
    fileprivate let epochs: Epochs
    fileprivate let number: Int

    var isGood: Bool { epochs.isCurrent(number) }
}
