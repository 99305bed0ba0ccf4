// y = x W^T for a weight in 4-bit NormalFloat, and what adapters add to it, by dot products: what nf4.c does, where there is no
// AMX. Sixteen lanes each add up the products of two inputs in 32, and are added up at the end.
//
// Neither side is put into another order, so that one token costs no more than one token. A token's sums run over the inputs in
// the same order in any company, so its result is the same bits.

#pragma once
#include "lora.h"
#include "nf4.h"

enum { EDGE = 4 };                            // outputs, and tokens, that are multiplied with each other: 16 sums
enum { DEEP = 32 * BLOCK, X_NEAR = 3 << 18 };  // inputs unpacked at a time, which stay in the first cache; bytes of x, in the second

// The sum of each of sixteen vectors, in their order.
static inline __attribute__((always_inline)) __m512 sums_of(const __m512 of[TILE]) {
    __m512 half[TILE / 2], quarter[TILE / 4], pair[2];
    for (int i = 0; i < TILE / 2; i++)  // two vectors' values turn about, in each quarter of a vector
        half[i] = _mm512_add_ps(_mm512_unpacklo_ps(of[2 * i], of[2 * i + 1]), _mm512_unpackhi_ps(of[2 * i], of[2 * i + 1]));
    for (int i = 0; i < TILE / 4; i++) {  // four vectors' in their order
        __m512d first = _mm512_castps_pd(half[2 * i]), second = _mm512_castps_pd(half[2 * i + 1]);
        quarter[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)), _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
    }
    for (int i = 0; i < 2; i++)
        pair[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(pair[0], pair[1], 0x88), _mm512_shuffle_f32x4(pair[0], pair[1], 0xdd));
}

static inline __attribute__((always_inline)) __m512 add_dots(__m512 sum, __m512i left, const uint16_t *right) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)_mm512_loadu_si512(right));
}

// Rows of a matrix, the last one again for those that are missing.
typedef struct { const uint16_t *at[EDGE]; } Rows;

static inline __attribute__((always_inline)) Rows rows_of(const uint16_t *matrix, long row, long rows, long stride) {
    Rows of;
    for (int i = 0; i < EDGE; i++) of.at[i] = matrix + (row + i < rows ? row + i : rows - 1) * stride;
    return of;
}

// sum (4 tokens, 4 rows of left, 16 lanes) += left times x, of `tokens` tokens.
static inline __attribute__((always_inline)) void add_square(int tokens, __m512 sum[TILE], const Rows *left, const Rows *x, long depth) {
    for (long d = 0; d < depth; d += DEPTH) {
        __m512i of[EDGE];
        for (int i = 0; i < EDGE; i++) of[i] = _mm512_loadu_si512(left->at[i] + d);
        for (int token = 0; token < tokens; token++) {
            const uint16_t *own = x->at[token] + d;
            for (int i = 0; i < EDGE; i++) sum[token * EDGE + i] = add_dots(sum[token * EDGE + i], of[i], own);
        }
    }
}

static inline void add_any(long tokens, __m512 sum[TILE], const Rows *left, const Rows *x, long depth) {
    if (tokens == 1) add_square(1, sum, left, x, depth);
    else if (tokens == 2) add_square(2, sum, left, x, depth);
    else if (tokens == 3) add_square(3, sum, left, x, depth);
    else add_square(4, sum, left, x, depth);
}

// h of the runs, (runs, 16 tokens, room for the ranks), by all threads of a team together.
static void shrink(const Lora *lora, const uint16_t *x, long inputs) {
    long room = lora->chunks * DEPTH;
#pragma omp for schedule(static) collapse(2)
    for (long i = 0; i < lora->count; i++)
        for (long rank = 0; rank < room; rank += EDGE) {
            Run run = lora->runs[i];
            long ranks = lora->ranks[run.slot];
            uint16_t *h = lora->h + i * lora->chunks * CHUNK + rank;
            if (rank >= ranks) {
                for (long token = 0; token < run.tokens; token++) memset(h + token * room, 0, EDGE * 2);
                continue;
            }
            Rows a = rows_of((const uint16_t *)lora->a[run.slot], rank, ranks, inputs);
            for (long token = 0; token < run.tokens; token += EDGE) {
                __m512 sum[TILE] = {0};
                Rows own = rows_of(x + run.first * inputs, token, run.tokens, inputs);
                add_any(run.tokens - token, sum, &a, &own, inputs);
                _Alignas(32) uint16_t found[TILE];
                to_bf16(found, _mm512_mul_ps(sums_of(sum), _mm512_set1_ps(lora->scaling[run.slot])));
                for (long t = 0; t < EDGE && token + t < run.tokens; t++)
                    for (long r = 0; r < EDGE; r++) h[(token + t) * room + r] = rank + r < ranks ? found[t * EDGE + r] : 0;
            }
        }
}

