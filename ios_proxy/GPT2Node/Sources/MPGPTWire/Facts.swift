// JSON values: the facts in INFO, READY and PONG, and the manifest.
//
// Knows: what a JSON text can say.
// Must not know: how it is read (`JSONReader.swift`) or written (`JSONWriter.swift`), which facts there are.

public enum JSONValue: Sendable {
    case null
    case bool(Bool)
    /// A number without a point or an exponent.
    case integer(Int)
    /// Any other; one that is not finite is written as null.
    case number(Double)
    case string(String)
    case array([JSONValue])
    case object(JSONObject)
}

/// An object whose members lie in the order of their keys' bytes.
///
/// It is no dictionary because Swift calls two strings equal where Unicode does; their bytes may differ.
public struct JSONObject: Sendable {
    public struct Member: Sendable {
        public let key: String
        public let value: JSONValue
    }

    public private(set) var members: [Member] = []

    public init() {}

    /// Returns nil where a key comes twice.
    public init?(_ members: [Member]) {
        let sorted = members.sorted { precedes($0.key, $1.key) }
        guard zip(sorted, sorted.dropFirst()).allSatisfy({ precedes($0.key, $1.key) }) else { return nil }
        self.members = sorted
    }

    /// The member's value; nil where there is none. Setting nil removes it.
    public subscript(key: String) -> JSONValue? {
        get {
            let at = position(of: key)
            return has(key, at) ? members[at].value : nil
        }
        set {
            let at = position(of: key)
            if has(key, at) { members.remove(at: at) }
            if let newValue { members.insert(Member(key: key, value: newValue), at: at) }
        }
    }

    private func has(_ key: String, _ at: Int) -> Bool {
        at < members.count && members[at].key.utf8.elementsEqual(key.utf8)
    }

    /// Where a key is or would be.
    private func position(of key: String) -> Int {
        var range = 0..<members.count
        while let middle = range.isEmpty ? nil : (range.lowerBound + range.upperBound) / 2 {
            range = precedes(members[middle].key, key) ? middle + 1..<range.upperBound : range.lowerBound..<middle
        }
        return range.lowerBound
    }
}

/// Whether one string's bytes come before another's, which is also the order of Python's strings.
func precedes(_ one: String, _ other: String) -> Bool {
    one.utf8.lexicographicallyPrecedes(other.utf8)
}

extension JSONValue {
    public var bool: Bool? { if case .bool(let value) = self { value } else { nil } }
    public var integer: Int? { if case .integer(let value) = self { value } else { nil } }
    public var string: String? { if case .string(let value) = self { value } else { nil } }
    public var array: [JSONValue]? { if case .array(let value) = self { value } else { nil } }
    public var object: JSONObject? { if case .object(let value) = self { value } else { nil } }

    /// A number of either kind.
    public var number: Double? {
        switch self {
        case .integer(let value): Double(value)
        case .number(let value): value
        default: nil
        }
    }
}

// Two values are equal where they are written alike.

extension JSONValue: Hashable {
    public static func == (one: JSONValue, other: JSONValue) -> Bool { one.encoded == other.encoded }
    public func hash(into hasher: inout Hasher) { hasher.combine(encoded) }
}

extension JSONObject: Hashable {
    public static func == (one: JSONObject, other: JSONObject) -> Bool { one.encoded == other.encoded }
    public func hash(into hasher: inout Hasher) { hasher.combine(encoded) }
}

// No literal for null: `object[key] == nil` would ask for a member that is null.

extension JSONValue: ExpressibleByStringLiteral, ExpressibleByIntegerLiteral, ExpressibleByFloatLiteral,
    ExpressibleByBooleanLiteral, ExpressibleByArrayLiteral, ExpressibleByDictionaryLiteral
{
    public init(stringLiteral value: String) { self = .string(value) }
    public init(integerLiteral value: Int) { self = .integer(value) }
    public init(floatLiteral value: Double) { self = .number(value) }
    public init(booleanLiteral value: Bool) { self = .bool(value) }
    public init(arrayLiteral elements: JSONValue...) { self = .array(elements) }
    public init(dictionaryLiteral elements: (String, JSONValue)...) { self = .object(JSONObject(pairs: elements)) }
}

extension JSONObject: ExpressibleByDictionaryLiteral {
    public init(dictionaryLiteral elements: (String, JSONValue)...) { self.init(pairs: elements) }

    /// Of two members with one key the later stays.
    fileprivate init(pairs: [(String, JSONValue)]) {
        for (key, value) in pairs {
            self[key] = value
        }
    }
}
