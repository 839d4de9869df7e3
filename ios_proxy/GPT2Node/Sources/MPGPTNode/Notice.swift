// What a person is told of a node: what is the matter, and what to do.
//
// Knows: the words, the names of SF symbols.
// Must not know: which notice comes before which (`Presentation.swift`), views, colours.

/// One thing to tell. A symbol is one of Apple's SF Symbols, by its name.
public struct Notice: Sendable, Hashable, Identifiable {
    public enum Severity: Sendable, Hashable, CaseIterable {
        /// All is well, and nothing happens.
        case calm
        /// Something is under way.
        case busy
        case good
        /// It works, and might work better.
        case warning
        /// It does not work.
        case failure
    }

    public let title, detail: String
    /// What to do; empty where there is nothing to be done.
    public let advice: String
    public let symbol: String
    public let severity: Severity
    /// 0 to 1, where it is known how much is done.
    public let progress: Double?

    public var id: String { "\(title) \(detail)" }

    /// All in one, as it is read out.
    public var spoken: String {
        [title, detail, advice].filter { !$0.isEmpty }.joined(separator: ". ").replacing(".. ", with: ". ")
    }

    init(
        _ title: String, _ detail: String, do advice: String = "", symbol: String, _ severity: Severity,
        progress: Double? = nil
    ) {
        // What the system says may end with a point of its own.
        (self.title, self.detail, self.advice) = (title, detail.replacing("..", with: "."), advice)
        (self.symbol, self.severity, self.progress) = (symbol, severity, progress)
    }
}

// MARK: - Before anybody can come

extension Notice {
    static func oldSystem(_ version: Int) -> Notice {
        Notice(
            "This system is too old", "It is version \(version), and packages with a cache need iOS 18 or iPadOS 18.",
            do: "Update the iPad in Settings, General, Software Update.", symbol: "exclamationmark.arrow.circlepath",
            .failure)
    }

    static let noToken = Notice(
        "No token yet", "The ring and this iPad must have the same token.",
        do: "Run `mpgpt ipad-token --qr` beside the ring, and show its code to the camera.",
        symbol: "qrcode.viewfinder",
        .warning)

    static func noPort(_ port: Int, _ why: String) -> Notice {
        Notice(
            "Port \(port) cannot be used", "The system says: \(why).",
            do: "Close the other app that listens there, or start the iPad anew; then try again.",
            symbol: "network.slash", .failure)
    }

    static func noStore(_ why: String) -> Notice {
        Notice(
            "Packages cannot be kept", "The system says: \(why).",
            do: "Make room in Settings, General, iPad Storage; then try again.", symbol: "externaldrive.badge.xmark", .failure
        )
    }

    static let noAddress = Notice(
        "No network", "This iPad has no address at which the ring could reach it.",
        do: "Join the Wi-Fi of the ring in Settings, or connect the iPad to it by a cable.", symbol: "wifi.slash",
        .failure)

    static let notListening = Notice(
        "Not listening", "Nobody can reach this node while the app is not in front.", do: "Leave the app open.",
        symbol: "pause.circle", .calm)

    static func waiting(at address: String, others: Int) -> Notice {
        let more = others > 0 ? " (or at another of this iPad's addresses)" : ""
        return Notice(
            "Waiting for the ring", "Listening at \(address)\(more).",
            do: "Write this address into the ring's settings, and start it.",
            symbol: "antenna.radiowaves.left.and.right",
            .calm)
    }
}

// MARK: - A package

extension Notice {
    static func receiving(_ bytes: UInt64, of total: UInt64) -> Notice {
        let percent = Figures.percent(bytes, of: total)
        return Notice(
            "Receiving a package", "\(percent)% of \(Figures.bytes(total)).", do: "Leave the app open.",
            symbol: "square.and.arrow.down", .busy, progress: Double(percent) / 100)
    }

    static func loading(_ package: NodeState.Package?, seconds: Double, without unused: [NodeState.Unused]) -> Notice {
        let name = package?.title ?? "A package"
        let after = unused.last.map { " \($0.unit) could not be used; the next is tried." } ?? ""
        return Notice(
            "Loading", "\(name), for \(Figures.duration(seconds)).\(after)",
            do: "The first time may take some minutes: leave the app open.", symbol: "gearshape.2", .busy)
    }