// sums (rows, 16 outputs) += B h of the runs from `run` to `last`; the first row is that of token `first`. pairs: room for B of 16
// outputs, for each pair of ranks (16 outputs, 2); kept while runs are of one slot.
static void expand(const Lora *lora, float *sums, long at, long first, long run, long last, __m512i *pairs) {
    for (long i = run, slot = -1; i < last; i++) {
        Run own = lora->runs[i];
        long rank = lora->ranks[own.slot], count = (rank + 1) / 2, room = lora->chunks * DEPTH;
        for (long chunk = 0; own.slot != slot && chunk < rank; chunk += DEPTH) {
            const uint16_t *b = (const uint16_t *)lora->b[own.slot] + at * rank + chunk;
            __mmask32 there = rank - chunk < DEPTH ? (1u << (rank - chunk)) - 1 : ~0u;
            for (int row = 0; row < TILE; row++) pairs[chunk / 2 + row] = _mm512_maskz_loadu_epi16(there, b + row * rank);
            transpose(pairs + chunk / 2);
        }
        slot = own.slot;
        for (long token = 0; token < own.tokens; token++) {
            const uint16_t *h = lora->h + i * lora->chunks * CHUNK + token * room;
            float *to = sums + (own.first + token - first) * TILE;
            __m512 sum = _mm512_load_ps(to);
            for (long pair = 0; pair < count; pair++)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)pairs[pair], (__m512bh)_mm512_set1_epi32(*(const int32_t *)(h + pair * 2)));
            _mm512_store_ps(to, sum);
        }
    }
}

// sums (tokens, 16 outputs) of a tile of the weight and up to four tokens, in groups of `outputs` of them; weights are used as they
// are unpacked.
static inline __attribute__((always_inline)) void multiply_few(int outputs, int tokens, float *sums, const Weight *weight, long tile,
                                                               const uint16_t *x, long inputs) {
    __m512 book = _mm512_loadu_ps(weight->book);
    for (int from = 0; from < TILE; from += outputs) {
        __m512 sum[TILE] = {0};
        for (long block = 0; block < weight->blocks; block++) {
            const uint8_t *codes = weight->codes + (tile * weight->blocks + block) * CODE_BYTES + from * 32;
            const float *scales = weight->scales + (tile * weight->blocks + block) * TILE + from;
            for (int line = 0; line < outputs * 32; line += 64) _mm_prefetch(codes + AHEAD * CODE_BYTES + line, _MM_HINT_T0);
            for (int i = 0; i < outputs; i++) {
                Values values = values_of(codes + i * 32, scales[i], book);
                for (int token = 0; token < tokens; token++) {
                    const uint16_t *own = x + token * inputs + block * BLOCK;
                    __m512 *to = sum + token * outputs + i;
                    *to = add_dots(add_dots(*to, values.low, own), values.high, own + DEPTH);
                }
            }
        }
        _Alignas(64) float found[TILE];
        _mm512_store_ps(found, sums_of(sum));
        for (int token = 0; token < tokens; token++) memcpy(sums + token * TILE + from, found + token * outputs, outputs * sizeof(float));
    }
}

