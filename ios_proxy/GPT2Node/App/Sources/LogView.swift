// The last tab: what happened, and a way to send it.
//
// Knows: how lines are shown.
// Must not know: who writes them.

import MPGPTNode
import SwiftUI

struct LogView: View {
    @Environment(NodeModel.self) private var model

    var body: some View {
        NavigationStack {
            List(model.log.lines.reversed()) { line in
                Text(line.text)
                    .font(.footnote.monospaced())
                    .textSelection(.enabled)
            }
            .navigationTitle("Log")
            .toolbar {
                ShareLink("Send the log", item: model.log.text)
            }
        }
    }
}
