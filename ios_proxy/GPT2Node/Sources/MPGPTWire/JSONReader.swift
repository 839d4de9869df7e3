// JSON texts as values, strictly as RFC 8259 has them, and as the page narrows it.
//
// Knows: the grammar.
// Must not know: what is said in it.
//
// Refused beyond the grammar: a key that comes twice, numbers that no double and integers that no Int64 holds, halves of a
// surrogate pair, and anything nested deeper than `JSONReader.maxDepth`.

/// What is wrong with a JSON text, and at which byte.
public struct JSONError: Error, Sendable, Hashable {
    public let text: String
}

extension JSONObject {
    /// Reads a text that is one object.
    public init(parsing bytes: some Collection<UInt8>) throws(JSONError) {
        guard case .object(let object) = try JSONValue(parsing: bytes) else {
            throw JSONError(text: "no object in it")
        }
        self = object
    }
}

extension JSONValue {
    /// Reads a text that is one value.
    public init(parsing bytes: some Collection<UInt8>) throws(JSONError) {
        var reader = JSONReader(bytes: Array(bytes))
        self = try reader.document()
    }
}

struct JSONReader {
    static let maxDepth = 16

    private let bytes: [UInt8]
    private var at = 0
    private var depth = 0

    init(bytes: [UInt8]) {
        self.bytes = bytes
    }

    mutating func document() throws(JSONError) -> JSONValue {
        let value = try value()
        skipSpace()
        guard at == bytes.count else { throw problem("something behind its end") }
        return value
    }

    // MARK: - Values

    private mutating func value() throws(JSONError) -> JSONValue {
        skipSpace()
        switch peek {
        case UInt8(ascii: "{"): return .object(try object())
        case UInt8(ascii: "["): return .array(try array())
        case UInt8(ascii: "\""): return .string(try string())
        case UInt8(ascii: "t"): return try word("true", .bool(true))
        case UInt8(ascii: "f"): return try word("false", .bool(false))
        case UInt8(ascii: "n"): return try word("null", .null)
        default: return try number()
        }
    }

    private mutating func object() throws(JSONError) -> JSONObject {
        var members: [JSONObject.Member] = []
        try items(until: "}") { reader throws(JSONError) in
            reader.skipSpace()
            guard reader.peek == UInt8(ascii: "\"") else { throw reader.problem("a key that is no string") }
            let key = try reader.string()
            reader.skipSpace()
            guard reader.skip(":") else { throw reader.problem("a key without a value") }
            members.append(JSONObject.Member(key: key, value: try reader.value()))
        }
        guard let object = JSONObject(members) else { throw problem("a key twice") }
        return object
    }

    private mutating func array() throws(JSONError) -> [JSONValue] {
        var values: [JSONValue] = []
        try items(until: "]") { reader throws(JSONError) in
            values.append(try reader.value())
        }
        return values
    }

    /// Reads what stands between two brackets, with commas in between.
    private mutating func items(
        until end: Unicode.Scalar, _ item: (inout JSONReader) throws(JSONError) -> Void
    ) throws(JSONError) {
        at += 1
        depth += 1
        guard depth <= JSONReader.maxDepth else { throw problem("more than \(JSONReader.maxDepth) levels") }
        skipSpace()
        if !skip(end) {
            repeat {
                try item(&self)
                skipSpace()
            } while skip(",")
            guard skip(end) else { throw problem("no \(end) where it should be") }
        }
        depth -= 1
    }

    private mutating func word(_ word: String, _ value: JSONValue) throws(JSONError) -> JSONValue {
        guard bytes[at...].starts(with: word.utf8) else { throw problem("an unknown word") }
        at += word.utf8.count
        return value
    }

    // MARK: - Numbers

    private mutating func number() throws(JSONError) -> JSONValue {
        let start = at
        _ = skip("-")
        guard skip("0") || skipDigits() else { throw problem("no value where one should be") }
        var isInteger = true
        if skip(".") {
            isInteger = false
            guard skipDigits() else { throw problem("a number that ends with its point") }
        }
        if skip("e") || skip("E") {
            isInteger = false
            _ = skip("+") || skip("-")
            guard skipDigits() else { throw problem("a number without its exponent") }
        }
        let text = String(decoding: bytes[start..<at], as: UTF8.self)
        if isInteger {
            guard let integer = Int(text) else { throw problem("an integer that is too large") }
            return .integer(integer)
        }
        guard let number = Double(text), number.isFinite else { throw problem("a number that is too large") }
        return .number(number)
    }

    private mutating func skipDigits() -> Bool {
        let start = at
        while let byte = peek, UInt8(ascii: "0")...UInt8(ascii: "9") ~= byte {
            at += 1
        }
        return at > start
    }

    // MARK: - Strings

    private mutating func string() throws(JSONError) -> String {
        at += 1
        var text: [UInt8] = []
        while let byte = next() {
            switch byte {
            case UInt8(ascii: "\""):
                guard let string = String(validating: text, as: UTF8.self) else {
                    throw problem("a string that is not UTF-8")
                }
                return string
            case UInt8(ascii: "\\"): text += try escaped()
            case 0..<0x20: throw problem("a control character in a string")
            default: text.append(byte)
            }
        }
        throw problem("a string without an end")
    }

    /// The UTF-8 of what stands behind a backslash.
    private mutating func escaped() throws(JSONError) -> [UInt8] {
        switch next() {
        case UInt8(ascii: "\""): return Array("\"".utf8)
        case UInt8(ascii: "\\"): return Array("\\".utf8)
        case UInt8(ascii: "/"): return Array("/".utf8)
        case UInt8(ascii: "b"): return [0x08]
        case UInt8(ascii: "f"): return [0x0c]
        case UInt8(ascii: "n"): return [0x0a]
        case UInt8(ascii: "r"): return [0x0d]
        case UInt8(ascii: "t"): return [0x09]
        case UInt8(ascii: "u"): return try escapedScalar()
        default: throw problem("an unknown escape")
        }
    }

    private mutating func escapedScalar() throws(JSONError) -> [UInt8] {
        var code = try fourDigits()
        if 0xd800..<0xdc00 ~= code, skip("\\"), skip("u") {
            let low = try fourDigits()
            guard 0xdc00..<0xe000 ~= low else { throw problem("half a surrogate pair") }
            code = 0x10000 + (code - 0xd800) << 10 + (low - 0xdc00)
        }
        guard let scalar = Unicode.Scalar(code) else { throw problem("half a surrogate pair") }
        return Array(String(scalar).utf8)
    }

    private mutating func fourDigits() throws(JSONError) -> UInt32 {
        var code: UInt32 = 0
        for _ in 0..<4 {
            guard let digit = next().flatMap(hexDigit) else { throw problem("an escape that is cut") }
            code = code << 4 | UInt32(digit)
        }
        return code
    }

    // MARK: - Bytes

    private var peek: UInt8? { at < bytes.count ? bytes[at] : nil }

    private mutating func next() -> UInt8? {
        defer { if at < bytes.count { at += 1 } }
        return peek
    }

    private mutating func skip(_ character: Unicode.Scalar) -> Bool {
        guard peek == UInt8(ascii: character) else { return false }
        at += 1
        return true
    }

    private mutating func skipSpace() {
        while let byte = peek, byte == 0x20 || byte == 0x09 || byte == 0x0a || byte == 0x0d {
            at += 1
        }
    }

    private func problem(_ what: String) -> JSONError {
        JSONError(text: "\(what) (byte \(at))")
    }
}
