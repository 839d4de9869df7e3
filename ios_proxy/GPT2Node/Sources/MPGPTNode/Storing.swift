// The store on a queue of its own: bundles are looked for, taken in and hashed there, while the net queue goes on.
//
// Knows: the store, and whose bundle is on its way in.
// Must not know: connections, what is sent to a proxy.

import Dispatch
import MPGPTWire
import Synchronization

/// The queue on which the store is used. Answers come on that queue, too.
final class Storing: @unchecked Sendable {  // `store` and `arrivals` are touched on the queue alone
    enum Answer: Sendable {
        /// The bundle is here, and checked.
        case whole(Bundle)
        /// So many bytes of it are here.
        case partial(UInt64, of: UInt64)
        case refused(StoreError)
    }

    let queue = DispatchQueue(label: "mpgpt.store", qos: .utility)
    private let store: Store
    private let package: Bundle?
    /// By the number of the visitor who sends it.
    private var arrivals: [Int: PartialBundle] = [:]
    private let kept: Mutex<[String]>

    /// `package` is a bundle that need not be sent.
    init(_ store: sending Store, package: Bundle?) {
        self.package = package
        kept = Mutex(store.hashes())
        self.store = store
    }

    /// The hashes of the bundles that are kept. May be read on any queue.
    var hashes: [String] {
        kept.withLock { $0 }
    }

    /// Looks for an offered bundle, and gets ready to take in what is missing of it.
    func take(_ offer: Message.Offer, from visitor: Int, then answer: @escaping @Sendable (Answer) -> Void) {
        queue.async {
            answer(self.answer { () throws(StoreError) -> Answer in
                if let bundle = self.find(offer.bundle.bytes) { return .whole(bundle) }
                self.arrivals[visitor] = try self.store.receive(offer)
                return try self.progress(of: visitor)
            })
        }
    }

    /// Takes the next bytes in, and checks the bundle when they were the last.
    func write(_ piece: [UInt8], from visitor: Int, then answer: @escaping @Sendable (Answer) -> Void) {
        queue.async {
            answer(self.answer { () throws(StoreError) -> Answer in
                try self.arrivals[visitor]?.write(piece)
                return try self.progress(of: visitor)
            })
        }
    }

    /// Keeps what came of a bundle whose visitor has gone.
    func leave(_ visitor: Int) {
        queue.async {
            self.arrivals.removeValue(forKey: visitor)?.close()
        }
    }

    /// What is kept, for a person.
    func packages(then answer: @escaping @Sendable ([KeptPackage]) -> Void) {
        queue.async { answer(self.store.packages()) }
    }

    /// Removes a bundle that a proxy sent.
    func delete(_ hash: String) {
        queue.async {
            self.store.delete(hash)
            let hashes = self.store.hashes()
            self.kept.withLock { $0 = hashes }
        }
    }

    private func find(_ digest: [UInt8]) -> Bundle? {
        if let package, package.hash == digest { return package }
        return store.find(digest)
    }

    private func progress(of visitor: Int) throws(StoreError) -> Answer {
        guard let arrival = arrivals[visitor] else { throw StoreError("nobody waits for these bytes any more") }
        guard arrival.have == arrival.total else { return .partial(arrival.have, of: arrival.total) }
        arrivals[visitor] = nil
        return .whole(try arrival.finish())
    }

    private func answer(_ work: () throws(StoreError) -> Answer) -> Answer {
        defer {
            let hashes = store.hashes()
            kept.withLock { $0 = hashes }
        }
        do {
            return try work()
        } catch {
            return .refused(error)
        }
    }
}
