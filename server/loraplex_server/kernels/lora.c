// out += scaling B (A x), each token with its own adapter: all adapters of a step in one call per layer.
//
// Knows slots, not adapters. A is (rank, inputs), B is kept as (rank, outputs), so that both are read along their rows;
// a slot of rank 0 has nothing in this layer. Sums are float32, their order depends on the layer alone: a token gets
// the same bits whatever its neighbours. The split into shrink and expand is Punica's, arXiv:2310.18547.

#pragma once
#include <omp.h>
#include "common.h"

enum { TOKENS = 4, RANKS = 4, COLUMNS = 64 };

// A run of at most four neighbouring tokens of one slot.
typedef struct { int32_t first, tokens, slot; } Run;


// h[t][r] for `tokens` tokens and `ranks` ranks, both constants where this is inlined.
static inline __attribute__((always_inline)) void shrink(float *h, long h_stride, const uint16_t *x, const uint16_t *a,
                                                         float scaling, long inputs, int tokens, int ranks) {
    __m512 sums[TOKENS][RANKS];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ranks; r++) sums[t][r] = _mm512_setzero_ps();
    for (long i = 0; i < inputs; i += 32) {
        __m512bh weight[RANKS];
        for (int r = 0; r < ranks; r++) weight[r] = (__m512bh)_mm512_loadu_si512(a + r * inputs + i);
        for (int t = 0; t < tokens; t++) {
            __m512bh value = (__m512bh)_mm512_loadu_si512(x + t * inputs + i);
            for (int r = 0; r < ranks; r++) sums[t][r] = _mm512_dpbf16_ps(sums[t][r], value, weight[r]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ranks; r++) h[t * h_stride + r] = scaling * _mm512_reduce_add_ps(sums[t][r]);
}

static void shrink_run(float *h, long h_stride, const uint16_t *x, const uint16_t *a, float scaling, long inputs, int tokens,
                       int ranks) {
    if (ranks == RANKS) {
        switch (tokens) {
            case 1: return shrink(h, h_stride, x, a, scaling, inputs, 1, RANKS);
            case 2: return shrink(h, h_stride, x, a, scaling, inputs, 2, RANKS);
            case 3: return shrink(h, h_stride, x, a, scaling, inputs, 3, RANKS);
            default: return shrink(h, h_stride, x, a, scaling, inputs, 4, RANKS);
        }
    }
    for (int r = 0; r < ranks; r++)
        for (int t = 0; t < tokens; t++)
            shrink(h + t * h_stride + r, h_stride, x + t * inputs, a + r * inputs, scaling, inputs, 1, 1);
}

static inline __attribute__((always_inline)) void expand(uint16_t *out, const float *h, long h_stride, const uint16_t *b,
                                                         int rank, long outputs, int tokens) {
    __m512 sums[TOKENS][COLUMNS / 16];
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < COLUMNS / 16; c++) sums[t][c] = _mm512_setzero_ps();
    for (int r = 0; r < rank; r++) {
        __m512 weight[COLUMNS / 16];
        for (int c = 0; c < COLUMNS / 16; c++) weight[c] = from_bf16(b + r * outputs + 16 * c);
        for (int t = 0; t < tokens; t++) {
            __m512 value = _mm512_set1_ps(h[t * h_stride + r]);
            for (int c = 0; c < COLUMNS / 16; c++) sums[t][c] = _mm512_fmadd_ps(value, weight[c], sums[t][c]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < COLUMNS / 16; c++) {
            uint16_t *to = out + t * outputs + 16 * c;
            to_bf16(to, _mm512_add_ps(from_bf16(to), sums[t][c]));
        }
}

static void expand_run(uint16_t *out, const float *h, long h_stride, const uint16_t *b, int rank, long outputs, int tokens) {
    switch (tokens) {
        case 1: return expand(out, h, h_stride, b, rank, outputs, 1);
        case 2: return expand(out, h, h_stride, b, rank, outputs, 2);
        case 3: return expand(out, h, h_stride, b, rank, outputs, 3);
        default: return expand(out, h, h_stride, b, rank, outputs, 4);
    }
}

// What a step adds to one layer: the runs, what the table holds by slot, and h (tokens, most_rank).
typedef struct {
    const Run *runs;
    long count;
    const int64_t *a, *b;
    const int32_t *ranks;
    const float *scaling;
    long most_rank;
    float *h;
} Lora;

// h of every run, by all threads of a team together; they do not wait for each other.
static void shrink_all(const Lora *lora, const uint16_t *x, long inputs) {
    long parts = (lora->most_rank + RANKS - 1) / RANKS;
#pragma omp for schedule(static, 1) collapse(2) nowait
    for (long i = 0; i < lora->count; i++)
        for (long part = 0; part < parts; part++) {
            Run run = lora->runs[i];
            int left = lora->ranks[run.slot] - part * RANKS;
            if (left > 0)
                shrink_run(lora->h + run.first * lora->most_rank + part * RANKS, lora->most_rank, x + run.first * inputs,
                           (const uint16_t *)lora->a[run.slot] + part * RANKS * inputs, lora->scaling[run.slot], inputs,
                           run.tokens, left < RANKS ? left : RANKS);
        }
}

// The columns of a layer's outputs that are the business of the thread that calls, in steps of `step`.
static void own_columns(long outputs, long step, long *first, long *last) {
    long threads = omp_get_num_threads(), thread = omp_get_thread_num(), all = outputs / step;
    *first = all * thread / threads * step;
    *last = all * (thread + 1) / threads * step;
}

// out += B h for the columns of the thread that calls: it goes along them once for every run, so that weights are read in
// their order.
static void expand_own(uint16_t *out, const Lora *lora, long outputs) {
    long first, last;
    own_columns(outputs, COLUMNS, &first, &last);
    for (long i = 0; i < lora->count; i++) {
        Run run = lora->runs[i];
        for (long column = first; lora->ranks[run.slot] && column < last; column += COLUMNS)
            expand_run(out + run.first * outputs + column, lora->h + run.first * lora->most_rank, lora->most_rank,
                       (const uint16_t *)lora->b[run.slot] + column, lora->ranks[run.slot], outputs, run.tokens);
    }
}

// out (tokens, outputs) bfloat16 += what the slots of x (tokens, inputs) bfloat16 add. inputs: a multiple of 32,
// outputs: of 64. most_rank: the highest rank in the table.
void lora_add(uint16_t *out, const uint16_t *x, long tokens, long inputs, long outputs, const Run *runs, long count,
              const int64_t *a, const int64_t *b, const int32_t *ranks, const float *scaling, long most_rank) {
    static _Thread_local Scratch h_scratch;
    Lora lora = {runs, count, a, b, ranks, scaling, most_rank, scratch(&h_scratch, tokens * most_rank * sizeof(float))};
#pragma omp parallel
    {
        shrink_all(&lora, x, inputs);
#pragma omp barrier
        expand_own(out, &lora, outputs);
    }
}