// sums (rows, 16 outputs) of a tile of the weight, four outputs at a time, of which some inputs are unpacked and lie near. between:
// room for the lanes' sums of all rows and four outputs.
static void multiply_many(float *sums, const Weight *weight, long tile, const uint16_t *x, long rows, long inputs, __m512 *between) {
    _Alignas(64) uint16_t panel[EDGE * DEEP];
    __m512 book = _mm512_loadu_ps(weight->book);
    for (int from = 0; from < TILE; from += EDGE)
        for (long begin = 0; begin < inputs; begin += DEEP) {
            long depth = inputs - begin < DEEP ? inputs - begin : DEEP;
            for (long d = 0; d < depth; d += BLOCK) {
                long place = tile * weight->blocks + (begin + d) / BLOCK;
                const uint8_t *codes = weight->codes + place * CODE_BYTES + from * 32;
                for (int line = 0; line < EDGE * 32; line += 64) _mm_prefetch(codes + AHEAD * CODE_BYTES + line, _MM_HINT_T0);
                for (int i = 0; i < EDGE; i++) {
                    Values values = values_of(codes + i * 32, weight->scales[place * TILE + from + i], book);
                    _mm512_store_si512(panel + i * DEEP + d, values.low);
                    _mm512_store_si512(panel + i * DEEP + d + DEPTH, values.high);
                }
            }
            Rows left = rows_of(panel, 0, EDGE, DEEP);
            for (long row = 0; row < rows; row += EDGE) {
                __m512 sum[TILE] = {0}, *kept = between + row * EDGE;
                if (begin) memcpy(sum, kept, sizeof sum);
                Rows own = rows_of(x + begin, row, rows, inputs);
                add_square(EDGE, sum, &left, &own, depth);
                if (begin + depth < inputs) {
                    memcpy(kept, sum, sizeof sum);
                    continue;
                }
                _Alignas(64) float found[TILE];
                _mm512_store_ps(found, sums_of(sum));
                for (int token = 0; token < EDGE; token++) memcpy(sums + (row + token) * TILE + from, found + token * EDGE, EDGE * sizeof(float));
            }
        }
}

static void multiply(float *sums, const Weight *weight, long tile, const uint16_t *x, long rows, long inputs, __m512 *between) {
    if (!weight->codes) memset(sums, 0, rows * TILE * sizeof(float));
    else if (rows > 3 * EDGE) multiply_many(sums, weight, tile, x, rows, inputs, between);
    else for (; rows > 0; rows -= EDGE, sums += EDGE * TILE, x += EDGE * inputs) {
        if (rows == 1) multiply_few(16, 1, sums, weight, tile, x, inputs);
        else if (rows == 2) multiply_few(8, 2, sums, weight, tile, x, inputs);
        else if (rows == 3) multiply_few(4, 3, sums, weight, tile, x, inputs);
        else multiply_few(4, 4, sums, weight, tile, x, inputs);
    }
}

static long run_from(const Lora *lora, long i, long token) {
    while (i < lora->count && lora->runs[i].first < token) i++;
    return i;
}

static void linear(uint16_t *out, const uint16_t *x, Weight weight, const uint16_t *bias, long rows, long inputs, long outputs, Lora lora) {
    static _Thread_local Scratch h_scratch;
    long most = X_NEAR / (inputs * 2) / TILE * TILE;  // rows at a time
    most = most < TILE ? TILE : most > rows ? rows : most;
    lora.h = scratch(&h_scratch, lora.count * lora.chunks * CHUNK * 2);
#pragma omp parallel
    {
        static _Thread_local Scratch sums_scratch, between_scratch, pairs_scratch;
        float *sums = scratch(&sums_scratch, (most + EDGE) * TILE * sizeof(float));
        __m512 *between = scratch(&between_scratch, (most + EDGE) * EDGE * sizeof(__m512));
        __m512i *pairs = scratch(&pairs_scratch, lora.chunks * TILE * sizeof(__m512i));
        shrink(&lora, x, inputs);
        for (long first = 0, run = 0, last; first < rows; first += most, run = last) {
            long now = rows - first < most ? rows - first : most;
            last = run_from(&lora, run, first + now);
#pragma omp for schedule(static) nowait
            for (long tile = 0; tile < outputs / TILE; tile++) {
                multiply(sums, &weight, tile, x + first * inputs, now, inputs, between);
                expand(&lora, sums, tile * TILE, first, run, last, pairs);
                uint16_t *to = out + first * outputs + tile * TILE;
                for (long row = 0; row < now; row++, to += outputs) {
                    __m512 sum = _mm512_load_ps(sums + row * TILE);
                    if (bias) sum = _mm512_add_ps(sum, from_bf16(bias + tile * TILE));
                    else if (!weight.codes) sum = _mm512_add_ps(sum, from_bf16(to));
                    to_bf16(to, sum);
                }
            }
        }
    }
}
