// Plays what recording.py wrote, without Python: for processors that are only emulated here.
//   replay RECORDING LOGITS COLUMNS
// COLUMNS gets the weights of all products, unpacked as float32 and as bfloat16.
#include <cstdio>
#include <deque>

#include "player.h"

namespace {

FILE* in;

template <typename T> std::vector<T> numbers(size_t count) {
    std::vector<T> all(count);
    if (fread(all.data(), sizeof(T), count, in) != count) {
        fprintf(stderr, "the recording is cut\n");
        exit(1);
    }
    return all;
}
int32_t number() { return numbers<int32_t>(1)[0]; }

std::deque<std::vector<float>> floats;
std::deque<std::vector<int32_t>> ints;
std::deque<std::vector<uint8_t>> bytes;
std::deque<WeightArgs> weights;

const float* kept_floats(size_t count) {
    floats.push_back(numbers<float>(count));
    return count ? floats.back().data() : nullptr;
}
const int32_t* kept_ints(size_t count) {
    ints.push_back(numbers<int32_t>(count));
    return ints.back().data();
}

const WeightArgs* weight() {
    const int32_t format = number(), inputs = number(), outputs = number(), leaves = number();
    weights.push_back({format, inputs, outputs, leaves, kept_ints((size_t)leaves), nullptr, nullptr});
    WeightArgs& args = weights.back();
    args.bias = kept_floats((size_t)number());
    const Weight sized(args);
    bytes.emplace_back((size_t)sized.panels * sized.panel_bytes);
    args.panels = bytes.back().data();
    const Weight held(args);
    Packer packer(held);
    for (int output = 0; output < outputs; output++) packer.put(numbers<float>((size_t)inputs).data(), output);
    return &args;
}

OperationArgs operation(int positions) {
    OperationArgs args = {number(), number(), number(), number(), number(), number(), numbers<float>(1)[0], nullptr, nullptr};
    if (args.kind == PRODUCT) args.data = weight();
    if (args.kind == RMS_NORM || args.kind == LAYER_NORM) args.data = kept_floats((size_t)number()), args.more = kept_floats((size_t)number());
    if (args.kind == ROTATE) {
        const int half = number();
        const std::vector<float> frequencies = numbers<float>((size_t)half);
        const float gain = numbers<float>(1)[0];
        for (int table = 0; table < 2; table++) floats.emplace_back((size_t)half * (size_t)positions);
        float *sine = floats.back().data(), *cosine = floats[floats.size() - 2].data();
        rotary_tables(frequencies.data(), half, positions, gain, cosine, sine);
        args.data = cosine, args.more = sine;
    }
    return args;
}

}  // namespace

int main(int, char** argv) {
    in = fopen(argv[1], "rb");
    FILE *out = fopen(argv[2], "wb"), *columns_out = fopen(argv[3], "wb");
    if (!in || !out || !columns_out) return 2;
    PlayerArgs args = {};
    args.operations = number();
    for (int32_t& width : args.widths) width = number();
    args.heads = number(), args.kv_heads = number(), args.dim = number(), args.stored = number();
    args.positions = number(), args.layers = number(), args.threads = 2;
    const size_t layer_bytes = (size_t)number();
    std::vector<OperationArgs> operations;
    for (int i = 0; i < args.operations; i++) operations.push_back(operation(args.positions));
    std::vector<uint8_t*> pages;
    for (int i = 0; i < args.layers; i++) bytes.emplace_back(layer_bytes), pages.push_back(bytes.back().data());
    args.operation = operations.data(), args.pages = pages.data();
    Player player(args);
    for (int steps = number(); steps; steps--) {
        StepArgs step = {};
        step.rows = number(), step.outputs = number(), step.table = number();
        const int slots = number();
        step.positions = kept_ints((size_t)step.rows), step.slots = kept_ints((size_t)step.rows);
        step.output_rows = kept_ints((size_t)step.outputs), step.tables = kept_ints((size_t)(slots * step.table));
        step.hidden_in = kept_floats((size_t)step.rows * (size_t)args.widths[HIDDEN]);
        std::vector<float> logits((size_t)step.outputs * (size_t)args.widths[LOGITS]);
        step.logits = logits.data();
        player.play(step, 0, args.operations);
        fwrite(logits.data(), sizeof(float), logits.size(), out);
    }
    for (int i = 0; i < args.operations; i++) {
        if (operations[(size_t)i].kind != PRODUCT) continue;
        const Weight weight(*(const WeightArgs*)operations[(size_t)i].data);
        const size_t count = (size_t)weight.inputs * (size_t)weight.panels * WIDTH;
        std::vector<float> wide(count);
        std::vector<uint16_t> brain(count);
        player.unpack_columns(i, 0, weight.panels, false, wide.data());
        player.unpack_columns(i, 0, weight.panels, true, brain.data());
        const size_t width = (size_t)weight.outputs, stride = (size_t)weight.panels * WIDTH;
        for (size_t at = 0; at < count; at += stride) fwrite(&wide[at], sizeof(float), width, columns_out);
        for (size_t at = 0; at < count; at += stride) fwrite(&brain[at], sizeof(uint16_t), width, columns_out);
    }
    return fclose(out) != 0 || fclose(columns_out) != 0;
}
