// y = x W^T for a weight in 4-bit NormalFloat, and what adapters add to it, in tiles: the weight is read once, as 4 bits,
// however many rows x has.
//
// Outputs are the rows of the products, so that a row of weights is one look-up, and tokens are the columns; a token's result
// is the same bits whatever other tokens there are.

#pragma once
#include "lora.c"
#include "nf4.h"

enum { PANEL = 2 * TILE * BLOCK, X_BYTES = 1 << 20 };

// A block of 32 outputs as bfloat16: (2 tiles of outputs, 2 halves of the inputs, 16 outputs, 32 inputs).
static inline __attribute__((always_inline)) void unpack(uint16_t *panel, const Weight *weight, long tile, long block, __m512 book) {
    for (int second = 0; second < 2; second++, panel += PANEL / 2) {
        const uint8_t *codes = weight->codes + ((tile + second) * weight->blocks + block) * CODE_BYTES;
        const float *scales = weight->scales + ((tile + second) * weight->blocks + block) * TILE;
        for (int line = 0; line < CODE_BYTES; line += 64) _mm_prefetch(codes + AHEAD * CODE_BYTES + line, _MM_HINT_T0);
        for (int row = 0; row < TILE; row++) {
            Values values = values_of(codes + row * 32, scales[row], book);
            _mm512_store_si512(panel + row * DEPTH, values.low);
            _mm512_store_si512(panel + (TILE + row) * DEPTH, values.high);
        }
    }
}

