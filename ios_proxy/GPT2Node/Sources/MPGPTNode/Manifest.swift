// The manifest of a bundle: which layers of which model a package holds, and its sizes.
//
// Knows: the keys, their types and bounds, and what must fit together.
// Must not know: where the file lies, what the sizes are used for.

import MPGPTWire

/// The description of a package. Sizes are in elements.
public struct Manifest: Sendable, Equatable {
    public static let maxBytes = 1 << 20
    static let maxCount = 1 << 20
    /// The elements of a mask: a row for each token or slot, as long as the context.
    static let maxMask = 1 << 24
    /// The numbers of a chunk, as many as a request has room for in float32.
    static let maxChunk = (Limits.request - 8) / 4

    /// Where positions turn the heads: head_dim / 2 frequencies, and what the tables are multiplied by.
    public struct Rotary: Sendable, Equatable {
        public let invFreq: [Double]
        public let gain: Double
    }

    /// The versions of the programs that made the package.
    public struct MadeBy: Sendable, Equatable {
        public let mpgpt: String
        public let coremltools: String
        public let torch: String
    }

    public let format: Int
    public let model: String
    public let modelHash: String
    public let family: String
    /// The layers of the whole model.
    public let modelLayers: Int
    public let layers: Range<Int>
    public let embed: Int
    public let heads: Int
    public let kvHeads: Int
    public let headDim: Int
    public let slots: Int
    public let context: Int
    public let chunk: Int
    public let weights: String
    public let rotary: Rotary?
    /// The largest difference from float32 that the self-test allows.
    public let tolerance: Double
    public let madeBy: MadeBy

    /// Reads a manifest, and throws one sentence for everything that is wrong with it.
    public init(json: [UInt8]) throws(StoreError) {
        guard json.count <= Manifest.maxBytes else {
            throw StoreError("the manifest is larger than \(Manifest.maxBytes >> 20) MiB")
        }
        let object = try Manifest.object(in: json)
        if let other = object["format"]?.integer, other != 1 {
            throw StoreError(
                "the manifest: format must be 1, not \(other): update the older of the two programs",
                kind: .anotherFormat)
        }
        var fields = Fields(object)
        let counts = 1...Manifest.maxCount
        format = fields.integer("format", in: 1...1)
        model = fields.text("model")
        modelHash = fields.digest("model_hash")
        family = fields.text("family")
        modelLayers = fields.integer("model_layers", in: counts)
        layers = fields.range("layers", within: 0...Manifest.maxCount)
        embed = fields.integer("embed", in: 1...Limits.embed)
        heads = fields.integer("heads", in: counts)
        kvHeads = fields.integer("kv_heads", in: counts)
        headDim = fields.integer("head_dim", in: counts)
        slots = fields.integer("slots", in: 1...Limits.rows)
        context = fields.integer("context", in: counts)
        chunk = fields.integer("chunk", in: 1...Limits.tokens)
        weights = fields.choice("weights", of: ["float16", "int8"])
        rotary = fields.object("rotary", orNull: true) { Rotary(&$0) }
        tolerance = fields.positive("tolerance")
        madeBy = fields.object("made_by") { MadeBy(&$0) } ?? MadeBy(mpgpt: "", coremltools: "", torch: "")
        fields.refuseOthers()
        let problems = fields.problems.isEmpty ? misfits : fields.problems
        guard problems.isEmpty else { throw StoreError("the manifest: \(problems.joined(separator: "; "))") }
    }

    /// What is wrong with fields that are right one by one.
    private var misfits: [String] {
        var problems: [String] = []
        if layers.upperBound > modelLayers {
            problems.append("layers ends at \(layers.upperBound), and model_layers is \(modelLayers)")
        }
        if chunk > context {
            problems.append("chunk is \(chunk), and context only \(context)")
        }
        for (name, rows) in [("chunk", chunk), ("slots", slots)] where rows * context > Manifest.maxMask {
            problems.append("\(name) times context is \(rows * context), and at most \(Manifest.maxMask) is taken")
        }
        if chunk * embed > Manifest.maxChunk {
            problems.append("chunk times embed is \(chunk * embed), and at most \(Manifest.maxChunk) is taken")
        }
        if let rotary, 2 * rotary.invFreq.count != headDim {
            problems.append("rotary.inv_freq has \(rotary.invFreq.count) numbers, and head_dim is \(headDim)")
        }
        return problems
    }

    private static func object(in json: [UInt8]) throws(StoreError) -> JSONObject {
        do {
            return try JSONObject(parsing: json)
        } catch {
            throw StoreError("the manifest is not JSON as it should be: \(error.text)")
        }
    }
}

extension Manifest.Rotary {
    fileprivate init(_ fields: inout Fields) {
        invFreq = fields.numbers("inv_freq")
        gain = fields.number("gain")
    }
}

extension Manifest.MadeBy {
    fileprivate init(_ fields: inout Fields) {
        mpgpt = fields.text("mpgpt")
        coremltools = fields.text("coremltools")
        torch = fields.text("torch")
    }
}
