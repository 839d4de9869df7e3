// The third tab: the packages that are kept, and what came of them.
//
// Knows: how they are listed.
// Must not know: where they lie.

import MPGPTNode
import SwiftUI

struct PackagesView: View {
    @Environment(NodeModel.self) private var model

    var body: some View {
        NavigationStack {
            List {
                if model.packages.isEmpty {
                    Text("None yet. The ring sends the package that its settings name.")
                }
                ForEach(model.packages) { package in
                    PackageRow(package: package, outcome: package.outcome(in: model.state))
                        .swipeActions {
                            Button("Delete", systemImage: "trash", role: .destructive) { model.delete(package) }
                        }
                        .contextMenu {
                            Button("Delete", systemImage: "trash", role: .destructive) { model.delete(package) }
                        }
                }
                Section {
                    Button("Try again", systemImage: "arrow.clockwise") { model.tryAgain() }
                } footer: {
                    Text("A package that failed, and a unit that ended the app, are tried when the ring comes next.")
                }
            }
            .navigationTitle("Packages")
            .onAppear { model.listPackages() }
        }
    }
}

struct PackageRow: View {
    let package: KeptPackage
    let outcome: String

    var body: some View {
        VStack(alignment: .leading) {
            Text(package.title).font(.headline)
            Text("\(package.size), \(package.shortHash)").foregroundStyle(.secondary)
            Text(outcome)
        }
        .accessibilityElement(children: .combine)
    }
}
