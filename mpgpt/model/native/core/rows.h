// Rows of a step as products take them: floats as they are, or bytes with a scale and a sum for each leaf or group.
//
// Knows: how a row is turned and rounded to bytes. Must not know: weights' contents, models, threads.
#pragma once
#include "math.h"
#include "weight.h"

// x [rows][stride] floats; of whole numbers instead q [rows][padded] bytes, scale and sum [rows][groups].
struct Rows {
    const float* x;
    size_t stride;
    const int8_t* q;
    const float* scale;
    const int32_t* sum;
    size_t padded, groups;
};

// `count` features to bytes from -127 to 127, zeros up to `filled`; the largest is 127 or -127.
inline void quantise(const float* x, int count, int filled, int8_t* q, float& scale, int32_t& sum) {
    int32_t top = 0;  // magnitudes have the order of their bits, and what is no number comes out on top
    for (int i = 0; i < count; i++) {
        const int32_t magnitude = float_to_bits(x[i]) & 0x7fffffff;
        top = magnitude > top ? magnitude : top;
    }
    const float floor = 1e-30f, largest = bits_to_float(top), most = largest < floor ? floor : largest;
    const float by = 127.0f / most;
    int32_t total = 0;
    for (int i = 0; i < count; i++) {
        const int32_t level = float_to_bits(x[i] * by + ROUNDER) - float_to_bits(ROUNDER);
        total += (int8_t)level;
        q[i] = (int8_t)level;
    }
    for (int i = count; i < filled; i++) q[i] = 0;
    scale = most / 127.0f, sum = total;
}

// One row as `weight` wants it; `scratch` holds its inputs.
inline void quantise_row(const Weight& weight, const float* x, float* scratch, int8_t* q, float* scale, int32_t* sum) {
    if (weight.format == INT8) {
        memcpy(scratch, x, sizeof(float) * (size_t)weight.inputs);
        turn(scratch, weight.inputs, weight.block);
        x = scratch;
    }
    for (const Leaf& leaf : weight.leaves) {
        const int width = weight.format == INT8 ? leaf.count : GROUP;
        for (int g = 0; g < leaf.groups; g++) {
            const int done = g * width, count = leaf.count - done < width ? leaf.count - done : width;
            const int filled = weight.format == INT8 ? (count + 3) / 4 * 4 : GROUP;
            quantise(x + leaf.first + done, count, filled, q + leaf.padded + done, scale[leaf.group + g], sum[leaf.group + g]);
        }
    }
}
