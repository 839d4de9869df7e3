// A package with its slots: hidden states at positions of slots go in, the layers' hidden states come out.
//
// Knows: the inputs of a package's two functions, chunks and their padding, what each slot holds.
// Must not know: bundles, the wire, what runs the package.
//
// Shapes: B slots, E embed, T chunk, S context, K kv_heads, D head_dim.
//
//     prefill   x (1,E,1,T)  mask (1,1,T,S)  pos (1)  row (1)      rotary: cos, sin (1,1,T,D)      y (1,E,1,T)
//     decode    x (B,E,1,1)  mask (B,1,1,S)  wmask (B,1,S,1)       rotary: cos, sin (B,1,1,D)      y (B,E,1,1)

/// The executor of one package. It is used on one queue.
public final class Executor {
    private let predictor: any Predictor
    private let sizes: Manifest
    private let promptsByToken: Bool
    private let rotary: RotaryTables?
    private lazy var chunkMask = Mask(
        shape: [1, 1, sizes.chunk, sizes.context], rows: sizes.chunk, context: sizes.context)
    private lazy var stepMask = Mask(
        shape: [sizes.slots, 1, 1, sizes.context], rows: sizes.slots, context: sizes.context)
    private lazy var writeMask = WriteMask(slots: sizes.slots, context: sizes.context)
    /// The bytes of one token's hidden state.
    private let rowSize: Int

    /// How many positions each slot holds.
    public private(set) var filled: [Int]

    /// With `promptsByToken` the function `prefill` is never run: some units take only one token.
    public init(predictor: any Predictor, manifest: Manifest, promptsByToken: Bool = false) {
        (self.predictor, sizes, self.promptsByToken) = (predictor, manifest, promptsByToken)
        rotary = manifest.rotary.map(RotaryTables.init)
        rowSize = ElementType.float16.size * manifest.embed
        filled = [Int](repeating: 0, count: manifest.slots)
    }

    /// Begins a new epoch, in which every slot is empty.
    public func reset() throws(ComputeError) {
        filled = [Int](repeating: 0, count: sizes.slots)
        do {
            try predictor.reset()
        } catch {
            throw .failed("the state cannot be made anew: \(error)")
        }
    }

    /// Computes one slot's tokens from a position on: float16 (tokens, E) in and out.
    ///
    /// Throws `badPosition` where they cannot follow what the slot holds; then nothing has happened.
    public func prefill(slot: Int, position: Int, x: [UInt8], tokens: Int) throws(ComputeError) -> [UInt8] {
        try checkValues(x, tokens: tokens)
        try checkPlace(slot: slot, position: position, tokens: tokens)
        // The package may write some of it before it fails.
        filled[slot] = position
        var y: [UInt8] = []
        y.reserveCapacity(x.count)
        var done = 0
        while done < tokens {
            let start = position + done
            let fits = !promptsByToken && start + sizes.chunk <= sizes.context
            let count = fits ? min(sizes.chunk, tokens - done) : 1
            let rows = x[done * rowSize..<(done + count) * rowSize]
            y += try fits ? chunk(slot, start, rows) : step([slot], [start], rows)
            done += count
        }
        filled[slot] = position + tokens
        return y
    }

    /// Computes one token in each of some slots: float16 (slots, E) in and out. Other slots stay as they are.
    ///
    /// Throws `badPosition` where one of them cannot follow what its slot holds; then nothing has happened.
    public func decode(slots: [Int], positions: [Int], x: [UInt8]) throws(ComputeError) -> [UInt8] {
        guard slots.count == positions.count, Set(slots).count == slots.count else {
            throw .failed("a decode of the slots \(slots) at \(positions)")
        }
        try checkValues(x, tokens: slots.count)
        for (slot, position) in zip(slots, positions) {
            try checkPlace(slot: slot, position: position, tokens: 1)
        }
        for (slot, position) in zip(slots, positions) { filled[slot] = position }
        let y = try step(slots, positions, x[...])
        for (slot, position) in zip(slots, positions) { filled[slot] = position + 1 }
        return y
    }

    // MARK: - Checks

    private func checkValues(_ x: [UInt8], tokens: Int) throws(ComputeError) {
        guard tokens > 0, x.count.isMultiple(of: rowSize), x.count / rowSize == tokens else {
            throw .failed("hidden states of \(x.count) bytes; \(rowSize) for each of \(tokens) tokens are understood")
        }
    }

