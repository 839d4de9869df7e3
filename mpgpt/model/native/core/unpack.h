// Panels as columns [inputs][outputs] of float32 or bfloat16: what a library's product of many rows takes.
//
// Knows: each format's way back to floats. Must not know: rows, threads, who multiplies.
#pragma once
#include "products.h"

typedef uint32_t Word __attribute__((vector_size(4 * LANES)));

INLINE void put(float* p, const Sixteen& v) { store(p, v); }
INLINE void put(uint16_t* p, const Sixteen& v) {  // bfloat16; weights are numbers, all of them
    typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
    typedef uint16_t LooseHalf __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    for (int i = 0; i < PARTS; i++) {
        const Word u = (Word)v.part[i], rounded = u + 0x7fffu + (u >> 16 & 1u);
        *(LooseHalf*)(p + i * LANES) = __builtin_convertvector(rounded >> 16, Half);
    }
}

// Byte k of each of sixteen words, with its sign.
INLINE Sixteen byte_of(const uint8_t* p, int k) {
    Sixteen v;
    for (int i = 0; i < PARTS; i++) {
        const Word word = *(const LooseWord*)(p + i * LANES * 4) ^ (BYTE_OFFSET ? 0x80808080u : 0u);
        v.part[i] = __builtin_convertvector((Int)(word << (24 - 8 * k)) >> 24, Float);
    }
    return v;
}

// The four bits from `shift` on of each of sixteen words.
INLINE Sixteen level_of(const uint8_t* p, int shift) {
    Sixteen v;
    for (int i = 0; i < PARTS; i++)
        v.part[i] = __builtin_convertvector((Int)(*(const LooseWord*)(p + i * LANES * 4) >> shift & 15u), Float);
    return v;
}

// Up to four inputs' bytes.
template <typename T> INLINE void unpack_four(const uint8_t* p, int count, const Sixteen& scale, T* to, size_t stride) {
    for (int k = 0; k < 4 && k < count; k++) put(to + (size_t)k * stride, byte_of(p, k) * scale);
}

template <Format F, typename T>
INLINE void unpack_group(const uint8_t* p, int count, T* to, size_t stride) {
    const Sixteen scale = load((const uint16_t*)p);
    if constexpr (F == INT8_GROUP) {
        for (int i = 0; i < count; i += 4) unpack_four(p + 32 + i * 16, count - i, scale, to + (size_t)i * stride, stride);
    } else {
        const Sixteen least = load((const uint16_t*)p + WIDTH);
        for (int i = 0; i < count; i++) {
            const int shift = i % 4 * 8 + i % 8 / 4 * 4;
            put(to + (size_t)i * stride, fma(level_of(p + 64 + i / 8 * 64, shift), scale, least));
        }
    }
}

template <Format F, typename T>
static void unpack_panel(const Weight& weight, int panel, T* columns, size_t stride) {
    for (const Leaf& leaf : weight.leaves) {
        const uint8_t* p = weight.at + (size_t)panel * weight.panel_bytes + leaf.offset;
        T* to = columns + (size_t)leaf.first * stride;
        if constexpr (F == FLOAT32 || F == FLOAT16) {
            typedef typename std::conditional<F == FLOAT32, float, uint16_t>::type Held;
            for (int i = 0; i < leaf.count; i++) put(to + (size_t)i * stride, load((const Held*)p + i * WIDTH));
        } else if constexpr (F == BFLOAT16) {
            for (int i = 0; i < leaf.count; i += 2) {
                Sixteen first, second;
                load_pair(p + (size_t)i * 32, first, second);
                put(to + (size_t)i * stride, first);
                if (i + 1 < leaf.count) put(to + (size_t)(i + 1) * stride, second);
            }
        } else if constexpr (F == INT8) {
            const Sixteen scale = load(weight.scales(panel));
            for (int i = 0; i < leaf.count; i += 4)
                unpack_four(p + (size_t)i * 16, leaf.count - i, scale, to + (size_t)i * stride, stride);
        } else {
            constexpr size_t bytes = F == INT4 ? INT4_GROUP_BYTES : INT8_GROUP_BYTES;
            for (int g = 0; g < leaf.groups; g++) {
                const int done = g * GROUP, count = leaf.count - done < GROUP ? leaf.count - done : GROUP;
                unpack_group<F>(p + (size_t)g * bytes, count, to + (size_t)done * stride, stride);
            }
        }
    }
}

// One panel, sixteen columns wide; `stride` elements lie between an input and the next. Inputs of int8 stay turned.
template <typename T> void unpack(const Weight& weight, int panel, T* columns, size_t stride) {
    switch (weight.format) {
        case FLOAT32: return unpack_panel<FLOAT32>(weight, panel, columns, stride);
        case FLOAT16: return unpack_panel<FLOAT16>(weight, panel, columns, stride);
        case BFLOAT16: return unpack_panel<BFLOAT16>(weight, panel, columns, stride);
        case INT8: return unpack_panel<INT8>(weight, panel, columns, stride);
        case INT8_GROUP: return unpack_panel<INT8_GROUP>(weight, panel, columns, stride);
        default: return unpack_panel<INT4>(weight, panel, columns, stride);
    }
}
