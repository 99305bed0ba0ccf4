// What the kernels share: bfloat16 to float32 and back, sixteen at a time, and the shape of AMX tiles.

#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline __m512 from_bf16(const uint16_t *at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16));
}

static inline void to_bf16(uint16_t *at, __m512 values) {
    _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh(values));
}

// Tiles 0, 1 (rows of x) and 6, 7 (sums) get `rows` rows, 2 to 5 (weights) sixteen; each row is 64 bytes.
static inline void tiles_of_rows(int rows) {
    _Alignas(64) uint8_t shape[64] = {1};
    for (int tile = 0; tile < 8; tile++) {
        *(uint16_t *)(shape + 16 + 2 * tile) = 64;
        shape[48 + tile] = tile < 2 || tile > 5 ? rows : 16;
    }
    _tile_loadconfig(shape);
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

// e^x, to about one part in ten million; 0 for x below -87.
static inline __m512 exponential(__m512 x) {
    __m512 power = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-1e4f)), _mm512_set1_ps(1.44269504f));
    __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(power, whole), sum = _mm512_set1_ps(1.5403530e-4f);  // Taylor of 2^f, |f| at most 1/2
    const float terms[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    for (int i = 0; i < 6; i++) sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(sum, whole);
}
