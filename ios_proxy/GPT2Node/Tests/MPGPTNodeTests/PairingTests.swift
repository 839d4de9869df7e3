// Pairing links against those that Python writes, and against what is none.

import Foundation
import MPGPTWire
import Testing

@testable import MPGPTNode

struct PairingTests {
    struct Golden: Sendable {
        let token: [UInt8]
        let fingerprint, link: String

        /// The pairings of `tests/golden/ipad_more.json`, which the Python side wrote.
        static let all: [Golden] = {
            var root = URL(filePath: #filePath)
            for _ in 0..<5 { root.deleteLastPathComponent() }
            let file = try? JSONSerialization.jsonObject(
                with: Data(contentsOf: root.appending(path: "tests/golden/ipad_more.json")))
            let entries = (file as? [String: Any])?["pairings"] as? [[String: String]] ?? []
            return entries.compactMap { entry in
                guard let token = entry["token"].flatMap([UInt8].init(hex:)), let link = entry["link"] else {
                    return nil
                }
                return Golden(token: token, fingerprint: entry["fingerprint"] ?? "", link: link)
            }
        }()
    }

    @Test func pythonsLinksAreRead() throws {
        #expect(Golden.all.count >= 4)
        for golden in Golden.all {
            let pairing = try Pairing(link: golden.link)
            #expect(pairing.secret == golden.token && pairing.token.fingerprint == golden.fingerprint)
        }
    }

    private static let good = "mpgpt-ipad://pair?token=abcdefghijklmnop"

    @Test(arguments: [
        "", "abcdefghijklmnop", "https://pair?token=abcdefghijklmnop", "mpgpt-ipad:pair?token=abcdefghijklmnop",
        "mpgpt-ipad://pear?token=abcdefghijklmnop", "mpgpt-ipad://pair/?token=abcdefghijklmnop", " \(good)",
        "mpgpt-ipad://pair?Token=abcdefghijklmnop", "mpgpt-ipad://pair?a=b&token=abcdefghijklmnop",
        "\(good)&token=abcdefghijklmnop", "\(good)&a=b", "\(good)#", "\(good) ", "\(good)+", "\(good)/", "\(good)%",
        "\(good)%4", "\(good)%4g", "\(good)%+4", "\(good)é", "mpgpt-ipad://pair?token=abcdefghijklmno",
        "mpgpt-ipad://pair?token=", "mpgpt-ipad://pair?token=\(String(repeating: "a", count: 1025))", "\(good)%20",
        "\(good)%0A", "mpgpt-ipad://pair?token=%20abcdefghijklmnop",
    ])
    func whatIsNoLinkIsRefusedInASentence(_ link: String) throws {
        let error = #expect(throws: PairingError.self) { _ = try Pairing(link: link) }
        #expect(error?.text.hasSuffix("`mpgpt ipad-token --qr` to the camera, or copy the link below it.") == true)
    }

    @Test func theLongestAndTheShortest() throws {
        #expect(try Pairing(link: PairingTests.good).secret == Array("abcdefghijklmnop".utf8))
        let long = String(repeating: "%61", count: 1024)
        #expect(try Pairing(link: "mpgpt-ipad://pair?token=\(long)").secret == [UInt8](repeating: 0x61, count: 1024))
    }

    @Test func aPersonIsAskedBeforeATokenIsTaken() throws {
        let pairing = try Pairing(link: PairingTests.good)
        #expect(pairing.question(replacing: pairing.token) == nil)
        #expect(pairing.question(replacing: nil)?.contains(pairing.token.fingerprint) == true)
        let question = try #require(pairing.question(replacing: linkToken))
        #expect(question.contains(linkToken.fingerprint) && question.contains(pairing.token.fingerprint))
    }
}
