// The link that brings the shared token: `mpgpt-ipad://pair?token=...`, as `mpgpt ipad-token --qr` prints it.
//
// Knows: the link's form, to the character; what a person is asked before a token takes another's place.
// Must not know: where a token is kept, how a link is opened.

import MPGPTWire

/// What keeps a link from being one, for a person.
public struct PairingError: Error, Sendable, Hashable {
    public let text: String
}

/// A token that came by a link.
public struct Pairing: Sendable {
    public static let scheme = "mpgpt-ipad"
    private static let start = "\(scheme)://pair?token="

    /// The token's bytes, which are secret.
    public let secret: [UInt8]
    public let token: Token

    /// Reads a link of exactly that form: no other parameter, nothing behind the token, which is percent-encoded.
    public init(link: String) throws(PairingError) {
        let how = "show the code of `mpgpt ipad-token --qr` to the camera, or copy the link below it"
        guard link.utf8.starts(with: Pairing.start.utf8) else {
            throw PairingError(text: "This is no pairing link: \(how).")
        }
        guard let secret = Pairing.decoded(link.utf8.dropFirst(Pairing.start.utf8.count)) else {
            throw PairingError(text: "The pairing link is damaged: \(how).")
        }
        guard Limits.token ~= secret.count else {
            let (least, most) = (Limits.token.lowerBound, Limits.token.upperBound)
            throw PairingError(
                text: "The token in the link has \(secret.count) bytes; \(least) to \(most) are taken: \(how).")
        }
        guard let token = Token(secret), token.isExactly(secret) else {
            throw PairingError(text: "The token in the link has white space around it: \(how).")
        }
        (self.secret, self.token) = (secret, token)
    }

    /// What a person is asked before the token is taken, since any page and any app may open a link; nil where it is
    /// the one that is there.
    public func question(replacing current: Token?) -> String? {
        guard let current else {
            return "Take the token \(token.fingerprint)? `mpgpt ipad-token` prints the same digits beside the ring."
        }
        guard current.fingerprint != token.fingerprint else { return nil }
        return "This iPad has the token \(current.fingerprint). Take \(token.fingerprint) in its place? "
            + "A ring with the old one is then refused."
    }

    /// The bytes that percent-encoding stands for; nil where a character should have been encoded, or is so badly.
    private static func decoded(_ text: Substring.UTF8View) -> [UInt8]? {
        var bytes: [UInt8] = []
        var rest = text[...]
        while let first = rest.popFirst() {
            if isPlain(first) {
                bytes.append(first)
                continue
            }
            guard first == UInt8(ascii: "%"), let high = rest.popFirst(), let low = rest.popFirst(),
                let byte = [UInt8](hex: String(decoding: [high, low], as: UTF8.self))
            else { return nil }
            bytes += byte
        }
        return bytes
    }

    /// RFC 3986's unreserved characters.
    private static func isPlain(_ byte: UInt8) -> Bool {
        switch byte {
        case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
            UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "."), UInt8(ascii: "_"),
            UInt8(ascii: "~"):
            true
        default: false
        }
    }
}
