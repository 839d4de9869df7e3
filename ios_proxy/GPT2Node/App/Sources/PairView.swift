// The second tab: the token that this iPad has, and how it gets one.
//
// Knows: how pairing is explained.
// Must not know: links, the keychain.

import SwiftUI

struct PairView: View {
    @Environment(NodeModel.self) private var model

    var body: some View {
        NavigationStack {
            List {
                Section("Token") {
                    LabeledContent("Fingerprint", value: model.state.fingerprint ?? "none yet")
                    if let note = model.pairingNote {
                        Text(note)
                    }
                }
                Section("With the camera") {
                    Text("Type `mpgpt ipad-token --qr` where the ring's settings are.")
                    Text("Point the Camera app at the code, and open the link that it shows.")
                    Text("Compare the fingerprint, and take the token.")
                }
                Section {
                    PasteButton(payloadType: String.self) { @Sendable texts in
                        Task { @MainActor in
                            model.propose(texts.first?.trimmingCharacters(in: .whitespacesAndNewlines) ?? "")
                        }
                    }
                    .accessibilityLabel("Paste the pairing link")
                } header: {
                    Text("By hand")
                } footer: {
                    Text("Copy the link below the code. It holds the token: send it to nobody.")
                }
            }
            .navigationTitle("Pair")
        }
    }
}
