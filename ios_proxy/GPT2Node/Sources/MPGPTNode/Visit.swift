// One proxy's connection, from its first byte to its last, with its session.
//
// Knows: what the node does at each command, when a connection is over and how it ends.
// Must not know: which proxy is served (`Listener.swift`), what a command computes or stores, bytes of frames.
//
// All of it happens on the net queue. What computes and what stores answers on its own queue, and the answer is carried
// over here.

import Dispatch
import MPGPTWire

/// Whom a visit tells of its course, on the net queue.
protocol VisitHost: AnyObject, Sendable {
    /// The proxy has proved itself, and waits to be served.
    func visitHasProved(_ visit: Visit)
    /// Nothing that it sends is listened to any more; it may still be told something.
    func visitIsLeaving(_ visit: Visit)
    /// Nothing of it is left.
    func visitHasEnded(_ visit: Visit)
}

final class Visit: @unchecked Sendable {  // all of it is touched on the net queue alone
    private enum Phase {
        case open
        /// The last words are being sent; `isSaid` when they are, and the other end is given the time to read them.
        case leaving(since: Double, isSaid: Bool)
        case closed
    }

    /// More than this is not taken in from a proxy that sends faster than things can be stored, or sent back.
    private static let backlog = 8 << 20

    let number: Int
    /// The proxy's address.
    let name: String
    private let parts: Parts
    private weak var host: (any VisitHost)?
    private let channel: Channel
    private let begun: Double
    private var session: NodeSession
    private var phase = Phase.open
    private let epochs = Epochs()
    private var bundle: Bundle?
    /// Bytes of the bundle that were not stored yet.
    private var unstored = 0
    private var loadingSince: Double?

    init(_ number: Int, name: String, socket: Socket, session: NodeSession, parts: Parts, host: any VisitHost) {
        (self.number, self.name, self.session, self.parts, self.host) = (number, name, session, parts, host)
        channel = Channel(socket, queue: parts.net)
        begun = Patience.now
    }

    var isAuthenticated: Bool { session.isAuthenticated }
    var lastHeard: Double { session.lastHeard }

    func start() {
        channel.watch { [weak self] in
            self?.read()
        } onWritable: { [weak self] in
            self?.proceed()
        }
    }

    // MARK: - What the listener has it do

    /// This proxy is the one to be served.
    func admit() {
        session.admit()
        proceed()
    }

    /// Sends an ERROR about no request, and leaves.
    func refuse(_ code: ErrorCode, _ text: String) {
        session.error(code, text)
        leave(text)
    }

    func sayGoodBye() {
        session.bye()
        leave("the node ends")
    }

    /// Looks at the clock.
    func tick(_ now: Double) {
        switch phase {
        case .open:
            if !isAuthenticated, now - begun > parts.patience.handshake { leave("it did not prove itself in time") }
            if isAuthenticated, now - lastHeard > parts.patience.silence {
                let silence = parts.patience.silence
                leave("nothing was heard of it", telling: .silent(proxy: name, seconds: silence))
            }
            if let since = loadingSince, now - since > parts.patience.loading {
                loadingSince = now
                session.loading("loading its package")
                proceed()
            }
        case .leaving(let since, _):
            if now - since > parts.patience.linger { close() }
        case .closed: break
        }
    }

    // MARK: - Bytes

    private func read() {
        do {
            switch try channel.receive() {
            case .bytes(let bytes): take(bytes)
            case .nothing: break
            case .end: end("it closed the connection")
            }
        } catch {
            end(error.text)
        }
    }

    private func take(_ bytes: [UInt8]) {
        guard case .open = phase else { return }
        do {
            for command in try session.receive(bytes, now: Patience.now) {
                execute(command)
            }
        } catch {
            if !isAuthenticated { reportStranger(error.reason) }
            leave(error.text)
        }
        proceed()
    }

    /// What a person can do something about.
    private func reportStranger(_ reason: SessionError.Reason) {
        switch reason {
        case .received(.badToken), .refused(.badToken): parts.report(.anotherToken(proxy: name))
        case .received(.badVersion), .refused(.badVersion): parts.report(.anotherVersion(proxy: name))
        default: break
        }
    }

