// Products of bytes: sixteen outputs x four inputs of weights times four bytes of a row, added up in 32 bits, exactly.
//
// Knows: each processor's instruction for it, and how it wants weights held.
// Must not know: scales, rows, models.
#pragma once
#include "lanes.h"

// AVX-512's instruction wants one side without signs: weights are held 128 too large there, and the row's sum corrects.
#if LANES == 16 || defined(__AVXVNNI__)
constexpr int BYTE_OFFSET = 128;
#else
constexpr int BYTE_OFFSET = 0;
#endif

// Sixteen outputs x four inputs, [16][4].
struct Bytes {
#if defined(MPGPT_PLAIN)
    uint8_t w[64];
#elif LANES == 16
    __m512i w;
#elif LANES == 8
    __m256i w[2];
#if !defined(__AVXVNNI__)
    __m256i magnitude[2];
#endif
#else
    int8x16_t w[4];
#endif
};

INLINE Bytes load_bytes(const uint8_t* p) {
    Bytes b;
#if defined(MPGPT_PLAIN)
    memcpy(b.w, p, 64);
#elif LANES == 16
    b.w = _mm512_loadu_si512(p);
#elif LANES == 8
    for (int i = 0; i < 2; i++) {
        b.w[i] = _mm256_loadu_si256((const __m256i*)p + i);
#if !defined(__AVXVNNI__)
        b.magnitude[i] = _mm256_abs_epi8(b.w[i]);
#endif
    }
#else
    for (int i = 0; i < 4; i++) b.w[i] = vld1q_s8((const int8_t*)p + 16 * i);
#endif
    return b;
}

// Levels from 0 to 15, two in a byte: inputs 0 to 3 of eight in the low halves, 4 to 7 in the high ones.
INLINE void load_levels(const uint8_t* p, Bytes& low, Bytes& high) {
#if defined(MPGPT_PLAIN)
    for (int i = 0; i < 64; i++) low.w[i] = p[i] & 15, high.w[i] = p[i] >> 4;
#elif LANES == 16
    const __m512i both = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    low.w = _mm512_and_si512(both, mask), high.w = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
#elif LANES == 8
    const __m256i mask = _mm256_set1_epi8(15);
    for (int i = 0; i < 2; i++) {
        const __m256i both = _mm256_loadu_si256((const __m256i*)p + i);
        low.w[i] = _mm256_and_si256(both, mask), high.w[i] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    }
#else
    for (int i = 0; i < 4; i++) {
        const uint8x16_t both = vld1q_u8(p + 16 * i);
        low.w[i] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
        high.w[i] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
#endif
}

INLINE int32_t four(const int8_t* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

// total += b x four bytes of a row, each from -127 to 127
INLINE void dot(Sixteen32& total, const Bytes& b, int32_t x) {
#if defined(MPGPT_PLAIN)
    int8_t bytes[4];
    memcpy(bytes, &x, 4);
    for (int lane = 0; lane < 16; lane++)
        for (int i = 0; i < 4; i++) total.part[0][lane] += (int32_t)b.w[lane * 4 + i] * bytes[i];
#elif LANES == 16
    total.part[0] = (Int)_mm512_dpbusd_epi32((__m512i)total.part[0], b.w, _mm512_set1_epi32(x));
#elif LANES == 8 && defined(__AVXVNNI__)
    for (int i = 0; i < 2; i++)
        total.part[i] = (Int)_mm256_dpbusd_avx_epi32((__m256i)total.part[i], b.w[i], _mm256_set1_epi32(x));
#elif LANES == 8
    // Neither side is below -127: two products fit 16 bits with their sign.
    for (int i = 0; i < 2; i++) {
        const __m256i pairs = _mm256_maddubs_epi16(b.magnitude[i], _mm256_sign_epi8(_mm256_set1_epi32(x), b.w[i]));
        total.part[i] += (Int)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#elif defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(x));
    for (int i = 0; i < 4; i++) total.part[i] = (Int)vdotq_s32((int32x4_t)total.part[i], b.w[i], all);
#else
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(x));
    for (int i = 0; i < 4; i++) {
        const int16x8_t low = vmull_s8(vget_low_s8(b.w[i]), vget_low_s8(all)), high = vmull_high_s8(b.w[i], all);
        total.part[i] += (Int)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
    }
#endif
}

// total[p][r] += the 32 levels of sixteen outputs at p * apart, times 32 bytes of each of R rows.
template <int P, int R>
INLINE void dot_levels(Sixteen32 (&total)[P][R], const uint8_t* w, size_t apart, const int8_t* const (&x)[R]) {
#if LANES == 8 && !defined(__AVXVNNI__) && !defined(MPGPT_PLAIN)
    // Levels are small: all eight pairs of a group add up within 16 bits (8 x 2 x 15 x 127).
    for (int p = 0; p < P; p++) {
        __m256i pairs[R][2];
        for (int r = 0; r < R; r++) pairs[r][0] = pairs[r][1] = _mm256_setzero_si256();
        for (int k = 0; k < 4; k++) {
            Bytes low, high;
            load_levels(w + (size_t)p * apart + k * 64, low, high);
            for (int r = 0; r < R; r++) {
                const __m256i first = _mm256_set1_epi32(four(x[r] + 8 * k)), second = _mm256_set1_epi32(four(x[r] + 8 * k + 4));
                for (int i = 0; i < 2; i++) {
                    pairs[r][i] = _mm256_add_epi16(pairs[r][i], _mm256_maddubs_epi16(low.w[i], first));
                    pairs[r][i] = _mm256_add_epi16(pairs[r][i], _mm256_maddubs_epi16(high.w[i], second));
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < 2; i++) total[p][r].part[i] += (Int)_mm256_madd_epi16(pairs[r][i], _mm256_set1_epi16(1));
    }
#else
    for (int k = 0; k < 4; k++) {
        Bytes low[P], high[P];
        for (int p = 0; p < P; p++) load_levels(w + (size_t)p * apart + k * 64, low[p], high[p]);
        for (int r = 0; r < R; r++) {
            const int32_t first = four(x[r] + 8 * k), second = four(x[r] + 8 * k + 4);
            for (int p = 0; p < P; p++) dot(total[p][r], low[p], first), dot(total[p][r], high[p], second);
        }
    }
#endif
}
