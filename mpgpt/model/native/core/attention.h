// Attention of one position over the pages of its slot: softmax(scale q k) v, for the heads that share keys.
//
// Knows: the order of its sums. Must not know: rows of a step, models, threads.
//
// Scores go over a head's elements in rising order, weighted values over positions in rising order, each row by itself.
// Blocks that lie wholly before a window are left out, whatever was computed with them before.
#pragma once
#include "cache.h"
#include "math.h"

// Registers: blocks of keys at once, and panels of values, for R heads.
template <int R> constexpr int score_blocks() { return R == 1 ? 4 : LANES == 8 && R > 2 ? 1 : LANES == 4 && R > 2 ? 1 : 2; }
template <int R> constexpr int value_panels() { return LANES == 16 || R == 1 ? 4 : R == 4 ? 1 : 2; }

// What positions `low` to before `stop` are of the slot that has `table`.
struct Seen {
    const int32_t* table;
    int low, stop;

    int first_block() const { return low / BLOCK; }
    int last_block() const { return (stop + BLOCK - 1) / BLOCK; }
    int length() const { return (last_block() - first_block()) * BLOCK; }
};

// scores [R][length] of `N` blocks that lie one after another in a page
template <Stored S, int R, int N>
INLINE void score(const uint8_t* keys, size_t block, int dim, const float* q, float* scores, size_t length) {
    Sixteen acc[N][R];
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) acc[n][r] = zeros();
    for (int d = 0; d < dim; d++) {
        Sixteen key[N];
        for (int n = 0; n < N; n++) key[n] = load_stored<S>(keys + (size_t)n * block + (size_t)d * BLOCK * stored_bytes<S>());
        for (int r = 0; r < R; r++) {
            const Sixteen query = splat(q[r * dim + d]);
            for (int n = 0; n < N; n++) acc[n][r] = fma(key[n], query, acc[n][r]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) store(scores + (size_t)r * length + n * BLOCK, acc[n][r]);
}

template <Stored S, int R>
static void score_all(const Cache& cache, int head, const Seen& seen, const float* q, float* scores) {
    constexpr int N = score_blocks<R>();
    const size_t length = (size_t)seen.length();
    const int end = seen.last_block();
    for (int b = seen.first_block(); b < end;) {
        const uint8_t* keys = cache.keys(seen.table[b / BLOCKS], head) + (size_t)(b % BLOCKS) * cache.key_block();
        float* to = scores + (b - seen.first_block()) * BLOCK;
        const int here = BLOCKS - b % BLOCKS < end - b ? BLOCKS - b % BLOCKS : end - b;
        if (here >= N) score<S, R, N>(keys, cache.key_block(), cache.dim, q, to, length), b += N;
        else score<S, R, 1>(keys, cache.key_block(), cache.dim, q, to, length), b += 1;
    }
}

// Scores to weights in place, not yet divided by their sum, which is returned; 0 at positions that are not seen.
inline float soften(const Seen& seen, float* scores, float scale) {
    const int before = seen.low - seen.first_block() * BLOCK, length = seen.length();
    const int end = seen.stop - seen.first_block() * BLOCK;
    float tops[WIDTH];
    for (int i = 0; i < before; i++) scores[i] = scores[before];
    for (int i = end; i < length; i++) scores[i] = scores[before];
    for (int i = 0; i < WIDTH; i++) tops[i] = scores[i];
    for (int i = 0; i < length; i += WIDTH)
        for (int lane = 0; lane < WIDTH; lane++) tops[lane] = scores[i + lane] > tops[lane] ? scores[i + lane] : tops[lane];
    float top = tops[0];
    for (int lane = 1; lane < WIDTH; lane++) top = tops[lane] > top ? tops[lane] : top;
    for (int i = 0; i < length; i++) scores[i] = exponential((scores[i] - top) * scale);
    for (int i = 0; i < before; i++) scores[i] = 0.0f;
    for (int i = end; i < length; i++) scores[i] = 0.0f;
    Sixteen total = zeros();
    for (int i = 0; i < length; i += WIDTH) total = total + load(scores + i);
    return sum(total);
}

// The weighted values' panels `panel` to before panel + N, times `inverse` of each head's sum of weights.
template <Stored S, int R, int N>
static void mix(const Cache& cache, int head, const Seen& seen, int panel, const float* weights, const float* inverse, float* out) {
    Sixteen acc[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) acc[r][n] = zeros();
    const size_t length = (size_t)seen.length(), size = stored_bytes<S>();
    for (int b = seen.first_block(); b < seen.last_block(); b++) {
        const uint8_t* values = cache.values(seen.table[b / BLOCKS], head) + (size_t)(b % BLOCKS) * cache.value_block();
        values += (size_t)panel * WIDTH * BLOCK * size;
        const float* w = weights + (b - seen.first_block()) * BLOCK;
        const int from = seen.low > b * BLOCK ? seen.low - b * BLOCK : 0;
        const int to = seen.stop < (b + 1) * BLOCK ? seen.stop - b * BLOCK : BLOCK;
        for (int i = from; i < to; i++) {
            Sixteen value[N];
            for (int n = 0; n < N; n++) value[n] = load_stored<S>(values + (size_t)((n * BLOCK + i) * WIDTH) * size);
            for (int r = 0; r < R; r++) {
                const Sixteen weight = splat(w[(size_t)r * length + (size_t)i]);
                for (int n = 0; n < N; n++) acc[r][n] = fma(value[n], weight, acc[r][n]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            const int first = (panel + n) * WIDTH;
            store(out + r * cache.dim + first, acc[r][n] * splat(inverse[r]), cache.dim - first);
        }
}

// R heads from q on, which share the keys of `head`: out [R][dim]. `scores` holds R x seen.length() floats.
template <Stored S, int R>
static void attend(const Cache& cache, int head, const Seen& seen, float scale, const float* q, float* scores, float* out) {
    float inverse[R];
    score_all<S, R>(cache, head, seen, q, scores);
    for (int r = 0; r < R; r++) inverse[r] = 1.0f / soften(seen, scores + (size_t)r * (size_t)seen.length(), scale);
    constexpr int N = value_panels<R>();
    int panel = 0;
    for (; panel + N <= cache.panels; panel += N) mix<S, R, N>(cache, head, seen, panel, scores, inverse, out);
    for (; panel < cache.panels; panel++) mix<S, R, 1>(cache, head, seen, panel, scores, inverse, out);
}

constexpr int MOST_HEADS = 4;  // in registers at once

template <Stored S>
static void attend_all(const Cache& cache, int head, const Seen& seen, float scale, const float* q, int heads, float* scores, float* out) {
    for (int first = 0; first < heads; first += MOST_HEADS) {
        const float* from = q + first * cache.dim;
        float* to = out + first * cache.dim;
        switch (heads - first) {
            case 1: attend<S, 1>(cache, head, seen, scale, from, scores, to); break;
            case 2: attend<S, 2>(cache, head, seen, scale, from, scores, to); break;
            case 3: attend<S, 3>(cache, head, seen, scale, from, scores, to); break;
            default: attend<S, 4>(cache, head, seen, scale, from, scores, to); break;
        }
    }
}
