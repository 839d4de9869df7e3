// How a weight is held: panels of sixteen outputs, each of which is one stream of memory, cut into leaves of inputs.
//
// Knows: the formats, where a leaf begins in a panel, and how rows of a checkpoint are brought into a panel.
// Must not know: rows of a step, models, threads.
//
//   float32      [inputs][16]
//   float16      [inputs][16]
//   bfloat16     [inputs / 2][16][2]
//   int8         [inputs / 4][16][4], then a float32 scale for each output; inputs are turned (turn.h)
//   int8-group   for each 32 inputs: 16 float16 scales, then [8][16][4]
//   int4         for each 32 inputs: 16 float16 scales, 16 float16 least values, then [4][16][4] pairs of levels
//
// In integers a leaf is filled up to whole fours or groups: with zeros, or with what stands for zero.
#pragma once
#include <vector>

#include "dots.h"
#include "turn.h"

enum Format : int32_t { FLOAT32, FLOAT16, BFLOAT16, INT8, INT8_GROUP, INT4 };

constexpr int GROUP = 32;  // inputs that share a scale
constexpr size_t INT8_GROUP_BYTES = 32 + 512, INT4_GROUP_BYTES = 64 + 256;

// As the caller describes a weight; `stops` are where the leaves of its inputs end.
struct WeightArgs {
    int32_t format, inputs, outputs, leaves;
    const int32_t* stops;
    uint8_t* panels;
    const float* bias;  // null, or outputs rounded up to whole panels
};

struct Leaf {
    int first, count;  // inputs
    int padded;        // where it begins among inputs that are filled up
    int groups;        // as int8 one, else groups of 32
    int group;         // the index of its first group
    size_t offset;     // bytes from the panel's begin
};

constexpr bool is_whole(Format format) { return format >= INT8; }
constexpr int padding_of(Format format) { return format == INT8 ? 4 : is_whole(format) ? GROUP : 1; }
inline size_t bytes_of(Format format, int count) {  // of so many inputs of a panel
    const size_t n = (size_t)count;
    switch (format) {
        case FLOAT32: return n * 64;
        case FLOAT16: return n * 32;
        case BFLOAT16: return (n + 1) / 2 * 64;
        case INT8: return (n + 3) / 4 * 64;
        case INT8_GROUP: return (n + GROUP - 1) / GROUP * INT8_GROUP_BYTES;
        default: return (n + GROUP - 1) / GROUP * INT4_GROUP_BYTES;
    }
}

// A weight with all that follows from its description.
struct Weight {
    Format format;
    int inputs, outputs, panels, padded, groups, block;
    size_t panel_bytes;
    uint8_t* at;
    const float* bias;
    std::vector<Leaf> leaves;

    explicit Weight(const WeightArgs& args)
        : format((Format)args.format), inputs(args.inputs), outputs(args.outputs), panels((args.outputs + 15) / 16),
          padded(0), groups(0), block(64), panel_bytes(0), at(args.panels), bias(args.bias) {
        const int pad = padding_of(format);
        int first = 0;
        for (int i = 0; i < args.leaves; i++) {
            const int count = args.stops[i] - first, filled = (count + pad - 1) / pad * pad;
            const int own = format == INT8 ? 1 : is_whole(format) ? filled / GROUP : 0;
            leaves.push_back({first, count, padded, own, groups, panel_bytes});
            panel_bytes += bytes_of(format, count);
            first += count, padded += filled, groups += own;
            while (count % block) block /= 2;
        }
        if (format == INT8) panel_bytes += 64;
    }
    const float* scales(int panel) const { return (const float*)(at + ((size_t)panel + 1) * panel_bytes - 64); }
};

// -- from a checkpoint's rows

INLINE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
INLINE int nearest(float x) { return (int)__builtin_rintf(x); }

// One output's row of floats into its lane of a panel.
struct Packer {
    const Weight& weight;
    std::vector<float> turned;

    explicit Packer(const Weight& w) : weight(w), turned((size_t)w.inputs) {}

