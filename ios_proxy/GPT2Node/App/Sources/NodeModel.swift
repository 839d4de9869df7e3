// The node as the views see it: its state, folded from one stream of reports, and what a person may do.
//
// Knows: the server's beginning and end, where packages and the log lie, when the device is looked at.
// Must not know: words (`Presentation`), views, how anything is computed or sent.

import Foundation
import MPGPTNode
import MPGPTWire
import Observation
import Synchronization

@MainActor @Observable
final class NodeModel {
    static let version = "GPT2Node 0.1.0"
    private static let port = 8000
    /// Between two looks at the device.
    private static let rest = Duration.seconds(2)

    private(set) var state = NodeState()
    /// The clock of the state.
    private(set) var now = NodeModel.clock
    private(set) var packages: [KeptPackage] = []
    private(set) var log: EventLog
    /// What a person is asked about a token that has come.
    private(set) var question = ""
    var isAsked = false
    /// What came of the last link, where nothing is asked.
    private(set) var pairingNote: String?

    @ObservationIgnored private let tokens = TokenStore()
    @ObservationIgnored private let health = SampledHealth()
    @ObservationIgnored private let device: Device
    @ObservationIgnored private let folder: String
    @ObservationIgnored private let logFile: LogFile
    @ObservationIgnored private let reports: AsyncStream<Report>
    @ObservationIgnored private let reporting: AsyncStream<Report>.Continuation
    @ObservationIgnored private var token: Token?
    @ObservationIgnored private var proposed: Pairing?
    @ObservationIgnored private var server: NodeServer?
    /// The last step into the background or out of it: they never overlap.
    @ObservationIgnored private var lastStep: Task<Void, Never>?

    init() {
        device = .shown(app: NodeModel.version)
        folder = "\(NodeModel.path(of: .applicationSupportDirectory))/packages"
        logFile = LogFile(folder: NodeModel.path(of: .documentDirectory))
        log = EventLog(heading: "\(NodeModel.version) on \(Device.hardware), \(device.system)")
        (reports, reporting) = AsyncStream.makeStream()
        token = tokens.load()
        state.fingerprint = token?.fingerprint
        state.system = ProcessInfo.processInfo.operatingSystemVersion.majorVersion
        logFile.append(log.text)
        Task { await takeReports() }
        Task { await lookAtDevice() }
    }

    private static func path(of directory: FileManager.SearchPathDirectory) -> String {
        FileManager.default.urls(for: directory, in: .userDomainMask)[0].path
    }

    var presentation: Presentation { Presentation(state, now: now) }

    // MARK: - The stream and the clock

    private static var clock: Double { Date.now.timeIntervalSinceReferenceDate }

    private func takeReports() async {
        for await report in reports {
            now = NodeModel.clock
            state.take(report, at: now)
            guard !report.isFigures else { continue }
            logFile.append(log.append(report.line, at: .now))
            if case .loaded = report { listPackages() }
        }
    }

    private func lookAtDevice() async {
        while !Task.isCancelled {
            (state.health, state.isLowPower, state.addresses) = (health.sample(), Health.isLowPower, Addresses.here)
            now = NodeModel.clock
            try? await Task.sleep(for: NodeModel.rest)
        }
    }

    // MARK: - Foreground and background

    func enterForeground() {
        stayAwake()
        follow { await self.open() }
    }

    /// The system suspends the app soon, and closes its sockets then: the proxy is told before.
    func enterBackground() {
        let time = BackgroundTime(for: "good-bye")
        follow { await self.close() }
        // What is computed or loaded goes on behind that for as long as the system lets it. Who comes back meanwhile does
        // not wait for it.
        let closed = lastStep
        Task {
            await closed?.value
            await self.drain()
            time.end()
        }
    }

    private func follow(_ step: @escaping @MainActor () async -> Void) {
        let before = lastStep
        lastStep = Task {
            await before?.value
            await step()
        }
    }

    /// Listens, unless it does already.
    private func open() async {
        guard let token else { return }
        do {
            let server = try server ?? makeServer(token)
            self.server = server
            _ = try server.listen()
            server.start()
            listPackages()
        } catch {
            let why = sentence(error)
            state.listening = error is SocketError ? .failed(port: NodeModel.port, why: why) : .noStore(why: why)
            logFile.append(log.append("cannot listen: \(sentence(error))", at: .now))
        }
    }

    private func makeServer(_ token: Token) throws -> NodeServer {
        var options = NodeServer.Options(token: token, device: device, units: computeUnits(in: folder))
        (options.host, options.port) = ("0.0.0.0", NodeModel.port)
        options.health = { [health] in health.last }
        let store = try Store(folder: folder, compiles: true)
        Disk.leaveOutOfBackups(folder)
        return NodeServer(options, store: store) { [reporting] in reporting.yield($0) }
    }

    /// Says good-bye.
    private func close() async {
        guard let server else { return }
        await withCheckedContinuation { done in server.stop { done.resume() } }
        state.stop()
    }

    /// Returns when nothing is computed or loaded any more.
    private func drain() async {
        guard let server else { return }
        await withCheckedContinuation { done in server.drain { done.resume() } }
    }

    // MARK: - Pairing

    /// Reads a link; the token in it is taken when a person says so.
    func propose(_ link: String) {
        guard !isAsked else { return }  // what a person reads is what is taken
        pairingNote = nil
        do throws(PairingError) {
            let pairing = try Pairing(link: link)
            proposed = pairing
            if let question = pairing.question(replacing: token) {
                (self.question, isAsked) = (question, true)
            } else {
                pairingNote = "This iPad has that token already."
            }
        } catch {
            pairingNote = error.text
        }
    }

    func answer(_ isTaken: Bool) {
        let pairing = proposed
        proposed = nil
        guard isTaken, let pairing else { return }
        do throws(TokenStoreError) {
            try tokens.save(pairing.secret)
        } catch {
            pairingNote = error.text
            return
        }
        (token, state.fingerprint) = (pairing.token, pairing.token.fingerprint)
        pairingNote = "Paired: the ring must show \(pairing.token.fingerprint), too."
        follow {
            await self.close()
            await self.drain()
            self.server = nil
            await self.open()
        }
    }

    // MARK: - Packages

    func listPackages() {
        server?.packages { packages in
            Task { @MainActor in self.packages = packages }
        }
    }

    func delete(_ package: KeptPackage) {
        server?.delete(package.hash)
        listPackages()
    }

    /// Has everything that failed tried again: the port at once, packages when the proxy asks next.
    func tryAgain() {
        server?.tryAgain()
        state.forgetFailures()
        follow { await self.open() }
    }
}