    static func cannotRun(_ package: NodeState.Package?, _ why: String) -> Notice {
        let name = package?.title ?? "The package"
        return Notice(
            "This package cannot be run", "\(name): \(why).",
            do: "Convert the layers again, or fewer of them; or try again in Packages. Send the log if it stays so.",
            symbol: "xmark.octagon", .failure)
    }

    static func unused(_ unused: NodeState.Unused, instead unit: String) -> Notice {
        if unused.wasFatal {
            return Notice(
                "\(unused.unit) is left out",
                "The app was ended while it tried it, so that now \(unit) computes: \(unused.why).",
                do: "Convert fewer layers, or try again in Packages.", symbol: "bolt.trianglebadge.exclamationmark",
                .warning)
        }
        return Notice(
            "Not on \(unused.unit)", "Now \(unit) computes, since there it failed: \(unused.why).",
            do: "It works, but slower: `--weights int8` or fewer layers may fit. Send the log if they do not.",
            symbol: "tortoise", .warning)
    }
}

// MARK: - A proxy

extension Notice {
    static func proxyIsHere(_ proxy: String) -> Notice {
        Notice("The ring is here", "The proxy at \(proxy) is about to send a package.", symbol: "link", .busy)
    }

    static func serving(_ package: NodeState.Package, _ proxy: String) -> Notice {
        Notice(
            "Serving", "\(package.title), for the proxy at \(proxy).",
            do: "Leave the app open.", symbol: "checkmark.circle", .good)
    }

    init(_ trouble: NodeState.Trouble, fingerprint: String) {
        self =
            switch trouble {
            case .anotherToken(let proxy):
                Notice(
                    "Another token", "The proxy at \(proxy) has another token than this iPad's, \(fingerprint).",
                    do: "Run `mpgpt ipad-token --qr` there, and show its code to the camera.", symbol: "key.slash",
                    .failure)
            case .anotherVersion(let proxy):
                Notice(
                    "Another version", "The proxy at \(proxy) speaks another version of the protocol.",
                    do: "Update mpgpt there and this app, the older first.", symbol: "arrow.triangle.2.circlepath",
                    .failure)
            case .silence(let proxy, let seconds):
                Notice(
                    "The ring has fallen silent",
                    "Nothing was heard of the proxy at \(proxy) for \(Figures.duration(seconds)).",
                    do: "See whether it still runs, and whether both are in one network.",
                    symbol: "ear.trianglebadge.exclamationmark",
                    .warning)
            case .noRoom(let why):
                Notice(
                    "No room", "The package was refused: \(why).",
                    do: "Delete packages here, or free some storage in Settings.", symbol: "externaldrive.badge.xmark",
                    .failure)
            case .badPackage(let why):
                Notice(
                    "A package was refused", "It is not what it should be: \(why).",
                    do: "Convert the layers again with `mpgpt convert coreml`.",
                    symbol: "shippingbox.and.arrow.backward",
                    .failure)
            case .anotherFormat:
                Notice(
                    "A package of another format", "It was made by an mpgpt that is newer or older than this app.",
                    do: "Update both, then convert the layers again.", symbol: "doc.badge.clock", .failure)
            case .twoRings(let proxy):
                Notice(
                    "Two rings want this iPad", "The proxy at \(proxy) came while another was served.",
                    do: "End one of the two rings, or give it another token.", symbol: "arrow.left.arrow.right",
                    .warning)
            }
    }
}

// MARK: - The device

extension Notice {
    static func heat(_ thermal: String) -> Notice? {
        switch thermal {
        case "serious":
            Notice(
                "The iPad is hot", "The system slows it down.",
                do: "Take it out of its case and out of the sun, or pause the ring.", symbol: "thermometer.high",
                .warning)
        case "critical":
            Notice(
                "The iPad is too hot", "The system slows it down a lot, and may end the app.",
                do: "Pause the ring until it has cooled down.", symbol: "thermometer.sun", .failure)
        default: nil
        }
    }

    static let lowPower = Notice(
        "Low Power Mode", "The iPad computes more slowly to save its battery.",
        do: "Plug it in, and switch Low Power Mode off in Settings, Battery.", symbol: "battery.25percent", .warning)

    static func battery(_ level: Double) -> Notice {
        Notice(
            "The battery runs low", "It is at \(Figures.percent(level)).", do: "Plug the iPad in.",
            symbol: "battery.25percent", .warning)
    }
}
