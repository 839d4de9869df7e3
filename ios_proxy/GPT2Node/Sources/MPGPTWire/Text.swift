// Texts for people: cut to their length before they are sent, made readable when they come.
//
// Knows: UTF-8, which characters print.
// Must not know: which messages have texts.

/// The UTF-8 of a text, cut between two characters to what a message may have.
func clipped(_ text: String) -> [UInt8] {
    let bytes = text.utf8
    guard bytes.count > Limits.text else { return Array(bytes) }
    var cut = bytes.index(bytes.startIndex, offsetBy: Limits.text)
    while isContinuation(bytes[cut]) {
        cut = bytes.index(before: cut)
    }
    return Array(bytes[..<cut])
}

private func isContinuation(_ byte: UInt8) -> Bool {
    byte & 0xc0 == 0x80
}

/// The text in some bytes, with U+FFFD for those that are not UTF-8 and for characters that do not print.
func readable(_ bytes: ArraySlice<UInt8>) -> String {
    var text = String.UnicodeScalarView()
    for scalar in String(decoding: bytes, as: UTF8.self).unicodeScalars {
        text.append(prints(scalar) ? scalar : "\u{fffd}")
    }
    return String(text)
}

private func prints(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.properties.generalCategory {
    case .control, .format, .surrogate, .privateUse, .unassigned, .lineSeparator, .paragraphSeparator: false
    case .spaceSeparator: scalar == " "
    default: true
    }
}
