// Functions of one number that are the same bits everywhere: additions, multiplications, divisions and fused ones only.
//
// Knows: e^x, activations, sines and cosines of positions. Must not know: rows, weights, models.
//
// What is no number stays none. Loops over these functions are left to the compiler, which may do many at a time: each
// element's operations stay what they are.
#pragma once
#include "lanes.h"

INLINE float bits_to_float(int32_t i) {
    float x;
    memcpy(&x, &i, 4);
    return x;
}
INLINE int32_t float_to_bits(float x) {
    int32_t i;
    memcpy(&i, &x, 4);
    return i;
}

constexpr float ROUNDER = 12582912.0f;  // 1.5 x 2^23: added to a small float, it leaves the nearest whole number

// e^x, within 2e-7 of it relative; for x beyond -87 and 88 as for these.
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = __builtin_fmaf(x, 1.44269504f, ROUNDER), n = shifted - ROUNDER;
    float r = __builtin_fmaf(n, -0.693359375f, x);  // x - n ln 2, ln 2 in two parts
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float p = 1.9841270e-4f;  // the series of e^r to r^7, from its end
    p = __builtin_fmaf(p, r, 1.3888889e-3f);
    p = __builtin_fmaf(p, r, 8.3333333e-3f);
    p = __builtin_fmaf(p, r, 4.1666667e-2f);
    p = __builtin_fmaf(p, r, 1.6666667e-1f);
    p = __builtin_fmaf(p, r, 0.5f);
    p = __builtin_fmaf(p, r * r, r + 1.0f);
    const int32_t n_bits = (int32_t)((uint32_t)float_to_bits(shifted) << 23);
    return p * bits_to_float((int32_t)((uint32_t)n_bits + 0x3f800000u));
}

INLINE float silu(float x) { return x / (exponential(-x) + 1.0f); }
INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }

// x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^-2u).
INLINE float gelu_tanh(float x) {
    const float u = 1.59576912f * __builtin_fmaf(0.044715f * x * x, x, x);
    return x / (exponential(-u) + 1.0f);
}

// x (1 + erf(x / sqrt 2)) / 2; erf by Abramowitz and Stegun 7.1.26, within 1.5e-7.
INLINE float gelu(float x) {
    const float z = (x < 0.0f ? -x : x) * 0.707106781f, t = 1.0f / __builtin_fmaf(0.3275911f, z, 1.0f);
    float p = 1.061405429f;
    p = __builtin_fmaf(p, t, -1.453152027f);
    p = __builtin_fmaf(p, t, 1.421413741f);
    p = __builtin_fmaf(p, t, -0.284496736f);
    p = __builtin_fmaf(p, t, 0.254829592f);
    const float rest = p * t * exponential(-(z * z)), half = 0.5f * x;  // 1 - erf z
    return x < 0.0f ? half * rest : x - half * rest;
}

// sin and cos of an angle from 0 to 10^6 or so, in double precision: a quarter turn's multiple off, then the series.
inline void sine_and_cosine(double angle, double& sine, double& cosine) {
    constexpr double QUARTER = 0x1.921fb54400000p+0, REST = 0x1.0b4611a600000p-34, LAST = 0x1.3198a2e037073p-69;
    constexpr double WHOLE = 6755399441055744.0;  // 1.5 x 2^52
    const double n = angle * 0.63661977236758134 + WHOLE - WHOLE;
    const double r = angle - n * QUARTER - n * REST - n * LAST, rr = r * r;
    double s = 1.0, c = 1.0;  // innermost first: 1 - rr / (2 3) (1 - rr / (4 5) (...))
    for (int k = 18; k >= 2; k -= 2) {
        s = 1.0 - rr / (double)(k * (k + 1)) * s;
        c = 1.0 - rr / (double)(k * (k - 1)) * c;
    }
    s *= r;
    switch ((int64_t)n & 3) {
        case 0: sine = s, cosine = c; break;
        case 1: sine = c, cosine = -s; break;
        case 2: sine = -s, cosine = -c; break;
        default: sine = -c, cosine = s; break;
    }
}
