// What a person sees of the packages that a node keeps.
//
// Knows: which files tell it.
// Must not know: how packages come and go (`Store.swift`), views.

/// A package that is kept. Its files are not hashed for it.
public struct KeptPackage: Sendable, Hashable, Identifiable {
    /// In hex.
    public let hash: String
    /// Of its files.
    public let bytes: UInt64
    let package: NodeState.Package

    public var id: String { hash }
}

extension Store {
    /// Those that are whole, by model and layers.
    func packages() -> [KeptPackage] {
        hashes().compactMap { hash in
            let path = "\(folder)/\(hash)"
            let json = try? Disk.read("\(path)/manifest.json", limit: Manifest.maxBytes)
            guard let manifest = json.flatMap({ try? Manifest(json: $0) }) else { return nil }
            let bytes = Disk.files(below: path).reduce(0) { $0 + Disk.size(of: "\(path)/\($1)") }
            return KeptPackage(
                hash: hash, bytes: bytes, package: NodeState.Package(model: manifest.model, layers: manifest.layers))
        }.sorted {
            ($0.package.model, $0.package.layers.lowerBound, $0.hash) < (
                $1.package.model, $1.package.layers.lowerBound, $1.hash
            )
        }
    }
}

extension KeptPackage {
    public var title: String { package.title }

    public var size: String { Figures.bytes(bytes) }

    /// As the proxy prints it: the hash's beginning.
    public var shortHash: String { String(hash.prefix(12)) }

    /// What came of it when it was last loaded.
    public func outcome(in state: NodeState) -> String {
        switch state.outcomes[package] {
        case .success(let loaded):
            "\(loaded.placement?.summary ?? loaded.unit); the self-test is off by "
                + Figures.decimals(loaded.difference, 4)
        case .failure(let error): "It cannot be run: \(error.text)."
        case nil: "Not loaded since the app was started."
        }
    }
}