    void put(const float* row, int output) {
        const int lane = output % WIDTH;
        uint8_t* panel = weight.at + (size_t)(output / WIDTH) * weight.panel_bytes;
        if (weight.format == INT8) return put_int8(row, panel, lane);
        for (const Leaf& leaf : weight.leaves) {
            const float* x = row + leaf.first;
            uint8_t* to = panel + leaf.offset;
            switch (weight.format) {
                case FLOAT32:
                    for (int i = 0; i < leaf.count; i++) ((float*)to)[i * 16 + lane] = x[i];
                    break;
                case FLOAT16:
                    for (int i = 0; i < leaf.count; i++) ((uint16_t*)to)[i * 16 + lane] = to_half(x[i]);
                    break;
                case BFLOAT16:
                    for (int i = 0; i < leaf.count; i++) ((uint16_t*)to)[i / 2 * 32 + lane * 2 + i % 2] = to_brain(x[i]);
                    break;
                default:
                    for (int g = 0; g < leaf.groups; g++) {
                        const int count = leaf.count - g * GROUP < GROUP ? leaf.count - g * GROUP : GROUP;
                        if (weight.format == INT4) put_int4(x + g * GROUP, count, to + g * INT4_GROUP_BYTES, lane);
                        else put_int8_group(x + g * GROUP, count, to + g * INT8_GROUP_BYTES, lane);
                    }
            }
        }
    }

   private:
    void put_int8(const float* row, uint8_t* panel, int lane) {
        memcpy(turned.data(), row, sizeof(float) * turned.size());
        turn(turned.data(), weight.inputs, weight.block);
        float most = 1e-30f;
        for (float x : turned) most = __builtin_fabsf(x) > most ? __builtin_fabsf(x) : most;
        const float scale = most / 127.0f;
        ((float*)(panel + weight.panel_bytes - 64))[lane] = scale;
        for (const Leaf& leaf : weight.leaves)
            for (int i = 0; i < (leaf.count + 3) / 4 * 4; i++) {
                const int level = i < leaf.count ? clamp(nearest(turned[(size_t)(leaf.first + i)] / scale), -127, 127) : 0;
                panel[leaf.offset + (size_t)(i / 4 * 64 + lane * 4 + i % 4)] = (uint8_t)(level + BYTE_OFFSET);
            }
    }

    static void put_int8_group(const float* x, int count, uint8_t* to, int lane) {
        float most = 0.0f;
        for (int i = 0; i < count; i++) most = __builtin_fabsf(x[i]) > most ? __builtin_fabsf(x[i]) : most;
        const uint16_t half = to_half(most / 127.0f);
        const float scale = from_half(half), by = scale > 0.0f ? 1.0f / scale : 0.0f;
        ((uint16_t*)to)[lane] = half;
        for (int i = 0; i < GROUP; i++) {
            const int level = i < count ? clamp(nearest(x[i] * by), -127, 127) : 0;
            to[32 + i / 4 * 64 + lane * 4 + i % 4] = (uint8_t)(level + BYTE_OFFSET);
        }
    }

    static void put_int4(const float* x, int count, uint8_t* to, int lane) {
        float low = x[0], high = x[0];
        for (int i = 1; i < count; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
        const uint16_t half = to_half((high - low) / 15.0f), least = to_half(low);
        const float scale = from_half(half), base = from_half(least), by = scale > 0.0f ? 1.0f / scale : 0.0f;
        ((uint16_t*)to)[lane] = half, ((uint16_t*)to)[WIDTH + lane] = least;
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 4; i++) {
                int levels[2];
                for (int part = 0; part < 2; part++) {
                    const int at = 8 * k + 4 * part + i;
                    levels[part] = at < count ? clamp(nearest((x[at] - base) * by), 0, 15) : 0;
                }
                to[64 + k * 64 + lane * 4 + i] = (uint8_t)(levels[0] | levels[1] << 4);
            }
    }
};
