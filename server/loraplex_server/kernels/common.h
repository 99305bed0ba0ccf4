// What the kernels share: bfloat16 to float32 and back, sixteen at a time.

#pragma once
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { TILE = 16, DEPTH = 32 };  // values in a row of a tile: 16 of float32, 32 of bfloat16

static inline __m512 from_bf16(const uint16_t *at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16));
}

static inline void to_bf16(uint16_t *at, __m512 values) {
    _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh(values));
}

static inline __attribute__((always_inline)) void transpose(__m512i rows[TILE]) {
    __m512i t[TILE];
    for (int i = 0; i < TILE; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < TILE; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {  // four rows of four values by four, in each quarter of rows[i], rows[i + 4], ...
        __m512i even0 = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88), odd0 = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        __m512i even1 = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88), odd1 = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(even0, even1, 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
        t[i + 12] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
    }
    for (int i = 0; i < TILE; i++) rows[i] = t[i];
}

// Memory that a thread keeps for its next call. Returns at least `bytes`, aligned to 64.
typedef struct { void *memory; size_t bytes; } Scratch;

static inline void *scratch(Scratch *kept, size_t bytes) {
    if (kept->bytes < bytes) {
        free(kept->memory);
        kept->bytes = (bytes + 63) / 64 * 64;
        kept->memory = aligned_alloc(64, kept->bytes);
    }
    return kept->memory;
}

// e^x, to about one part in ten million; 0 for x below -87, and not a number for what is none.
static inline __m512 exponential(__m512 x) {
    __m512 power = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-1e4f), x), _mm512_set1_ps(1.44269504f));
    __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(power, whole), sum = _mm512_set1_ps(1.5403530e-4f);  // Taylor of 2^f, |f| at most 1/2
    const float terms[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    for (int i = 0; i < 6; i++) sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(sum, whole);
}
