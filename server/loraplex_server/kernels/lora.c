// scaling B (A x), each token with its own adapter, in tiles.
//
// Knows slots, not adapters. First every run's h is made, for each run (chunks, 16 pairs of ranks, 16 tokens, 2); a tile of
// tokens then gets B h on top of its sums, run by run, with 0 for the tokens that are not the run's. So a token gets the
// same bits whatever its neighbours, as long as no B holds a NaN or an infinity, which the engine does not let in. The
// split into shrink and expand is Punica's, arXiv:2310.18547.

#pragma once
#include "lora.h"
#include "tiles.h"

enum { RANKS = 8, SOON = 8 * DEPTH };  // ranks that a thread shrinks at a time; how far ahead it asks for A

// Some ranks of a run, at most RANKS of them: their rows of A, and where their h goes.
typedef struct { const uint16_t *a; uint16_t *h; Run run; int ranks; } Part;

static long list_parts(Part *parts, const Lora *lora, long first, long last, long inputs) {
    long count = 0;
    for (long i = first; i < last; i++) {
        Run run = lora->runs[i];
        long ranks = lora->ranks[run.slot], room = chunks_of(lora, i) * DEPTH;  // h of the ranks that are missing is 0
        for (long rank = 0; rank < room; rank += RANKS)
            parts[count++] = (Part){
                (const uint16_t *)lora->a[run.slot] + rank * inputs, lora->h + i * lora->chunks * CHUNK + rank * TILE, run,
                ranks <= rank ? 0 : ranks - rank < RANKS ? ranks - rank : RANKS};
    }
    return count;
}

// h of up to four parts with as many ranks each, all of one tile of tokens, x.
static void shrink(const Lora *lora, const Part *parts, int count, const uint16_t *x, long inputs, int width) {
    _Alignas(64) float sums[4][RANKS * TILE] = {0};
    if (parts->ranks) {
        long stride = inputs * 2;
        shape_tiles(parts->ranks, width);
        zero_sums();
        for (long depth = 0; depth < inputs; depth += DEPTH, x += TILE * 2 * width) {
            for (int i = 0; i < count; i++)
                for (int rank = 0; rank < parts->ranks; rank++)
                    _mm_prefetch(parts[i].a + rank * inputs + depth + SOON, _MM_HINT_T0);
            _tile_loadd(6, x, 4 * width);
            _tile_loadd(4, parts[0].a + depth, stride);
            _tile_dpbf16ps(0, 4, 6);
            if (count < 2) continue;
            _tile_loadd(5, parts[1].a + depth, stride);
            _tile_dpbf16ps(1, 5, 6);
            if (count < 3) continue;
            _tile_loadd(4, parts[2].a + depth, stride);
            _tile_dpbf16ps(2, 4, 6);
            if (count < 4) continue;
            _tile_loadd(5, parts[3].a + depth, stride);
            _tile_dpbf16ps(3, 5, 6);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
    for (int i = 0; i < count; i++) {
        Run run = parts[i].run;
        __m512 scaling = _mm512_set1_ps(lora->scaling[run.slot]);
        __mmask16 own = ((1 << run.tokens) - 1) << run.first % TILE;
        for (int rank = 0; rank < RANKS; rank += 2) {
            __m512i pair[2];
            for (int n = 0; n < 2; n++) {
                __m512 scaled = _mm512_mul_ps(_mm512_load_ps(sums[i] + (rank + n) * TILE), scaling);
                pair[n] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(scaled));
            }
            _mm512_store_si512(parts[i].h + rank * TILE, _mm512_maskz_or_epi32(own, pair[0], _mm512_slli_epi32(pair[1], 16)));
        }
    }
}

// h of the runs from `first` to `last`, by all threads of a team together. x: the tiles of tokens from the `tile`th on.
// Neighbouring parts go together, so that x is read once for up to four, while there are enough for all threads.
static void shrink_all(const Lora *lora, long first, long last, const uint16_t *x, long tile, long inputs, int width) {
    static _Thread_local Scratch kept;
    Part *parts = scratch(&kept, (last - first) * lora->chunks * (DEPTH / RANKS) * sizeof(Part));
    long count = list_parts(parts, lora, first, last, inputs), each = count / omp_get_num_threads();
    each = each < 1 ? 1 : each > 4 ? 4 : each;
#pragma omp for schedule(static, 1)
    for (long begin = 0; begin < count; begin += each)
        for (long i = begin, next, end = begin + each < count ? begin + each : count; i < end; i = next) {
            long tokens = parts[i].run.first / TILE;
            for (next = i + 1; next < end && parts[next].ranks == parts[i].ranks && parts[next].run.first / TILE == tokens;) next++;
            shrink(lora, parts + i, next - i, x + (tokens - tile) * inputs * width, inputs, width);
        }
}

// What of B is asked for beside other work, `share` lines at a time: rows of 32 outputs from `at` on, of the runs from
// `run` to `last`.
typedef struct { const Lora *lora; long run, last, at, byte, share; } Soon;

static inline long next_slot(const Lora *lora, long run, long last) {
    long slot = lora->runs[run].slot;
    while (run < last && lora->runs[run].slot == slot) run++;
    return run;
}

// How many lines there are for 32 outputs.
static long lines_of_b(const Lora *lora, long run, long last) {
    long lines = 0;
    for (; run < last; run = next_slot(lora, run, last)) lines += lora->ranks[lora->runs[run].slot] * 2 * TILE * 2 / 64;
    return lines;
}

static inline void ask(Soon *soon) {
    for (long n = 0; n < soon->share && soon->run < soon->last; n++) {
        long slot = soon->lora->runs[soon->run].slot, bytes = soon->lora->ranks[slot] * 2;
        _mm_prefetch((const char *)soon->lora->b[slot] + soon->at * bytes + soon->byte, _MM_HINT_T0);
        if ((soon->byte += 64) < 2 * TILE * bytes) continue;
        soon->byte = 0;
        soon->run = next_slot(soon->lora, soon->run, soon->last);
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
