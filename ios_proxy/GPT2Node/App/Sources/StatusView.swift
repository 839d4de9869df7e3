// The first tab: what the node does, what is the matter, and its figures.
//
// Knows: how a presentation is laid out.
// Must not know: which words are shown when (`Presentation`).

import MPGPTNode
import SwiftUI

struct StatusView: View {
    @Environment(NodeModel.self) private var model
    @State private var isBlack = false

    var body: some View {
        let shown = model.presentation
        NavigationStack {
            List {
                Section {
                    NoticeView(notice: shown.headline)
                    if let address = shown.address {
                        Text(address)
                            .font(.largeTitle.monospacedDigit())
                            .textSelection(.enabled)
                            .accessibilityLabel("Address \(address)")
                    }
                    if shown.headline.severity == .failure {
                        Button("Try again") { model.tryAgain() }
                    }
                }
                if !shown.notices.isEmpty {
                    Section("Worth knowing") {
                        ForEach(shown.notices) { NoticeView(notice: $0) }
                    }
                }
                Section("Figures") {
                    ForEach(shown.figures) { figure in
                        LabeledContent(figure.label, value: figure.value)
                    }
                }
                Section {
                    Button("Black screen", systemImage: "moon.fill") { isBlack = true }
                } footer: {
                    Text("The node goes on behind it. Tap to come back.")
                }
            }
            .navigationTitle("GPT2Node")
        }
        .fullScreenCover(isPresented: $isBlack) { BlackScreen(isShown: $isBlack) }
    }
}

/// One thing to tell.
struct NoticeView: View {
    let notice: Notice

    var body: some View {
        HStack(alignment: .firstTextBaseline) {
            Image(systemName: notice.symbol)
                .font(.title2)
                .foregroundStyle(colour)
            VStack(alignment: .leading) {
                Text(notice.title).font(.headline)
                Text(notice.detail)
                if let progress = notice.progress {
                    ProgressView(value: progress)
                }
                if !notice.advice.isEmpty {
                    Text(notice.advice).foregroundStyle(.secondary)
                }
            }
        }
        .accessibilityElement(children: .ignore)
        .accessibilityLabel(notice.spoken)
    }

    private var colour: Color {
        switch notice.severity {
        case .calm: .secondary
        case .busy: .blue
        case .good: .green
        case .warning: .orange
        case .failure: .red
        }
    }
}

/// All black, so that the display uses little; the app stays in front. The brightness is left as it is.
struct BlackScreen: View {
    @Binding var isShown: Bool

    var body: some View {
        Color.black
            .ignoresSafeArea()
            .statusBarHidden()
            .persistentSystemOverlays(.hidden)
            .onTapGesture { isShown = false }
            .accessibilityLabel("Black screen")
            .accessibilityHint("Double tap to come back")
            .accessibilityAddTraits(.isButton)
    }
}
