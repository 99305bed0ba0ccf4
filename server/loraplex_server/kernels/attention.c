// Attention of rows with one new token each over paged keys and values: decoding, without gathering or padding.
//
// Knows slots, not pages. All in bfloat16 with float32 sums and softmax; a row's result does not depend on its neighbours.

#include "common.h"

enum { HEADS = 4 };

static float dot(const uint16_t *a, const uint16_t *b, long width) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 32)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
    return _mm512_reduce_add_ps(sum);
}

// scores (seen, with room up to a multiple of 16) become their softmax.
static void softmax(float *scores, long seen) {
    for (long i = seen; i % 16; i++) scores[i] = -INFINITY;
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long i = 0; i < seen; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long i = 0; i < seen; i += 16) {
        __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), most));
        _mm512_storeu_ps(scores + i, weight);
        sum = _mm512_add_ps(sum, weight);
    }
    __m512 share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
    for (long i = 0; i < seen; i += 16) _mm512_storeu_ps(scores + i, _mm512_mul_ps(share, _mm512_loadu_ps(scores + i)));
}

// out, query: (tokens, heads, width); keys, values: (slots, kv_heads, width). Row i is token `tokens[i]` and sees the
// first lengths[i] of the slots context[i * most], .... width: a multiple of 32.
void attend(uint16_t *out, const uint16_t *query, const uint16_t *keys, const uint16_t *values, const int64_t *context,
            const int64_t *lengths, const int64_t *tokens, long rows, long most, long heads, long kv_heads, long width,
            float scale) {
    long group = heads / kv_heads;
#pragma omp parallel for schedule(static, 1) collapse(2)
    for (long row = 0; row < rows; row++)
        for (long kv = 0; kv < kv_heads; kv++) {
            static _Thread_local Scratch kept;
            const int64_t *slots = context + row * most;
            long seen = lengths[row], room = (seen + 15) / 16 * 16, step = kv_heads * width;
            float *scores = scratch(&kept, (group * room + HEADS * width) * sizeof(float)), *sums = scores + group * room;
            long first = (tokens[row] * heads + kv * group) * width;
            for (long i = 0; i < seen; i++)
                for (long head = 0; head < group; head++)
                    scores[head * room + i] = scale * dot(query + first + head * width, keys + slots[i] * step + kv * width, width);
            for (long head = 0; head < group; head++) softmax(scores + head * room, seen);
            for (long head = 0; head < group; head += HEADS) {
                int now = group - head < HEADS ? group - head : HEADS;
                memset(sums, 0, now * width * sizeof(float));
                for (long i = 0; i < seen; i++) {
                    const uint16_t *value = values + slots[i] * step + kv * width;
                    for (long d = 0; d < width; d += 16) {
                        __m512 part = from_bf16(value + d);
                        for (int n = 0; n < now; n++) {
                            float *sum = sums + n * width + d;
                            __m512 weight = _mm512_set1_ps(scores[(head + n) * room + i]);
                            _mm512_storeu_ps(sum, _mm512_fmadd_ps(weight, part, _mm512_loadu_ps(sum)));
                        }
                    }
                }
                for (long d = 0; d < now * width; d += 16) to_bf16(out + first + head * width + d, _mm512_loadu_ps(sums + d));
            }
        }
}
