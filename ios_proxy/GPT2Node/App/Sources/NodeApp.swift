// The app: one window, its model, and what the system tells it.
//
// Knows: which part of the model is told of what.
// Must not know: what any of it does or shows.

import MPGPTNode
import SwiftUI

@main
struct NodeApp: App {
    @Environment(\.scenePhase) private var phase
    @State private var model = NodeModel()

    var body: some Scene {
        WindowGroup {
            RootView()
                .environment(model)
                .onOpenURL { model.propose($0.absoluteString) }
        }
        .onChange(of: phase, initial: true) { _, phase in
            switch phase {
            case .active: model.enterForeground()
            case .background: model.enterBackground()
            default: break  // a notification or the Control Centre: the app is still shown
            }
        }
    }
}

/// The tabs, and the question that a pairing link asks.
struct RootView: View {
    @Environment(NodeModel.self) private var model

    var body: some View {
        @Bindable var model = model
        TabView {
            StatusView()
                .tabItem { Label("Status", systemImage: "gauge.with.dots.needle.50percent") }
            PairView()
                .tabItem { Label("Pair", systemImage: "qrcode") }
            PackagesView()
                .tabItem { Label("Packages", systemImage: "shippingbox") }
            LogView()
                .tabItem { Label("Log", systemImage: "text.alignleft") }
        }
        .alert("Pair with a ring", isPresented: $model.isAsked) {
            Button("Take it", role: .destructive) { model.answer(true) }
            Button("Leave it", role: .cancel) { model.answer(false) }
        } message: {
            Text(model.question)
        }
    }
}
