// What a row of logits says of its label, and what that hands back: the logits are read as bfloat16 and nothing is kept.

#include "common.h"

static inline float one_from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

// Sixteen values as float32; of fewer that are left, those, and below them all the rest.
static inline __m512 logits_at(const uint16_t *at, long left) {
    if (left >= 16) return from_bf16(at);
    __mmask16 there = (1 << left) - 1;
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, at));
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), there, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
}

// loss (rows,) = log(sum(e^logits)) - the label's logit, in float32. logits (rows, width) bfloat16 become, with `back`, what
// the loss hands back to them: e^logit / sum(e^logits), less 1 for the label. Not a number where a logit is none.
void label_loss(float *loss, uint16_t *logits, const int64_t *labels, long rows, long width, int back) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        uint16_t *at = logits + row * width;
        __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (long i = 0; i < width; i += 16) most = _mm512_max_ps(most, logits_at(at + i, width - i));
        float top = _mm512_reduce_max_ps(most), label = one_from_bf16(at[labels[row]]);
        most = _mm512_set1_ps(top);
        for (long i = 0; i < width; i += 16) sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(logits_at(at + i, width - i), most)));
        float total = _mm512_reduce_add_ps(sum);
        loss[row] = logf(total) + top - label;
        if (!back) continue;
        __m512 share = _mm512_set1_ps(1 / total);
        for (long i = 0; i < width; i += 16) {
            __m512 part = _mm512_mul_ps(exponential(_mm512_sub_ps(logits_at(at + i, width - i), most)), share);
            if (labels[row] / 16 == i / 16) part = _mm512_mask_sub_ps(part, 1 << labels[row] % 16, part, _mm512_set1_ps(1));
            __mmask16 there = width - i < 16 ? (1 << (width - i)) - 1 : 0xffff;
            _mm256_mask_storeu_epi16(at + i, there, (__m256i)_mm512_cvtneps_pbh(part));
        }
    }
}
