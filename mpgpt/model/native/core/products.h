// y = x @ weight.T + bias for the rows of a step, bound by reading the weight where they are few.
//
// Knows: how a tile of panels and rows is held in registers, and the order of its sums.
// Must not know: where rows come from, models, threads.
//
// A leaf's sum goes over its inputs in rising order, one fused multiply-add at a time (whole numbers exactly, then one
// for each group); leaves are added in a tree of two and two that depends on their number alone. So an output's bits
// depend neither on the rows beside it, nor on the panels beside it, nor on the processor.
#pragma once
#include "rows.h"

constexpr int ROW_STREAMS = 4;      // panels read side by side for one row: one stream of memory is slower than four
constexpr int DEEPEST = 12;         // of the tree: leaves up to 2^12
constexpr size_t PREFETCH = 1024;   // bytes ahead, where several rows share one stream

// Panels and rows in registers at once.
template <Format F> constexpr int tile_panels() { return LANES == 16 ? 2 : 1; }
template <Format F> constexpr int tile_rows() {
    return LANES == 16 ? 8 : LANES == 8 ? (F == FLOAT32 || F == FLOAT16 ? 6 : 4) : (is_whole(F) ? 4 : 6);
}

template <int P, int R> using Tile = Sixteen[P][R];

template <int R> INLINE void fetch_ahead(const uint8_t* p) {
    if (R > 1) __builtin_prefetch(p + PREFETCH, 0, 3);
}

template <Format F, int P, int R>
INLINE void sum_floats(const uint8_t* w, size_t apart, const Rows& rows, int t, const Leaf& leaf, Tile<P, R>& acc) {
    const float* x = rows.x + (size_t)t * rows.stride + leaf.first;
    constexpr size_t size = F == FLOAT32 ? 64 : 32;
    for (int i = 0; i < leaf.count; i++) {
        Sixteen weight[P];
        for (int p = 0; p < P; p++) {
            const uint8_t* at = w + (size_t)p * apart + (size_t)i * size;
            weight[p] = F == FLOAT32 ? load((const float*)at) : load((const uint16_t*)at);
            fetch_ahead<R>(at);
        }
        for (int r = 0; r < R; r++) {
            const Sixteen input = splat(x[(size_t)r * rows.stride + (size_t)i]);
            for (int p = 0; p < P; p++) acc[p][r] = fma(weight[p], input, acc[p][r]);
        }
    }
}

// Pairs of inputs in 32 bits: a shift makes a float of the first, a mask of the second.
INLINE void load_pair(const uint8_t* p, Sixteen& first, Sixteen& second) {
    typedef uint32_t Word __attribute__((vector_size(4 * LANES)));
    for (int i = 0; i < PARTS; i++) {
        const Word two = *(const LooseWord*)(p + i * LANES * 4);
        first.part[i] = (Float)(two << 16), second.part[i] = (Float)(two & 0xffff0000u);
    }
}

template <int P, int R>
INLINE void sum_pairs(const uint8_t* w, size_t apart, const Rows& rows, int t, const Leaf& leaf, Tile<P, R>& acc) {
    const float* x = rows.x + (size_t)t * rows.stride + leaf.first;
    for (int i = 0; i < leaf.count; i += 2) {
        Sixteen first[P], second[P];
        for (int p = 0; p < P; p++) {
            const uint8_t* at = w + (size_t)p * apart + (size_t)i * 32;
            load_pair(at, first[p], second[p]);
            fetch_ahead<R>(at);
        }
        const bool both = i + 1 < leaf.count;
        for (int r = 0; r < R; r++) {
            const float* xr = x + (size_t)r * rows.stride + i;
            const Sixteen input = splat(xr[0]);
            for (int p = 0; p < P; p++) acc[p][r] = fma(first[p], input, acc[p][r]);
            if (!both) continue;
            const Sixteen next = splat(xr[1]);
            for (int p = 0; p < P; p++) acc[p][r] = fma(second[p], next, acc[p][r]);
        }
    }
}

INLINE Sixteen32 corrected(int32_t sum) {  // where a row's total begins
    Sixteen32 v{};
    for (int i = 0; i < PARTS; i++) v.part[i] -= BYTE_OFFSET * sum;
    return v;
}

