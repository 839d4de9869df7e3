// The turn: every block of features times a Hadamard matrix, which spreads the few large ones over all of the block.
//
// Knows: sums and differences in one order. Must not know: what is turned, or how it is rounded afterwards.
//
// A product stays what it is when weights and rows are both turned, and eight bits then lose a tenth as much
// (perplexity +0.3% where unturned weights gave +4.5%, bench/LOG.md).
#pragma once
#include "lanes.h"

// 64 features as 8 x 8: three steps along one side, the other side up, three more. They stay with the sides swapped,
// which changes no product as long as all are turned alike.
INLINE void turn_64(float* x) {
    float a[8][8], b[8][8];
    memcpy(a, x, sizeof a);
    for (int side = 0; side < 2; side++) {
        for (int h = 1; h < 8; h *= 2)
            for (int i = 0; i < 8; i++) {
                if (i & h) continue;
                for (int j = 0; j < 8; j++) {
                    const float u = a[i][j], v = a[i + h][j];
                    a[i][j] = u + v, a[i + h][j] = u - v;
                }
            }
        if (side) break;
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 8; j++) b[j][i] = a[i][j];
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < 64; i++) x[i] = a[i / 8][i % 8] * 0.125f;
}

// `block` is a power of two that divides `count`, 64 at most; with 1 nothing is turned.
inline void turn(float* x, int count, int block) {
    if (block == 64) {
        for (int at = 0; at < count; at += 64) turn_64(x + at);
        return;
    }
    const float scale = 1.0f / __builtin_sqrtf((float)block);
    for (int at = 0; at < count; at += block) {
        float* b = x + at;
        for (int h = 1; h < block; h *= 2)
            for (int i = 0; i < block; i += 2 * h)
                for (int j = i; j < i + h; j++) {
                    const float u = b[j], v = b[j + h];
                    b[j] = u + v, b[j + h] = u - v;
                }
        for (int i = 0; i < block; i++) b[i] *= scale;
    }
}
