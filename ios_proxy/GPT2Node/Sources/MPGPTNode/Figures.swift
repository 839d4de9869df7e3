// Numbers as a person reads them.
//
// Knows: units, how many digits are worth showing.
// Must not know: what is measured. Locales: the sentences around the numbers are English.

enum Figures {
    /// Powers of ten, as storage is sold.
    static func bytes(_ count: UInt64) -> String {
        switch count {
        case 999_500_000...: "\(decimals(Double(count) / 1e9, 1)) GB"
        case 1_000_000...: "\(decimals(Double(count) / 1e6, 0)) MB"
        default: "\(decimals(Double(count) / 1e3, 0)) KB"
        }
    }

    /// A share in whole per cent, which is 100 only when all is there.
    static func percent(_ part: UInt64, of total: UInt64) -> Int {
        guard total > 0, part < total else { return 100 }
        return Int(Double(part) / Double(total) * 100)
    }

    static func percent(_ share: Double) -> String {
        "\(decimals(100 * min(1, max(0, share)), 0))%"
    }

    /// Two digits where a number is small, three where it is large.
    static func short(_ value: Double) -> String {
        decimals(value, value < 9.95 ? 2 : value < 99.5 ? 1 : 0)
    }

    static func duration(_ seconds: Double) -> String {
        guard seconds >= 90 else { return "\(decimals(seconds, seconds < 9.95 ? 1 : 0)) s" }
        return "\(decimals(seconds / 60, 0)) min"
    }

    /// A number with so many digits behind its point.
    static func decimals(_ value: Double, _ digits: Int) -> String {
        guard value.isFinite, abs(value) < 1e12 else { return "?" }
        let scale = [1.0, 10, 100, 1e3, 1e4][digits]
        let scaled = Int((abs(value) * scale).rounded())
        let whole = "\(value < 0 && scaled > 0 ? "-" : "")\(scaled / Int(scale))"
        guard digits > 0 else { return whole }
        let rest = "\(scaled % Int(scale))"
        return "\(whole).\(String(repeating: "0", count: digits - rest.count))\(rest)"
    }

    static func layers(_ layers: Range<Int>) -> String {
        layers.count == 1 ? "Layer \(layers.lowerBound)" : "Layers \(layers.lowerBound)-\(layers.upperBound - 1)"
    }
}