    private func checkPlace(slot: Int, position: Int, tokens: Int) throws(ComputeError) {
        guard filled.indices ~= slot else { throw .failed("there is no slot \(slot); there are \(sizes.slots)") }
        guard 0...filled[slot] ~= position, tokens <= sizes.context - position else {
            throw .badPosition(
                "slot \(slot) holds \(filled[slot]) of \(sizes.context) positions: "
                    + "\(tokens) at \(position) cannot follow")
        }
    }

    // MARK: - Calls

    /// Runs `prefill` once, for at most T tokens of a slot.
    private func chunk(_ slot: Int, _ position: Int, _ rows: ArraySlice<UInt8>) throws(ComputeError) -> [UInt8] {
        let (embed, width) = (sizes.embed, sizes.chunk)
        let positions = Array(position..<position + width)
        for (row, position) in positions.enumerated() {
            chunkMask.show(position + 1, inRow: row)
        }
        var inputs: Inputs = [
            "x": Tensor(
                shape: [1, embed, 1, width], dtype: .float16,
                bytes: Layout.channels(ofRows: rows, embed: embed, width: width)),
            "mask": chunkMask.tensor,
            "pos": Tensor(shape: [1], int32: [Int32(position)]),
            "row": Tensor(shape: [1], int32: [Int32(slot * sizes.kvHeads)]),
        ]
        if let rotary {
            let tables = rotary.tables(at: positions, shape: [1, 1, width, sizes.headDim])
            inputs["cos"] = tables.cos
            inputs["sin"] = tables.sin
        }
        let y = try run(.prefill, inputs, shape: [1, embed, 1, width])
        return Layout.rows(ofChannels: y, tokens: rows.count / rowSize, embed: embed, width: width)
    }

    /// Runs `decode` once, for a token in each of some slots.
    private func step(_ slots: [Int], _ positions: [Int], _ rows: ArraySlice<UInt8>) throws(ComputeError) -> [UInt8] {
        let shape = [sizes.slots, sizes.embed, 1, 1]
        // The one place behind the channels makes a slot's channels its row.
        var x = [UInt8](repeating: 0, count: sizes.slots * rowSize)
        var taken = [Int?](repeating: nil, count: sizes.slots)
        for (at, (slot, position)) in zip(slots, positions).enumerated() {
            taken[slot] = position
            x.replaceSubrange(bytes(ofRow: slot), with: rows.dropFirst(at * rowSize).prefix(rowSize))
        }
        for (slot, position) in taken.enumerated() {
            stepMask.show(position.map { $0 + 1 } ?? 0, inRow: slot)
            writeMask.write(position, inSlot: slot)
        }
        var inputs: Inputs = [
            "x": Tensor(shape: shape, dtype: .float16, bytes: x), "mask": stepMask.tensor, "wmask": writeMask.tensor,
        ]
        if let rotary {
            let tables = rotary.tables(at: taken.map { $0 ?? 0 }, shape: [sizes.slots, 1, 1, sizes.headDim])
            inputs["cos"] = tables.cos
            inputs["sin"] = tables.sin
        }
        let y = try run(.decode, inputs, shape: shape)
        var result: [UInt8] = []
        result.reserveCapacity(rows.count)
        for slot in slots { result += y[bytes(ofRow: slot)] }
        return result
    }

    /// The output of a function in float16, which must be of the shape of its x.
    private func run(_ function: Function, _ inputs: Inputs, shape: [Int]) throws(ComputeError) -> [UInt8] {
        let y: Tensor
        do {
            y = try predictor.predict(function, inputs)
        } catch {
            throw .failed((error as? ComputeError)?.text ?? "\(error)")
        }
        guard y.shape == shape, y.dtype != .int32, y.bytes.count == Tensor.length(of: y.shape, y.dtype) else {
            throw .failed("\(function) gives \(y.dtype) of \(y.shape) in \(y.bytes.count) bytes for \(shape)")
        }
        return y.dtype == .float32 ? Layout.halves(ofFloats: y.bytes) : y.bytes
    }

    private func bytes(ofRow row: Int) -> Range<Int> { row * rowSize..<(row + 1) * rowSize }
}
