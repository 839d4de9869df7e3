// The token in the keychain: it stays on this device, and is in no backup.
//
// Knows: the keychain's calls.
// Must not know: what a token is for.

import Foundation
import MPGPTWire
import Security

/// Why a token cannot be kept, for a person.
struct TokenStoreError: Error {
    let text: String
}

struct TokenStore: Sendable {
    private static let service = "mpgpt-ipad"

    /// The token; nil where there is none, or none that can be read.
    func load() -> Token? {
        var query = self.query
        query[kSecReturnData as String] = true
        query[kSecMatchLimit as String] = kSecMatchLimitOne
        var found: CFTypeRef?
        guard SecItemCopyMatching(NSDictionary(dictionary: query) as CFDictionary, &found) == errSecSuccess,
            let data = found as? Data
        else { return nil }
        return Token(Array(data))
    }

    /// Keeps a token in the place of the one that is there.
    func save(_ secret: [UInt8]) throws(TokenStoreError) {
        let item: [String: Any] = [
            kSecValueData as String: Data(secret),
            kSecAttrAccessible as String: kSecAttrAccessibleAfterFirstUnlockThisDeviceOnly,
        ]
        var status = SecItemUpdate(
            NSDictionary(dictionary: query) as CFDictionary, NSDictionary(dictionary: item) as CFDictionary)
        if status == errSecItemNotFound {
            let whole = query.merging(item) { _, new in new }
            status = SecItemAdd(NSDictionary(dictionary: whole) as CFDictionary, nil)
        }
        guard status == errSecSuccess else {
            throw TokenStoreError(
                text: "The keychain does not take the token (status \(status)): start the iPad anew, then pair again.")
        }
    }

    private var query: [String: Any] {
        [kSecClass as String: kSecClassGenericPassword, kSecAttrService as String: TokenStore.service]
    }
}