// Sums of 32 outputs for one tile of tokens or two. x: the tokens' tiles, one after the other. panel: where the weights
// are as bfloat16, or with `fresh` get to be: all blocks with `keep`, else two, turn about. Unpacked one block ahead of
// the products. What is asked for `soon` comes meanwhile.
static inline __attribute__((always_inline)) void multiply(int two, int fresh, int keep, uint16_t *panel, const Weight *weight,
                                                           long tile, const uint16_t *x, int width, Soon *soon) {
    __m512 book = _mm512_loadu_ps(weight->book);
    long step = TILE * 2 * width, next = step * 2 * weight->blocks, places = keep ? -1 : 1;
    if (fresh) ask(soon);
    if (fresh && weight->blocks) unpack(panel, weight, tile, 0, book);
    for (long block = 0; block < weight->blocks; block++) {
        const uint16_t *at = panel + (block & places) * PANEL;
        if (fresh) ask(soon);
        if (fresh && block + 1 < weight->blocks) unpack(panel + ((block + 1) & places) * PANEL, weight, tile, block + 1, book);
        for (int half = 0; half < 2; half++, at += PANEL / 4, x += step) {
            _tile_loadd(4, at, 64);
            _tile_loadd(5, at + PANEL / 2, 64);
            _tile_loadd(6, x, 4 * width);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (!two) continue;
            _tile_loadd(7, x + next, 4 * width);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

// Sums of 32 outputs, for the `rows` tokens of one tile, to their place; plus bias, or plus what is there. sums: of 16
// outputs, and of the other 16.
static void finish(uint16_t *out, const float *sums, long rows, long outputs, const uint16_t *bias, int add) {
    __m512i low[TILE], high[TILE];
    for (int i = 0; i < TILE; i++) low[i] = _mm512_load_si512(sums + i * TILE), high[i] = _mm512_load_si512(sums + (TILE + i) * TILE);
    transpose(low);
    transpose(high);
    for (long row = 0; row < rows; row++, out += outputs) {
        const uint16_t *more = add ? out : bias;
        __m512 first = _mm512_castsi512_ps(low[row]), second = _mm512_castsi512_ps(high[row]);
        if (more) first = _mm512_add_ps(first, from_bf16(more)), second = _mm512_add_ps(second, from_bf16(more + TILE));
        _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
}

// `rows` tokens of x from one on in tiles, by all threads of a team together: for each tile of tokens, for each 32 inputs,
// (16 pairs of inputs, width tokens, 2); tokens that are missing are 0.
static void tile_tokens(uint16_t *tiled, const uint16_t *x, long rows, long inputs, int width) {
#pragma omp for schedule(static) collapse(2)
    for (long first = 0; first < rows; first += TILE)
        for (long depth = 0; depth < inputs; depth += DEPTH) {
            __m512i part[TILE];
            for (long row = 0; row < TILE; row++)
                part[row] = first + row < rows ? _mm512_loadu_si512(x + (first + row) * inputs + depth) : _mm512_setzero_si512();
            transpose(part);
            uint16_t *to = tiled + (first * inputs / TILE + depth) * width;
            for (int pair = 0; pair < TILE; pair++) _mm512_mask_storeu_epi32(to + pair * 2 * width, (1 << width) - 1, part[pair]);
        }
}

// The first run from i on that begins at a token or behind it.
static inline long next_tile(const Lora *lora, long i, long last, long token) {
    while (i < last && lora->runs[i].first < token) i++;
    return i;
}

static void linear(uint16_t *out, const uint16_t *x, Weight weight, const uint16_t *bias, long rows, long inputs, long outputs,
                   Lora lora) {
    static _Thread_local Scratch tiled_scratch, h_scratch;
    int width = rows < TILE ? rows : TILE;
    long most = X_BYTES / (inputs * 2) / (2 * TILE) * (2 * TILE), run = 0;  // rows at a time: they stay in the second cache
    most = most < 2 * TILE ? 2 * TILE : most > rows ? (rows + TILE - 1) / TILE * TILE : most;
    uint16_t *tiled = scratch(&tiled_scratch, most * inputs * 2);
    lora.h = scratch(&h_scratch, lora.count * lora.chunks * CHUNK * 2);
#pragma omp parallel firstprivate(run)
    {
        static _Thread_local Scratch panel_scratch;
        _Alignas(64) float sums[4][TILE * TILE];
        int keep = rows > 2 * TILE;
        uint16_t *panel = scratch(&panel_scratch, (keep ? weight.blocks : 2) * PANEL * 2);
        long pairs = outputs / (2 * TILE), threads = omp_get_num_threads(), thread = omp_get_thread_num();
        for (long first = 0; first < rows; first += most) {
            long now = rows - first < most ? rows - first : most, last = next_tile(&lora, run, lora.count, first + now);
            tile_tokens(tiled, x + first * inputs, now, inputs, width);
            if (last > run) shrink_all(&lora, run, last, tiled, first / TILE, inputs, width);
            long share = lines_of_b(&lora, run, last) / (weight.blocks + 1) + 1;
            shape_tiles(TILE, width);
            for (long pair = pairs * thread / threads; pair < pairs * (thread + 1) / threads; pair++) {
                long at = pair * 2 * TILE, i = run;
                Soon soon = {&lora, run, last, at + 2 * TILE, 0, share};
                for (long row = 0; row < now; row += 2 * TILE) {
                    int two = now - row > TILE;
                    const uint16_t *tokens = tiled + row * inputs / TILE * width;
                    zero_sums();
                    if (two && row) multiply(1, 0, keep, panel, &weight, 2 * pair, tokens, width, &soon);
                    else if (two) multiply(1, 1, keep, panel, &weight, 2 * pair, tokens, width, &soon);
                    else if (row) multiply(0, 0, keep, panel, &weight, 2 * pair, tokens, width, &soon);
                    else multiply(0, 1, keep, panel, &weight, 2 * pair, tokens, width, &soon);
                    long second = next_tile(&lora, i, last, first + row + TILE), end = next_tile(&lora, second, last, first + row + 2 * TILE);
                    for (long j = second; i < second || j < end;) {  // turn about: neither's sums need wait for each other
                        if (i < second) expand(&lora, i++, at, outputs, 0);
                        if (j < end) expand(&lora, j++, at, outputs, 1);
                    }
                    i = end;
                    _tile_stored(0, sums[0], 64);
                    _tile_stored(1, sums[1], 64);
                    uint16_t *to = out + (first + row) * outputs + at;
                    finish(to, sums[0], two ? TILE : now - row, outputs, bias ? bias + at : NULL, !weight.codes);
                    if (two) {
                        _tile_stored(2, sums[2], 64);
                        _tile_stored(3, sums[3], 64);
                        to += TILE * outputs;
                        finish(to, sums[2], now - row < 2 * TILE ? now - row - TILE : TILE, outputs, bias ? bias + at : NULL, !weight.codes);
                    }
                }
            }
            run = last;
            if (first + now < rows) {
#pragma omp barrier
            }
        }
        _tile_release();
    }
}
