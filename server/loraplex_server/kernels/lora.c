// scaling B (A x), each token with its own adapter, in AMX tiles: A and B lie as peft keeps them, row after row.
//
// Knows slots, not adapters. First every run's h = scaling A x is made, rounded to bfloat16 as peft rounds A x; a tile of
// tokens then gets B h on top of its sums, run by run, with 0 for the tokens that are not the run's. So a token gets the
// same bits whatever its neighbours, as long as no B holds a NaN or an infinity, which the engine does not let in. The
// split into shrink and expand is Punica's, arXiv:2310.18547.

#pragma once
#include "common.h"

enum { RANKS = 8, SOON = 8 * DEPTH };  // ranks that a thread shrinks at a time; how far ahead it asks for A

// Neighbouring tokens of one slot, in one tile of tokens.
typedef struct { int32_t first, tokens, slot; } Run;

// What a step adds to one layer: the runs, what the table holds by slot, and h, for each run (chunks, 16 pairs of ranks,
// 16 tokens, 2).
typedef struct {
    const Run *runs;
    long count;
    const int64_t *a, *b;
    const int32_t *ranks;
    const float *scaling;
    long chunks;  // of 32 ranks, in the highest rank of the table
    uint16_t *h;
} Lora;

enum { CHUNK = TILE * DEPTH };  // values in a chunk of h

static int chunks_of(const Lora *lora, long run) { return (lora->ranks[lora->runs[run].slot] + DEPTH - 1) / DEPTH; }

// h of `ranks` ranks of a run from one on, at most RANKS; the others of RANKS are 0. a: their rows of A.
static void shrink(uint16_t *h, Run run, const uint16_t *a, int ranks, float scaling, const uint16_t *x, long inputs, int width) {
    _Alignas(64) float sums[4][RANKS * TILE] = {0};
    if (ranks) {
        long stride = inputs * 2, step = TILE * 2 * width, depth = 0;
        shape_tiles(ranks, width);
        zero_sums();
        for (; depth + 4 * DEPTH <= inputs; depth += 4 * DEPTH, x += 4 * step) {  // four sums: each need not wait for the last
            for (int rank = 0; rank < ranks; rank++)
                for (int next = SOON; next < SOON + 4 * DEPTH; next += DEPTH)
                    _mm_prefetch(a + rank * inputs + depth + next, _MM_HINT_T0);
            _tile_loadd(4, a + depth, stride);
            _tile_loadd(6, x, 4 * width);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, a + depth + DEPTH, stride);
            _tile_loadd(7, x + step, 4 * width);
            _tile_dpbf16ps(1, 5, 7);
            _tile_loadd(4, a + depth + 2 * DEPTH, stride);
            _tile_loadd(6, x + 2 * step, 4 * width);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(5, a + depth + 3 * DEPTH, stride);
            _tile_loadd(7, x + 3 * step, 4 * width);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (; depth < inputs; depth += DEPTH, x += step) {
            _tile_loadd(4, a + depth, stride);
            _tile_loadd(6, x, 4 * width);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
    __mmask16 own = ((1 << run.tokens) - 1) << run.first % TILE;
    for (int rank = 0; rank < RANKS; rank += 2) {
        __m512i pair[2];
        for (int i = 0; i < 2; i++) {
            __m512 part[4];
            for (int n = 0; n < 4; n++) part[n] = _mm512_load_ps(sums[n] + (rank + i) * TILE);
            __m512 sum = _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
            pair[i] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum, _mm512_set1_ps(scaling))));
        }
        _mm512_store_si512(h + rank * TILE, _mm512_maskz_or_epi32(own, pair[0], _mm512_slli_epi32(pair[1], 16)));
    }
}

// h of the runs from `first` to `last`, by all threads of a team together. x: the tiles of tokens from the `tile`th on.
static void shrink_all(const Lora *lora, long first, long last, const uint16_t *x, long tile, long inputs, int width) {
    long parts = lora->chunks * DEPTH / RANKS;
#pragma omp for schedule(static, 1) collapse(2)
    for (long i = first; i < last; i++)
        for (long part = 0; part < parts; part++) {
            if (part * RANKS >= chunks_of(lora, i) * DEPTH) continue;
            Run run = lora->runs[i];
            long left = lora->ranks[run.slot] - part * RANKS;
            shrink(lora->h + i * lora->chunks * CHUNK + part * RANKS * TILE, run,
                   (const uint16_t *)lora->a[run.slot] + part * RANKS * inputs, left < 0 ? 0 : left < RANKS ? left : RANKS,
                   lora->scaling[run.slot], x + (run.first / TILE - tile) * inputs * width, inputs, width);
        }
}

// Asks for B's rows of the 32 outputs from `at` on, for the runs from `first` to `last`.
static void ask_for_b(const Lora *lora, long first, long last, long at) {
    for (long i = first, before = -1; i < last; i++) {
        long slot = lora->runs[i].slot, bytes = lora->ranks[slot] * 2;
        if (slot == before) continue;
        for (long byte = 0; byte < 2 * TILE * bytes; byte += 64) _mm_prefetch((const char *)lora->b[slot] + at * bytes + byte, _MM_HINT_T0);
        before = slot;
    }
}

// B h of one run to the sums of `at` and the 15 outputs that follow (tiles 0 and 2) and of 16 more (tiles 1 and 3).
// Behind the ranks of an output a tile reads those of the next, times 0; behind the last output there are none.
static inline __attribute__((always_inline)) void expand(const Lora *lora, long i, long at, long outputs, int second) {
    long rank = lora->ranks[lora->runs[i].slot], chunks = chunks_of(lora, i), stride = rank;
    const uint16_t *b = (const uint16_t *)lora->b[lora->runs[i].slot] + at * rank;
    for (long chunk = 0; chunk < chunks; chunk++, b += DEPTH) {
        _Alignas(64) uint16_t last[2 * TILE][DEPTH];
        const uint16_t *from = b;
        if (at + 2 * TILE == outputs && rank % DEPTH) {
            __mmask32 there = rank - chunk * DEPTH < DEPTH ? (1u << rank % DEPTH) - 1 : ~0u;
            for (int row = 0; row < 2 * TILE; row++) _mm512_store_si512(last[row], _mm512_maskz_loadu_epi16(there, b + row * rank));
            from = last[0], stride = DEPTH;
        }
        _tile_loadd(4, from, stride * 2);
        _tile_loadd(5, from + TILE * stride, stride * 2);
        _tile_loadd(6, lora->h + (i * lora->chunks + chunk) * CHUNK, 64);
        if (second) {
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(3, 5, 6);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
        }
    }
}
