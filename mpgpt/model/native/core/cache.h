// The cache of keys and values: pages of 64 positions that slots own by a table.
//
// Knows: where a position of a slot lies, and how it is written and read in float32, float16 or bfloat16.
// Must not know: attention, models, who hands out pages.
//
// A page holds for each key/value head four blocks of 16 positions: keys [4][D][16], then values [4][D / 16][16][16],
// D filled up to whole sixteens. So a block of keys is a panel of 16 outputs, and one of values 16 inputs of D / 16
// panels: attention is two products.
#pragma once
#include "lanes.h"

constexpr int PAGE = 64, BLOCK = 16, BLOCKS = PAGE / BLOCK;

enum Stored : int32_t { STORED_FLOAT32, STORED_FLOAT16, STORED_BFLOAT16 };

template <Stored S> constexpr size_t stored_bytes() { return S == STORED_FLOAT32 ? 4 : 2; }

INLINE Sixteen load_brain(const uint16_t* p) {
    Sixteen v;
    for (int i = 0; i < PARTS; i++) {
        const uint16_t* from = p + i * LANES;
#if defined(MPGPT_PLAIN)
        for (int lane = 0; lane < LANES; lane++) v.part[i][lane] = from_brain(from[lane]);
#elif LANES == 16
        v.part[i] = (Float)((Int)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)from)) << 16);
#elif LANES == 8
        v.part[i] = (Float)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
        v.part[i] = (Float)vshll_n_u16(vld1_u16(from), 16);
#endif
    }
    return v;
}

template <Stored S> INLINE Sixteen load_stored(const uint8_t* p) {
    if constexpr (S == STORED_FLOAT32) return load((const float*)p);
    else if constexpr (S == STORED_FLOAT16) return load((const uint16_t*)p);
    else return load_brain((const uint16_t*)p);
}
template <Stored S> INLINE void put_stored(uint8_t* p, float x) {
    if constexpr (S == STORED_FLOAT32) *(float*)p = x;
    else *(uint16_t*)p = S == STORED_FLOAT16 ? to_half(x) : to_brain(x);
}

// One layer's pages; a slot's table says which of them are its own, in order.
struct Cache {
    uint8_t* at;
    int kv_heads, dim, panels;  // panels: sixteens of a head's values
    size_t size;                // bytes of a number

    Cache(uint8_t* pages, int heads, int head_dim, Stored stored)
        : at(pages), kv_heads(heads), dim(head_dim), panels((head_dim + WIDTH - 1) / WIDTH),
          size(stored == STORED_FLOAT32 ? 4 : 2) {}

    size_t key_block() const { return (size_t)dim * BLOCK * size; }
    size_t value_block() const { return (size_t)panels * WIDTH * BLOCK * size; }
    uint8_t* keys(int page, int head) const {
        return at + ((size_t)page * (size_t)kv_heads + (size_t)head) * BLOCKS * (key_block() + value_block());
    }
    uint8_t* values(int page, int head) const { return keys(page, head) + BLOCKS * key_block(); }
};

// keys [kv_heads][dim] and then values of one position of the slot that has `table`.
template <Stored S> static void write_position(const Cache& cache, const int32_t* table, int position, const float* kv) {
    const int page = table[position / PAGE], block = position % PAGE / BLOCK, lane = position % BLOCK;
    const int dim = cache.dim;
    for (int head = 0; head < cache.kv_heads; head++) {
        const float *key = kv + head * dim, *value = kv + (cache.kv_heads + head) * dim;
        uint8_t* keys = cache.keys(page, head) + (size_t)block * cache.key_block();
        uint8_t* values = cache.values(page, head) + (size_t)block * cache.value_block();
        for (int d = 0; d < dim; d++) {
            put_stored<S>(keys + (size_t)(d * BLOCK + lane) * stored_bytes<S>(), key[d]);
            put_stored<S>(values + (size_t)((d / WIDTH * BLOCK + lane) * WIDTH + d % WIDTH) * stored_bytes<S>(), value[d]);
        }
    }
}
