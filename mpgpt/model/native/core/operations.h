// Norms, rotary positions, activations: what a row needs between products, each row by itself.
//
// Knows: the order of a norm's sums. Must not know: products, caches, threads.
#pragma once
#include "math.h"

enum Activation : int32_t { SILU, RELU, GELU_TANH, GELU };

// The sixteens of x [count], the last filled up with zeros.
template <typename Each> INLINE void by_sixteens(const float* x, int count, Each each) {
    int i = 0;
    for (; i + WIDTH <= count; i += WIDTH) each(i, load(x + i), WIDTH);
    if (i == count) return;
    float rest[WIDTH] = {};
    memcpy(rest, x + i, sizeof(float) * (size_t)(count - i));
    each(i, load(rest), count - i);
}

// y = x / sqrt(mean(x^2) + eps) * weight; y may be x
inline void rms_norm(const float* x, const float* weight, int count, float eps, float* y) {
    Sixteen squares = zeros();
    by_sixteens(x, count, [&](int, const Sixteen& v, int) { squares = fma(v, v, squares); });
    const float by = 1.0f / __builtin_sqrtf(sum(squares) / (float)count + eps);
    for (int i = 0; i < count; i++) y[i] = x[i] * by * weight[i];
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias; y may be x
inline void layer_norm(const float* x, const float* weight, const float* bias, int count, float eps, float* y) {
    Sixteen total = zeros(), squares = zeros();
    by_sixteens(x, count, [&](int, const Sixteen& v, int) { total = total + v; });
    const float mean = sum(total) / (float)count;
    by_sixteens(x, count, [&](int, const Sixteen& v, int width) {
        float off[WIDTH];
        store(off, v + splat(-mean));
        for (int i = width; i < WIDTH; i++) off[i] = 0.0f;
        const Sixteen differences = load(off);
        squares = fma(differences, differences, squares);
    });
    const float by = 1.0f / __builtin_sqrtf(sum(squares) / (float)count + eps);
    for (int i = 0; i < count; i++) y[i] = __builtin_fmaf((x[i] - mean) * by, weight[i], bias[i]);
}

// Element i of a head with element i + dim / 2, in place; cosine and sine [dim / 2]
inline void rotate(float* x, const float* cosine, const float* sine, int dim) {
    const int half = dim / 2;
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = __builtin_fmaf(a, cosine[i], -(b * sine[i]));
        x[half + i] = __builtin_fmaf(b, cosine[i], a * sine[i]);
    }
}

template <float (*F)(float)> INLINE void activate(const float* x, const float* by, int count, float* y) {
    if (by)
        for (int i = 0; i < count; i++) y[i] = F(x[i]) * by[i];
    else
        for (int i = 0; i < count; i++) y[i] = F(x[i]);
}

// y = f(x), or f(x) times `by` where that is not null
inline void activate(Activation function, const float* x, const float* by, int count, float* y) {
    switch (function) {
        case SILU: return activate<silu>(x, by, count, y);
        case RELU: return activate<relu>(x, by, count, y);
        case GELU_TANH: return activate<gelu_tanh>(x, by, count, y);
        case GELU: return activate<gelu>(x, by, count, y);
    }
}

// Tables of cosine and sine [positions][half] for frequencies in radians a position. An angle is rounded to float32,
// as models were trained with; its cosine and sine are exact but for their last rounding.
inline void rotary_tables(const float* frequencies, int half, int positions, float gain, float* cosine, float* sine) {
    for (int p = 0; p < positions; p++)
        for (int i = 0; i < half; i++) {
            double s, c;
            sine_and_cosine((double)((float)p * frequencies[i]), s, c);
            cosine[(size_t)p * (size_t)half + (size_t)i] = (float)c * gain;
            sine[(size_t)p * (size_t)half + (size_t)i] = (float)s * gain;
        }
}
