// The small things between two products, each in one pass: what transformers does in seven steps, or in two.
//
// bfloat16 in and out; rounded to it wherever transformers' modules round.

#include "common.h"

static inline __m512 rounded(__m512 values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values)), 16));
}

// out = weight * x / sqrt(mean(x^2) + epsilon), row by row (arXiv:1910.07467). width: a multiple of 16.
void rms_norm(uint16_t *out, const uint16_t *x, const uint16_t *weight, long rows, long width, float epsilon) {
#pragma omp parallel for schedule(static) if (rows > 3)
    for (long row = 0; row < rows; row++) {
        const uint16_t *from = x + row * width;
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < width; i += 16) sum = _mm512_fmadd_ps(from_bf16(from + i), from_bf16(from + i), sum);
        __m512 scale = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(sum) / width + epsilon));
        for (long i = 0; i < width; i += 16)
            to_bf16(out + row * width + i, _mm512_mul_ps(rounded(_mm512_mul_ps(from_bf16(from + i), scale)), from_bf16(weight + i)));
    }
}

// out = gate * sigmoid(gate) * up (SwiGLU, arXiv:2002.05202). count: a multiple of 16.
void silu_mul(uint16_t *out, const uint16_t *gate, const uint16_t *up, long count) {
    __m512 one = _mm512_set1_ps(1);
#pragma omp parallel for schedule(static) if (count > 1 << 14)
    for (long i = 0; i < count; i += 16) {
        __m512 x = from_bf16(gate + i), low = _mm512_sub_ps(_mm512_setzero_ps(), x);
        __m512 silu = _mm512_div_ps(x, _mm512_add_ps(one, exponential(low)));
        to_bf16(out + i, _mm512_mul_ps(rounded(silu), from_bf16(up + i)));
    }
}

// What rms_norm hands back to x: scale (weight dy - x scale^2 mean(weight dy x)), with scale = 1 / sqrt(mean(x^2) + epsilon).
void rms_norm_grad(uint16_t *dx, const uint16_t *dy, const uint16_t *x, const uint16_t *weight, long rows, long width, float epsilon) {
#pragma omp parallel for schedule(static) if (rows > 3)
    for (long row = 0; row < rows; row++) {
        const uint16_t *from = x + row * width, *given = dy + row * width;
        __m512 squares = _mm512_setzero_ps(), along = _mm512_setzero_ps();
        for (long i = 0; i < width; i += 16) {
            __m512 value = from_bf16(from + i);
            squares = _mm512_fmadd_ps(value, value, squares);
            along = _mm512_fmadd_ps(_mm512_mul_ps(from_bf16(given + i), from_bf16(weight + i)), value, along);
        }
        float scale = 1 / sqrtf(_mm512_reduce_add_ps(squares) / width + epsilon);
        __m512 all = _mm512_set1_ps(scale), back = _mm512_set1_ps(scale * scale * scale * _mm512_reduce_add_ps(along) / width);
        for (long i = 0; i < width; i += 16) {
            __m512 direct = _mm512_mul_ps(_mm512_mul_ps(from_bf16(given + i), from_bf16(weight + i)), all);
            to_bf16(dx + row * width + i, _mm512_fnmadd_ps(from_bf16(from + i), back, direct));
        }
    }
}

// What silu_mul hands back to gate and up. count: a multiple of 16.
void silu_mul_grad(uint16_t *dgate, uint16_t *dup, const uint16_t *dy, const uint16_t *gate, const uint16_t *up, long count) {
    __m512 one = _mm512_set1_ps(1);
#pragma omp parallel for schedule(static) if (count > 1 << 14)
    for (long i = 0; i < count; i += 16) {
        __m512 x = from_bf16(gate + i), given = from_bf16(dy + i), low = _mm512_sub_ps(_mm512_setzero_ps(), x);
        __m512 open = _mm512_div_ps(one, _mm512_add_ps(one, exponential(low))), silu = _mm512_mul_ps(x, open);
        __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, open), open);
        to_bf16(dup + i, _mm512_mul_ps(given, silu));
        to_bf16(dgate + i, _mm512_mul_ps(_mm512_mul_ps(given, from_bf16(up + i)), slope));
    }
}

// Rotary position embedding (arXiv:2104.09864) of x (tokens, heads, width), with cos and sin (tokens, width); or, with
// `back`, what it hands back. width: a multiple of 32.
void rotate(uint16_t *out, const uint16_t *x, const uint16_t *cosine, const uint16_t *sine, long tokens, long heads, long width, int back) {
    long half = width / 2;
#pragma omp parallel for schedule(static) if (tokens > 3)
    for (long token = 0; token < tokens; token++)
        for (long head = 0; head < heads; head++)
            for (long i = 0; i < half; i += 16) {
                long low = token * width + i, at = (token * heads + head) * width + i;
                __m512 x1 = from_bf16(x + at), x2 = from_bf16(x + at + half), s1 = from_bf16(sine + low), s2 = from_bf16(sine + low + half);
                __m512 y1 = _mm512_mul_ps(x1, from_bf16(cosine + low)), y2 = _mm512_mul_ps(x2, from_bf16(cosine + low + half));
                to_bf16(out + at, back ? _mm512_fmadd_ps(x2, s2, y1) : _mm512_fnmadd_ps(x2, s1, y1));
                to_bf16(out + at + half, back ? _mm512_fnmadd_ps(x1, s1, y2) : _mm512_fmadd_ps(x1, s2, y2));
            }
}
