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