    /// Sends what there is to send, and goes on with what waited for that.
    private func proceed() {
        if case .closed = phase { return }
        do {
            try channel.send(&session.out)
        } catch {
            return end(error.text)
        }
        channel.wantsToWrite = !session.out.isEmpty
        switch phase {
        case .open: channel.wantsToRead = session.out.count + unstored < Visit.backlog
        case .leaving(let since, isSaid: false) where session.out.isEmpty:
            channel.shutDownSending()
            channel.wantsToRead = true
            phase = .leaving(since: since, isSaid: true)
        case .leaving, .closed: break
        }
    }

    // MARK: - The end

    /// Sends what is still to be said, and closes when it has arrived, or cannot any more. A socket that is closed over
    /// unread bytes is reset, and what was sent last may be lost with it.
    private func leave(_ why: String, telling report: Report? = nil) {
        guard case .open = phase else { return }
        phase = .leaving(since: Patience.now, isSaid: false)
        epochs.advance()
        parts.storing.leave(number)
        if isAuthenticated { parts.report(report ?? .gone(proxy: name, why: why)) }
        host?.visitIsLeaving(self)
        if session.out.isEmpty { close() } else { proceed() }
    }

    /// The other end has closed, or cannot be reached any more.
    private func end(_ why: String) {
        session.out = []
        leave(why)
        close()
    }

    private func close() {
        if case .closed = phase { return }
        phase = .closed
        channel.close()
        host?.visitHasEnded(self)
    }

    // MARK: - Commands

    private func execute(_ command: Command) {
        switch command {
        case .proof: host?.visitHasProved(self)
        case .offer(let offer):
            parts.storing.take(offer, from: number, then: here { $0.takeBeginning($1) })
        case .data(let data):
            unstored += data.piece.count
            parts.storing.write(data.piece, from: number, then: here { $0.take($1, after: data.piece.count) })
        case .load:
            guard let bundle else { return }
            loadingSince = Patience.now
            parts.computing.load(bundle, epochs.ticket, then: here { $0.take($1) })
        case .reset:
            epochs.advance()
            parts.computing.reset(epochs.ticket, onFailure: here { $0.refuse(.computeFailed, $1.text) })
        case .request(let request):
            parts.computing.compute(request, epochs.ticket, then: here { $0.take($1, to: request) })
        }
    }

    /// Carries an answer over to the net queue, unless the visit is over by then.
    private func here<Answer: Sendable>(
        _ take: @escaping @Sendable (Visit, Answer) -> Void
    ) -> @Sendable (Answer) -> Void {
        { [weak self] answer in
            guard let self else { return }
            parts.net.async {
                guard case .open = self.phase else { return }
                take(self, answer)
                self.proceed()
            }
        }
    }

    private func takeBeginning(_ answer: Storing.Answer) {
        switch answer {
        case .whole(let bundle):
            session.want(offset: bundle.length)
            keep(bundle)
        case .partial(let have, let total):
            session.want(offset: have)
            parts.report(.receiving(bytes: have, of: total))
        case .refused(let error): refuse(error)
        }
    }

    private func take(_ answer: Storing.Answer, after count: Int) {
        unstored -= count
        switch answer {
        case .whole(let bundle):
            parts.report(.received(bytes: bundle.length, of: bundle.length))
            keep(bundle)
        case .partial(let have, let total):
            let (before, percent) = (Figures.percent(have - UInt64(count), of: total), Figures.percent(have, of: total))
            if percent > before { parts.report(.received(bytes: have, of: total)) }
        case .refused(let error): refuse(error)
        }
    }

    private func keep(_ bundle: Bundle) {
        self.bundle = bundle
        session.stored()
    }

    private func refuse(_ error: StoreError) {
        parts.report(.refused(error))
        refuse(error.kind == .noSpace ? .noSpace : .badBundle, error.text)
    }

    private func take(_ answer: Result<JSONObject, LoadError>) {
        loadingSince = nil
        switch answer {
        case .success(let facts): session.ready(facts)
        case .failure(let error): refuse(.loadFailed, error.text)
        }
    }

    private func take(_ answer: Computing.Answer, to request: Request) {
        switch answer {
        case .result(let bytes, let nanoseconds):
            let x = request.x
            if let y = Values(dtype: x.dtype, tokens: x.tokens, embed: x.embed, bytes: bytes) {
                session.result(request, y, computeNanoseconds: nanoseconds)
            } else {
                session.error(.computeFailed, "a result of \(bytes.count) bytes", for: request)
            }
        case .failure(.badPosition(let text)): session.error(.badPos, text, for: request)
        case .failure(.failed(let text)): session.error(.computeFailed, text, for: request)
        }
    }
}
