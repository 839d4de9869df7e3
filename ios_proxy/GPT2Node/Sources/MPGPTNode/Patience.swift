// The times and numbers that the listener keeps to.
//
// Knows: what `ios_proxy/PROTOCOL.md` says of them.
// Must not know: who waits, and for what.

import Dispatch
import MPGPTWire

/// How long the node waits for what, in seconds. Tests shorten it.
public struct Patience: Sendable {
    /// Both proofs must be right this long after a connection began.
    public var handshake = Times.handshake
    /// The longest silence of a proxy that has proved itself.
    public var silence = Times.proxySilence
    /// A proxy that comes while another is served waits this long for that one to leave.
    public var newcomer = 5.0
    /// A proxy that is there sends something more often than this.
    public var life = 3.0
    /// LOADING is sent this often.
    public var loading = 5.0
    /// An ERROR is given this long to arrive.
    public var linger = Times.linger
    /// Figures of what is computed are told this often.
    public var figures = 1.0
    /// How often all of these are looked at.
    public var tick = 0.1
    /// Connections at once that have not proved themselves.
    public var strangers = Limits.strangers

    public init() {}

    /// Seconds on a clock that never goes back.
    static var now: Double { Double(DispatchTime.now().uptimeNanoseconds) / 1e9 }
}
