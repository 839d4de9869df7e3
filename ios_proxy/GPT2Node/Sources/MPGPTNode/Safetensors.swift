// A safetensors file: a length, a JSON header, and the bytes of the tensors without a gap.
//
// Knows: the format, as `ios_proxy/PROTOCOL.md` describes it for self-tests.
// Must not know: what the tensors are.
//
// Whatever the bytes say, reading neither traps nor takes more memory than the file has bytes, a few times over.

import MPGPTWire

/// Bytes that are no safetensors file, or one with types that are not used here.
public struct SafetensorsError: Error, Sendable, Equatable {
    public let text: String
}

/// Tensors by their names, and texts about them.
public struct Safetensors: Sendable, Equatable {
    private static let metadataKey = "__metadata__"

    public var tensors: [String: Tensor]
    public var metadata: [String: String]

    public init(tensors: [String: Tensor], metadata: [String: String] = [:]) {
        (self.tensors, self.metadata) = (tensors, metadata)
    }

    // MARK: - From bytes

    public init(bytes: [UInt8]) throws(SafetensorsError) {
        var reader = ByteReader(bytes)
        guard let claimed: UInt64 = reader.integer(), let length = Int(exactly: claimed),
            let json = reader.take(length)
        else {
            throw SafetensorsError(text: "its header is longer than the file")
        }
        let data = reader.takeRest()
        self.init(tensors: [:])
        var places: [Place] = []
        for member in try Safetensors.header(json).members {
            if member.key.utf8.elementsEqual(Safetensors.metadataKey.utf8) {
                metadata = try Safetensors.texts(member.value)
            } else {
                places.append(try Place(member))
            }
        }
        places.sort { ($0.bytes.lowerBound, $0.bytes.upperBound) < ($1.bytes.lowerBound, $1.bytes.upperBound) }
        try Safetensors.check(places, fill: data.count)
        for place in places {
            let range = data.startIndex + place.bytes.lowerBound..<data.startIndex + place.bytes.upperBound
            let tensor = Tensor(shape: place.shape, dtype: place.dtype, bytes: Array(data[range]))
            // Names of different bytes may be equal to Swift, as Unicode has it.
            guard tensors.updateValue(tensor, forKey: place.name) == nil else {
                throw SafetensorsError(text: "the tensor \(place.name) comes twice")
            }
        }
    }

    private static func header(_ json: ArraySlice<UInt8>) throws(SafetensorsError) -> JSONObject {
        do {
            return try JSONObject(parsing: json)
        } catch {
            throw SafetensorsError(text: "its header is not JSON as it should be: \(error.text)")
        }
    }

    private static func texts(_ value: JSONValue) throws(SafetensorsError) -> [String: String] {
        guard let members = value.object?.members else { throw SafetensorsError(text: "its metadata is no object") }
        var texts: [String: String] = [:]
        for member in members {
            guard let text = member.value.string, texts.updateValue(text, forKey: member.key) == nil else {
                throw SafetensorsError(text: "its metadata has \(member.key) twice, or not as a text")
            }
        }
        return texts
    }

    /// Throws unless the tensors, in the order of their offsets, fill the data without a gap.
    private static func check(_ places: [Place], fill count: Int) throws(SafetensorsError) {
        var end = 0
        for place in places {
            guard place.bytes.lowerBound == end else {
                throw SafetensorsError(
                    text: "the tensor \(place.name) begins at \(place.bytes.lowerBound), where \(end) would be right")
            }
            end = place.bytes.upperBound
        }
        guard end == count else {
            throw SafetensorsError(text: "its tensors have \(end) bytes, and its data \(count)")
        }
    }

    // MARK: - To bytes

    /// The file's bytes: wide elements first, so that all are aligned, and then by name.
    public func encoded() -> [UInt8] {
        let sorted = tensors.sorted { one, other in
            let (size, otherSize) = (one.value.dtype.size, other.value.dtype.size)
            guard size == otherSize else { return size > otherSize }
            return one.key.utf8.lexicographicallyPrecedes(other.key.utf8)
        }
        var header = JSONObject()
        if !metadata.isEmpty {
            header[Safetensors.metadataKey] = .object(
                metadata.reduce(into: JSONObject()) { $0[$1.key] = .string($1.value) })
        }
        var at = 0
        for (name, tensor) in sorted {
            assert(Tensor.length(of: tensor.shape, tensor.dtype) == tensor.bytes.count, "\(name) is not of its shape")
            let end = at + tensor.bytes.count
            header[name] = [
                "dtype": .string(tensor.dtype.rawValue), "shape": .array(tensor.shape.map(JSONValue.integer)),
                "data_offsets": [.integer(at), .integer(end)],
            ]
            at = end
        }
        var json = header.encoded
        while !json.count.isMultiple(of: 8) { json.append(UInt8(ascii: " ")) }
        var bytes: [UInt8] = []
        bytes.reserveCapacity(8 + json.count + at)
        bytes.append(littleEndian: UInt64(json.count))
        bytes += json
        for (_, tensor) in sorted { bytes += tensor.bytes }
        return bytes
    }
}

/// A tensor's entry in the header: where its bytes lie, from the header's end.
private struct Place {
    let name: String
    let dtype: ElementType
    let shape: [Int]
    let bytes: Range<Int>

    init(_ member: JSONObject.Member) throws(SafetensorsError) {
        name = member.key
        guard let entry = member.value.object, let typeName = entry["dtype"]?.string,
            let shape = integers(entry["shape"]), let offsets = integers(entry["data_offsets"]), offsets.count == 2
        else { throw SafetensorsError(text: "the entry \(name) is not that of a tensor") }
        guard let dtype = ElementType(rawValue: typeName) else {
            throw SafetensorsError(text: "the tensor \(name) is of the type \(typeName), not F16, F32 or I32")
        }
        guard let length = Tensor.length(of: shape, dtype), 0 <= offsets[0], offsets[0] <= offsets[1],
            offsets[1] - offsets[0] == length
        else {
            throw SafetensorsError(text: "the tensor \(name) has the shape \(shape) and lies at \(offsets)")
        }
        (self.dtype, self.shape, bytes) = (dtype, shape, offsets[0]..<offsets[1])
    }
}

private func integers(_ value: JSONValue?) -> [Int]? {
    guard let array = value?.array else { return nil }
    let integers = array.compactMap(\.integer)
    return integers.count == array.count ? integers : nil
}
