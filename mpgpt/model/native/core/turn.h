// The turn: every block of features times a Hadamard matrix, which spreads the few large ones over all of the block.
//
// Knows: sums and differences in one order. Must not know: what is turned, or how it is rounded afterwards.
//
// A product stays what it is when weights and rows are both turned, and eight bits then lose a tenth as much
// (perplexity +0.3% where unturned weights gave +4.5%, bench/LOG.md).
#pragma once
#include "lanes.h"

// Lane i with lane i ^ H of one register: their sum, or the other's less its own where bit H of i is set.
template <int H> INLINE Float cross(Float v) {
#define SWAP(i) ((i) ^ H)
#if LANES == 16
    const Float other = __builtin_shufflevector(
        v, v, SWAP(0), SWAP(1), SWAP(2), SWAP(3), SWAP(4), SWAP(5), SWAP(6), SWAP(7), SWAP(8), SWAP(9), SWAP(10),
        SWAP(11), SWAP(12), SWAP(13), SWAP(14), SWAP(15));
#elif LANES == 8
    const Float other =
        __builtin_shufflevector(v, v, SWAP(0), SWAP(1), SWAP(2), SWAP(3), SWAP(4), SWAP(5), SWAP(6), SWAP(7));
#else
    const Float other = __builtin_shufflevector(v, v, SWAP(0), SWAP(1), SWAP(2), SWAP(3));
#endif
#undef SWAP
    Float signs;
    for (int i = 0; i < LANES; i++) signs[i] = i & H ? -1.0f : 1.0f;
    return fma_part(v, signs, other);
}

// The same for lanes of a Sixteen.
template <int H> INLINE Sixteen cross(const Sixteen& v) {
    Sixteen w;
    for (int i = 0; i < PARTS; i++) {
        if constexpr (H < LANES) w.part[i] = cross<H>(v.part[i]);
        else {
            constexpr int step = H / LANES;
            w.part[i] = i & step ? v.part[i ^ step] - v.part[i] : v.part[i] + v.part[i ^ step];
        }
    }
    return w;
}

// N Sixteens, in place.
template <int N> INLINE void turn_block(float* x, float scale) {
    Sixteen v[N];
    for (int n = 0; n < N; n++) v[n] = cross<8>(cross<4>(cross<2>(cross<1>(load(x + n * WIDTH)))));
    for (int h = 1; h < N; h *= 2)
        for (int n = 0; n < N; n++) {
            if (n & h) continue;
            const Sixteen a = v[n], b = v[n + h];
            v[n] = a + b, v[n + h] = fma(b, splat(-1.0f), a);
        }
    for (int n = 0; n < N; n++) store(x + n * WIDTH, v[n] * splat(scale));
}

// `block` is a power of two that divides `count`, 64 at most; with 1 nothing is turned.
inline void turn(float* x, int count, int block) {
    const float scale = 1.0f / __builtin_sqrtf((float)block);
    for (int at = 0; at < count; at += block) {
        float* b = x + at;
        switch (block) {
            case 64: turn_block<4>(b, scale); break;
            case 32: turn_block<2>(b, scale); break;
            case 16: turn_block<1>(b, scale); break;
            default:
                for (int h = 1; h < block; h *= 2)
                    for (int i = 0; i < block; i++) {
                        if (i & h) continue;
                        const float u = b[i], v = b[i + h];
                        b[i] = u + v, b[i + h] = u - v;
                    }
                for (int i = 0; i < block; i++) b[i] *= scale;
        }
    }
}
