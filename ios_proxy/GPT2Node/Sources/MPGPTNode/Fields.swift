// The members of a JSON object, taken one by one, with a sentence for each that is not what it should be.
//
// Knows: types and bounds of JSON values.
// Must not know: which keys a manifest has.

import MPGPTWire

/// The members that were not taken yet, and what was wrong with the others.
///
/// A member that is wrong is given a value all the same, so that a reader finds every problem in one go. Who reads must
/// look at `problems` before it believes anything.
struct Fields {
    private static let maxCharacters = 200

    private(set) var problems: [String] = []
    private var rest: [JSONObject.Member]
    private let prefix: String

    init(_ object: JSONObject, prefix: String = "") {
        rest = object.members
        self.prefix = prefix
    }

    mutating func integer(_ key: String, in range: ClosedRange<Int>) -> Int {
        let (least, most) = (range.lowerBound, range.upperBound)
        return take(key, least == most ? "\(least)" : "an integer from \(least) to \(most)", or: least) { value in
            value.integer.flatMap { range ~= $0 ? $0 : nil }
        }
    }

    /// Two integers, the first of which is less.
    mutating func range(_ key: String, within bounds: ClosedRange<Int>) -> Range<Int> {
        take(key, "two integers that rise, from \(bounds.lowerBound) to \(bounds.upperBound)", or: 0..<0) { value in
            guard let pair = value.array?.map(\.integer), pair.count == 2, let first = pair[0], let second = pair[1],
                bounds ~= first, bounds ~= second, first < second
            else { return nil }
            return first..<second
        }
    }

    mutating func text(_ key: String) -> String {
        take(key, "a text of at most \(Fields.maxCharacters) characters", or: "") { value in
            value.string.flatMap { $0.unicodeScalars.count <= Fields.maxCharacters ? $0 : nil }
        }
    }

    mutating func digest(_ key: String) -> String {
        take(key, "64 digits of lower-case hex", or: "") { value in
            value.string.flatMap { Bytes32(hex: $0)?.description.utf8.elementsEqual($0.utf8) == true ? $0 : nil }
        }
    }

    mutating func choice(_ key: String, of choices: [String]) -> String {
        take(key, choices.map { "\"\($0)\"" }.joined(separator: " or "), or: "") { value in
            value.string.flatMap { choices.contains($0) ? $0 : nil }
        }
    }

    mutating func number(_ key: String) -> Double {
        take(key, "a number", or: 0) { $0.number }
    }

    mutating func positive(_ key: String) -> Double {
        take(key, "a number above 0", or: 0) { value in
            value.number.flatMap { $0 > 0 ? $0 : nil }
        }
    }

    mutating func numbers(_ key: String) -> [Double] {
        take(key, "an array of numbers", or: []) { value in
            guard let numbers = value.array?.map(\.number) else { return nil }
            let known = numbers.compactMap { $0 }
            return known.count == numbers.count ? known : nil
        }
    }

    /// What `read` makes of the object under a key, all of whose members it must take.
    mutating func object<T>(_ key: String, orNull: Bool = false, _ read: (inout Fields) -> T) -> T? {
        guard let value = take(key) else { return nil }
        if orNull, case .null = value { return nil }
        guard let object = value.object else {
            refuse(key, orNull ? "an object or null" : "an object", value)
            return nil
        }
        var fields = Fields(object, prefix: "\(prefix)\(key).")
        let result = read(&fields)
        fields.refuseOthers()
        problems += fields.problems
        return result
    }

    /// Counts every member that was not taken as a problem.
    mutating func refuseOthers() {
        problems += rest.map { "the key \(prefix)\(shown(.string($0.key))) is unknown" }
    }

    private mutating func take<T>(_ key: String, _ wanted: String, or other: T, _ read: (JSONValue) -> T?) -> T {
        guard let value = take(key) else { return other }
        if let result = read(value) { return result }
        refuse(key, wanted, value)
        return other
    }

    private mutating func take(_ key: String) -> JSONValue? {
        guard let at = rest.firstIndex(where: { $0.key.utf8.elementsEqual(key.utf8) }) else {
            problems.append("\(prefix)\(key) is missing")
            return nil
        }
        return rest.remove(at: at).value
    }

    private mutating func refuse(_ key: String, _ wanted: String, _ value: JSONValue) {
        problems.append("\(prefix)\(key) must be \(wanted), not \(shown(value))")
    }
}

/// A value as JSON, cut to what a sentence bears.
private func shown(_ value: JSONValue) -> String {
    let text = String(decoding: value.encoded, as: UTF8.self)
    return text.count > 40 ? "\(text.prefix(40))..." : text
}
