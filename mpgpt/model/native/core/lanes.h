// Sixteen floats side by side: one AVX-512 register, two AVX2 registers or four of NEON.
//
// Knows: the registers and the few instructions that differ between processors.
// Must not know: weights, rows, models.
//
// Everything above is written for sixteen lanes that never mix but in sum(), so that each sum has one order on every
// processor. Multiplications and additions are fused where fma() stands and nowhere else (-ffp-contract=off).
// MPGPT_PLAIN takes the way of AVX-512 in plain C++: it shows on any processor what AVX-512 would compute.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if !defined(MPGPT_PLAIN)
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

#if defined(MPGPT_PLAIN) || (defined(__AVX512F__) && defined(__AVX512VNNI__))
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#elif defined(__aarch64__)
#define LANES 4
#else
#error "no kernels for this processor"
#endif

#define INLINE static inline __attribute__((always_inline))

constexpr int WIDTH = 16;             // lanes of a Sixteen, outputs of a panel
constexpr int PARTS = WIDTH / LANES;  // registers of a Sixteen

typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef float LooseFloat __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t LooseWord __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

struct Sixteen {
    Float part[PARTS];
};
struct Sixteen32 {  // whole numbers
    Int part[PARTS];
};

INLINE Float splat_part(float x) { return x - Float{}; }
INLINE Float fma_part(Float a, Float b, Float c) {
#if defined(MPGPT_PLAIN)
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#elif LANES == 16
    return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return (Float)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

// -- halves: float16 and bfloat16 to float32 and back, to the nearest, ties to even

INLINE Float load_half_part(const uint16_t* p) {
#if defined(MPGPT_PLAIN)
    Float v;
    for (int i = 0; i < LANES; i++) {
        uint32_t sign = (uint32_t)(p[i] & 0x8000) << 16, magnitude = (uint32_t)(p[i] & 0x7fff) << 13, bits;
        if (magnitude >= 0x7c00u << 13) bits = sign | 0x7f800000u | magnitude;
        else {
            float small;
            memcpy(&small, &magnitude, 4);
            small *= 0x1p112f;  // the exponent's other bias; exact, also for subnormals
            memcpy(&bits, &small, 4);
            bits |= sign;
        }
        float x;
        memcpy(&x, &bits, 4);
        v[i] = x;
    }
    return v;
#elif LANES == 16
    return (Float)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif LANES == 8
    return (Float)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    return (Float)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#endif
}

INLINE float from_brain(uint16_t u) {
    uint32_t bits = (uint32_t)u << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE uint16_t to_brain(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40);  // no number, and stays none
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
INLINE float from_half(uint16_t u) {
    uint16_t wide[LANES] = {u};
    return load_half_part(wide)[0];
}
INLINE uint16_t to_half(float x) {
    // In integers, so that no processor's rounding mode or treatment of subnormals enters.
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and more: infinite
    if (a < 0x38800000u) {                                    // below 2^-14: a subnormal, or zero
        const uint32_t shift = 126u - (a >> 23);
        if (shift > 24u) return (uint16_t)sign;
        const uint32_t whole = (a & 0x7fffffu) | 0x800000u, kept = whole >> shift;
        const uint32_t rest = whole & ((1u << shift) - 1u), middle = 1u << (shift - 1u);
        return (uint16_t)(sign | (kept + (rest > middle || (rest == middle && (kept & 1u)))));
    }
    return (uint16_t)(sign | ((a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13));
}

// -- sixteen at a time

INLINE Sixteen zeros() { return Sixteen{}; }
INLINE Sixteen load(const float* p) {
    Sixteen v;
    for (int i = 0; i < PARTS; i++) v.part[i] = *(const LooseFloat*)(p + i * LANES);
    return v;
}
INLINE Sixteen load(const uint16_t* p) {  // float16
    Sixteen v;
    for (int i = 0; i < PARTS; i++) v.part[i] = load_half_part(p + i * LANES);
    return v;
}
INLINE void store(float* p, const Sixteen& v) {
    for (int i = 0; i < PARTS; i++) *(LooseFloat*)(p + i * LANES) = v.part[i];
}
INLINE void store(float* p, const Sixteen& v, int width) {  // the first `width` lanes
    if (width >= WIDTH) return store(p, v);
    float all[WIDTH];
    store(all, v);
    memcpy(p, all, sizeof(float) * (size_t)width);
}
INLINE Sixteen splat(float x) {
    Sixteen v;
    for (int i = 0; i < PARTS; i++) v.part[i] = splat_part(x);
    return v;
}
INLINE Sixteen fma(const Sixteen& a, const Sixteen& b, const Sixteen& c) {
    Sixteen v;
    for (int i = 0; i < PARTS; i++) v.part[i] = fma_part(a.part[i], b.part[i], c.part[i]);
    return v;
}
INLINE Sixteen operator+(const Sixteen& a, const Sixteen& b) {
    Sixteen v;
    for (int i = 0; i < PARTS; i++) v.part[i] = a.part[i] + b.part[i];
    return v;
}
INLINE Sixteen operator*(const Sixteen& a, const Sixteen& b) {
    Sixteen v;
    for (int i = 0; i < PARTS; i++) v.part[i] = a.part[i] * b.part[i];
    return v;
}
INLINE Sixteen to_float(const Sixteen32& a) {
    Sixteen v;
    for (int i = 0; i < PARTS; i++) v.part[i] = __builtin_convertvector(a.part[i], Float);
    return v;
}

// The sum of all lanes, always in the same order.
INLINE float sum(const Sixteen& v) {
    float a[WIDTH];
    store(a, v);
    for (int step = WIDTH / 2; step; step /= 2)
        for (int i = 0; i < step; i++) a[i] += a[i + step];
    return a[0];
}
