// A weight in 4-bit NormalFloat, in the layout that engine/quantized.py packs: for each tile of 16 outputs, for each block of
// 64 inputs, 16 scales and 16 x 32 bytes of codes. Byte j of an output has the codes of input j (low four bits) and of input
// 32 + j. A weight is its code's value times its block's scale, rounded to bfloat16: what bitsandbytes dequantizes to.

#pragma once
#include "common.h"

enum { BLOCK = 64, CODE_BYTES = TILE * BLOCK / 2, AHEAD = 8 };

typedef struct {
    const uint8_t *codes;  // NULL: there is no weight, only adapters
    const float *scales;
    const float *book;  // what the codes 0 to 15 stand for
    long blocks;
} Weight;

// 64 inputs of one output: the first 32, and the others.
typedef struct { __m512i low, high; } Values;

static inline __attribute__((always_inline)) Values values_of(const uint8_t *codes, float scale, __m512 book) {
    __m512 values = _mm512_mul_ps(book, _mm512_set1_ps(scale));
    __m512i table = (__m512i)_mm512_cvtne2ps_pbh(values, values);  // twice: vpermw looks at five bits of an index
    __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    return (Values){_mm512_permutexvar_epi16(index, table), _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 4), table)};
}
