// HMAC-SHA-256 (RFC 2104).
//
// Knows: SHA-256.
// Must not know: tokens, what is proved.

/// A keyed hash under way.
public struct HMAC: Sendable {
    private var inner = SHA256()
    private var outer = SHA256()

    public init(key: [UInt8]) {
        var block = key.count > SHA256.blockSize ? SHA256.hash(key).bytes : key
        block.append(contentsOf: repeatElement(0, count: SHA256.blockSize - block.count))
        inner.update(block.map { $0 ^ 0x36 })
        outer.update(block.map { $0 ^ 0x5c })
    }

    public mutating func update(_ bytes: some Collection<UInt8>) {
        inner.update(bytes)
    }

    public func finalize() -> Bytes32 {
        var outer = outer
        outer.update(inner.finalize().bytes)
        return outer.finalize()
    }
}