// One scale for a leaf's row: whole numbers from end to end.
template <int P, int R>
INLINE void sum_bytes(const uint8_t* w, size_t apart, const Rows& rows, int t, const Leaf& leaf, Tile<P, R>& acc) {
    Sixteen32 whole[P][R];
    const int8_t* q = rows.q + (size_t)t * rows.padded + leaf.padded;
    const size_t at = (size_t)t * rows.groups + (size_t)leaf.group;
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) whole[p][r] = corrected(rows.sum[at + (size_t)r * rows.groups]);
    for (int i = 0; i < leaf.count; i += 4) {
        Bytes bytes[P];
        for (int p = 0; p < P; p++) {
            const uint8_t* from = w + (size_t)p * apart + (size_t)i * 16;
            bytes[p] = load_bytes(from);
            fetch_ahead<R>(from);
        }
        for (int r = 0; r < R; r++) {
            const int32_t input = four(q + (size_t)r * rows.padded + i);
            for (int p = 0; p < P; p++) dot(whole[p][r], bytes[p], input);
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) acc[p][r] = to_float(whole[p][r]) * splat(rows.scale[at + (size_t)r * rows.groups]);
}

template <int R> INLINE void fetch_group_ahead(const uint8_t* p, size_t bytes) {
    if (R > 1)
        for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(p + PREFETCH + line, 0, 3);
}

template <int P, int R>
INLINE void sum_byte_group(const uint8_t* w, size_t apart, const Rows& rows, size_t at, const int8_t* const (&q)[R], Tile<P, R>& acc) {
    Sixteen32 whole[P][R];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) whole[p][r] = corrected(rows.sum[at + (size_t)r * rows.groups]);
    for (int k = 0; k < 8; k++) {
        Bytes bytes[P];
        for (int p = 0; p < P; p++) bytes[p] = load_bytes(w + (size_t)p * apart + 32 + k * 64);
        for (int r = 0; r < R; r++) {
            const int32_t input = four(q[r] + 4 * k);
            for (int p = 0; p < P; p++) dot(whole[p][r], bytes[p], input);
        }
    }
    for (int p = 0; p < P; p++) {
        const Sixteen scale = load((const uint16_t*)(w + (size_t)p * apart));
        for (int r = 0; r < R; r++)
            acc[p][r] = fma(to_float(whole[p][r]) * scale, splat(rows.scale[at + (size_t)r * rows.groups]), acc[p][r]);
    }
}

template <int P, int R>
INLINE void sum_level_group(const uint8_t* w, size_t apart, const Rows& rows, size_t at, const int8_t* const (&q)[R], Tile<P, R>& acc) {
    Sixteen32 whole[P][R] = {};
    dot_levels<P, R>(whole, w + 64, apart, q);
    for (int p = 0; p < P; p++) {
        const uint16_t* head = (const uint16_t*)(w + (size_t)p * apart);
        const Sixteen scale = load(head), least = load(head + WIDTH);
        for (int r = 0; r < R; r++) {
            const float by = rows.scale[at + (size_t)r * rows.groups];
            const float below = by * (float)rows.sum[at + (size_t)r * rows.groups];
            acc[p][r] = fma(to_float(whole[p][r]) * scale, splat(by), acc[p][r]);
            acc[p][r] = fma(least, splat(below), acc[p][r]);
        }
    }
}

template <Format F, int P, int R>
INLINE void sum_groups(const uint8_t* w, size_t apart, const Rows& rows, int t, const Leaf& leaf, Tile<P, R>& acc) {
    constexpr size_t bytes = F == INT4 ? INT4_GROUP_BYTES : INT8_GROUP_BYTES;
    for (int g = 0; g < leaf.groups; g++, w += bytes) {
        const int8_t* q[R];
        for (int r = 0; r < R; r++) q[r] = rows.q + (size_t)(t + r) * rows.padded + leaf.padded + g * GROUP;
        for (int p = 0; p < P; p++) fetch_group_ahead<R>(w + (size_t)p * apart, bytes);
        const size_t at = (size_t)t * rows.groups + (size_t)(leaf.group + g);
        if constexpr (F == INT4) sum_level_group<P, R>(w, apart, rows, at, q, acc);
        else sum_byte_group<P, R>(w, apart, rows, at, q, acc);
    }
}

template <Format F, int P, int R>
INLINE void sum_leaf(const uint8_t* w, size_t apart, const Rows& rows, int t, const Leaf& leaf, Tile<P, R>& acc) {
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) acc[p][r] = zeros();
    if constexpr (F == FLOAT32 || F == FLOAT16) sum_floats<F, P, R>(w, apart, rows, t, leaf, acc);
    else if constexpr (F == BFLOAT16) sum_pairs<P, R>(w, apart, rows, t, leaf, acc);
    else if constexpr (F == INT8) sum_bytes<P, R>(w, apart, rows, t, leaf, acc);
    else sum_groups<F, P, R>(w, apart, rows, t, leaf, acc);
}

