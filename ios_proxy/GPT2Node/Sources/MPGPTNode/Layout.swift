// Hidden states on the wire and in a package: token after token there, channel after channel here.
//
// Knows: the order of float16 elements in memory.
// Must not know: what they are.

enum Layout {
    /// Tokens' rows as (embed, width), with zeros behind the last token.
    static func channels(ofRows rows: ArraySlice<UInt8>, embed: Int, width: Int) -> [UInt8] {
        var channels = [UInt8](repeating: 0, count: 2 * embed * width)
        rows.withUnsafeBytes { rows in
            channels.withUnsafeMutableBytes { channels in
                copy(rows, to: channels, tokens: rows.count / (2 * embed), embed: embed) { token, channel in
                    (from: token * embed + channel, to: channel * width + token)
                }
            }
        }
        return channels
    }

    /// The rows of the first tokens in (embed, width).
    static func rows(ofChannels channels: [UInt8], tokens: Int, embed: Int, width: Int) -> [UInt8] {
        var rows = [UInt8](repeating: 0, count: 2 * embed * tokens)
        channels.withUnsafeBytes { channels in
            rows.withUnsafeMutableBytes { rows in
                copy(channels, to: rows, tokens: tokens, embed: embed) { token, channel in
                    (from: channel * width + token, to: token * embed + channel)
                }
            }
        }
        return rows
    }

    /// The same numbers in float16, where those too large are infinite.
    static func halves(ofFloats floats: [UInt8]) -> [UInt8] {
        var halves = [UInt8](repeating: 0, count: floats.count / 2)
        floats.withUnsafeBytes { floats in
            halves.withUnsafeMutableBytes { halves in
                for at in 0..<halves.count / 2 {
                    let bits = UInt32(littleEndian: floats.loadUnaligned(fromByteOffset: 4 * at, as: UInt32.self))
                    let half = Half.bits(Float(bitPattern: bits))
                    halves.storeBytes(of: half.littleEndian, toByteOffset: 2 * at, as: UInt16.self)
                }
            }
        }
        return halves
    }

    @inline(__always)
    private static func copy(
        _ source: UnsafeRawBufferPointer, to target: UnsafeMutableRawBufferPointer, tokens: Int, embed: Int,
        _ place: (Int, Int) -> (from: Int, to: Int)
    ) {
        for channel in 0..<embed {
            for token in 0..<tokens {
                let (from, to) = place(token, channel)
                let element = source.loadUnaligned(fromByteOffset: 2 * from, as: UInt16.self)
                target.storeBytes(of: element, toByteOffset: 2 * to, as: UInt16.self)
            }
        }
    }
}
