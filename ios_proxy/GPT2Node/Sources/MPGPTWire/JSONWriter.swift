// JSON values as texts: keys sorted, no spaces, nothing escaped that need not be.
//
// Knows: the bytes that Python's json.dumps(sort_keys=True, separators=(",", ":"), ensure_ascii=False) gives.
// Must not know: what is said in it.

extension JSONObject {
    /// The object in UTF-8.
    public var encoded: [UInt8] { JSONValue.object(self).encoded }
}

extension JSONValue {
    /// The value in UTF-8.
    public var encoded: [UInt8] {
        var bytes: [UInt8] = []
        write(to: &bytes)
        return bytes
    }

    private func write(to bytes: inout [UInt8]) {
        switch self {
        case .null: bytes += "null".utf8
        case .bool(let value): bytes += (value ? "true" : "false").utf8
        case .integer(let value): bytes += String(value).utf8
        case .number(let value): bytes += (value.isFinite ? shortest(value) : "null").utf8
        case .string(let value): writeString(value, to: &bytes)
        case .array(let values):
            writeItems(values, between: "[", "]", to: &bytes) { value, bytes in value.write(to: &bytes) }
        case .object(let object):
            writeItems(object.members, between: "{", "}", to: &bytes) { member, bytes in
                writeString(member.key, to: &bytes)
                bytes += ":".utf8
                member.value.write(to: &bytes)
            }
        }
    }
}

private func writeItems<Item>(
    _ items: [Item], between open: String, _ close: String, to bytes: inout [UInt8],
    _ write: (Item, inout [UInt8]) -> Void
) {
    bytes += open.utf8
    for (at, item) in items.enumerated() {
        if at > 0 { bytes += ",".utf8 }
        write(item, &bytes)
    }
    bytes += close.utf8
}

private func writeString(_ string: String, to bytes: inout [UInt8]) {
    bytes += "\"".utf8
    for byte in string.utf8 {
        switch byte {
        case UInt8(ascii: "\""): bytes += "\\\"".utf8
        case UInt8(ascii: "\\"): bytes += "\\\\".utf8
        case 0x08: bytes += "\\b".utf8
        case 0x09: bytes += "\\t".utf8
        case 0x0a: bytes += "\\n".utf8
        case 0x0c: bytes += "\\f".utf8
        case 0x0d: bytes += "\\r".utf8
        case 0..<0x20: bytes += "\\u00\(CollectionOfOne(byte).hex)".utf8
        default: bytes.append(byte)
        }
    }
    bytes += "\"".utf8
}

/// The fewest digits that give a finite double back, laid out as Python's repr does.
private func shortest(_ value: Double) -> String {
    let sign = value.sign == .minus ? "-" : ""
    let (digits, point) = decimal(value.magnitude)
    let exponent = point - 1
    guard -4..<16 ~= exponent else {
        let tail = digits.count > 1 ? ".\(digits.dropFirst())" : ""
        let size = exponent.magnitude < 10 ? "0\(exponent.magnitude)" : "\(exponent.magnitude)"
        return "\(sign)\(digits.prefix(1))\(tail)e\(exponent < 0 ? "-" : "+")\(size)"
    }
    if point <= 0 { return "\(sign)0.\(zeros(-point))\(digits)" }
    if point >= digits.count { return "\(sign)\(digits)\(zeros(point - digits.count)).0" }
    return "\(sign)\(digits.prefix(point)).\(digits.dropFirst(point))"
}

/// The digits of a number, and how many of them stand before the point: 0.00123 is ("123", -2).
private func decimal(_ value: Double) -> (digits: String, point: Int) {
    let parts = value.description.split(separator: "e")
    let mantissa = parts[0].split(separator: ".", omittingEmptySubsequences: false)
    let all = mantissa.joined()
    let significant = all.drop { $0 == "0" }
    let exponent = parts.count > 1 ? Int(parts[1]) ?? 0 : 0
    let point = mantissa[0].count + exponent - (all.count - significant.count)
    var digits = String(significant)
    while digits.last == "0" {
        digits.removeLast()
    }
    return digits.isEmpty ? ("0", 1) : (digits, point)
}

private func zeros(_ count: Int) -> String {
    String(repeating: "0", count: count)
}