template <int P, int R> INLINE void add_tile(const Tile<P, R>& a, Tile<P, R>& b) {  // b = a + b
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) b[p][r] = a[p][r] + b[p][r];
}

// The leaves' sums like the digits of a binary counter: two of a size make one of the next.
template <Format F, int P, int R>
INLINE void sum_leaves(const Weight& weight, const uint8_t* w, size_t apart, const Rows& rows, int t, Tile<P, R>& acc) {
    Tile<P, R> kept[DEEPEST];
    int depth = 0, count = (int)weight.leaves.size();
    for (int k = 0; k < count; k++) {
        const Leaf& leaf = weight.leaves[(size_t)k];
        sum_leaf<F, P, R>(w + leaf.offset, apart, rows, t, leaf, acc);
        for (int n = k; n & 1; n >>= 1) add_tile<P, R>(kept[--depth], acc);
        if (k + 1 < count) memcpy(&kept[depth++], &acc, sizeof acc);
    }
    while (depth) add_tile<P, R>(kept[--depth], acc);
}

// `apart` panels lie between one of the tile's panels and the next.
template <Format F, int P, int R>
static void multiply_tile(const Weight& weight, int panel, int apart, const Rows& rows, int t, float* y, size_t stride) {
    Tile<P, R> acc = {};
    const uint8_t* w = weight.at + (size_t)panel * weight.panel_bytes;
    const size_t bytes = (size_t)apart * weight.panel_bytes;
    if (weight.leaves.size() == 1) sum_leaf<F, P, R>(w, bytes, rows, t, weight.leaves[0], acc);
    else sum_leaves<F, P, R>(weight, w, bytes, rows, t, acc);
    for (int p = 0; p < P; p++) {
        const int at = panel + p * apart, first = at * WIDTH;
        for (int r = 0; r < R; r++) {
            Sixteen v = acc[p][r];
            if (F == INT8) v = v * load(weight.scales(at));
            if (weight.bias) v = v + load(weight.bias + first);
            store(y + (size_t)(t + r) * stride + first, v, weight.outputs - first);
        }
    }
}

// Rows from t on, as many at a time as are left of R, then of half as many.
template <Format F, int P, int R>
static void multiply_rows(const Weight& weight, int panel, const Rows& rows, int t, int count, float* y, size_t stride) {
    for (; t + R <= count; t += R) multiply_tile<F, P, R>(weight, panel, 1, rows, t, y, stride);
    if constexpr (R > 1)
        if (t < count) multiply_rows<F, P, R / 2>(weight, panel, rows, t, count, y, stride);
}

// Panels `first` to before `last` of y [count][stride].
template <Format F>
static void multiply(const Weight& weight, const Rows& rows, int count, float* y, size_t stride, int first, int last) {
    if (count == 1) {
        const int each = (last - first) / ROW_STREAMS;
        for (int k = 0; k < each; k++) multiply_tile<F, ROW_STREAMS, 1>(weight, first + k, each, rows, 0, y, stride);
        for (int k = first + each * ROW_STREAMS; k < last; k++) multiply_tile<F, 1, 1>(weight, k, 1, rows, 0, y, stride);
        return;
    }
    constexpr int P = tile_panels<F>();
    for (; first + P <= last; first += P) multiply_rows<F, P, tile_rows<F>()>(weight, first, rows, 0, count, y, stride);
    if constexpr (P > 1)
        if (first < last) multiply_rows<F, 1, tile_rows<F>()>(weight, first, rows, 0, count, y, stride);
}

inline void multiply(const Weight& weight, const Rows& rows, int count, float* y, size_t stride, int first, int last) {
    switch (weight.format) {
        case FLOAT32: return multiply<FLOAT32>(weight, rows, count, y, stride, first, last);
        case FLOAT16: return multiply<FLOAT16>(weight, rows, count, y, stride, first, last);
        case BFLOAT16: return multiply<BFLOAT16>(weight, rows, count, y, stride, first, last);
        case INT8: return multiply<INT8>(weight, rows, count, y, stride, first, last);
        case INT8_GROUP: return multiply<INT8_GROUP>(weight, rows, count, y, stride, first, last);
        default: return multiply<INT4>(weight, rows, count, y, stride, first, last);
    }
}
