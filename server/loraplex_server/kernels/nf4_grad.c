// dx = dy W for a weight in 4-bit NormalFloat, as nf4.h knows it: what a frozen layer hands back when adapters are trained.
//
// Tokens are the rows of the products, so that dy lies as it is needed and the sums as they are wanted. Weights are unpacked
// in pairs of outputs, over which the products run: many outputs of 64 inputs at a time, which many tokens then share.

#include "nf4.h"
#include "tiles.h"

enum { PAIRS = TILE * DEPTH, GROUPS = BLOCK / TILE, STEP = GROUPS * PAIRS };  // values: of a tile of pairs; of 32 outputs
enum { PAIRS_AT_ONCE = 72, DY_BYTES = 1 << 20 };                               // 2,304 outputs, of which 64 inputs are 288 KiB

// 32 outputs and 64 inputs as bfloat16: (4 groups of inputs, 16 pairs of outputs, 16 inputs, 2).
static inline void unpack_pairs(uint16_t *panel, const Weight *weight, long tile, long block, __m512 book) {
    _Alignas(64) uint16_t order[2][2 * TILE];
    for (int i = 0; i < TILE; i++)
        for (int part = 0; part < 2; part++) order[part][2 * i] = part * TILE + i, order[part][2 * i + 1] = 2 * TILE + part * TILE + i;
    __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
    for (int row = 0; row < 2 * TILE; row += 2) {
        long place = (tile + row / TILE) * weight->blocks + block;
        Values of[2];
        for (int n = 0; n < 2; n++)
            of[n] = values_of(weight->codes + place * CODE_BYTES + (row % TILE + n) * 32, weight->scales[place * TILE + row % TILE + n], book);
        uint16_t *to = panel + row / 2 * 2 * TILE;
        _mm512_store_si512(to, _mm512_permutex2var_epi16(of[0].low, first, of[1].low));
        _mm512_store_si512(to + PAIRS, _mm512_permutex2var_epi16(of[0].low, second, of[1].low));
        _mm512_store_si512(to + 2 * PAIRS, _mm512_permutex2var_epi16(of[0].high, first, of[1].high));
        _mm512_store_si512(to + 3 * PAIRS, _mm512_permutex2var_epi16(of[0].high, second, of[1].high));
    }
}

// What is multiplied with the weight's outputs, and behind them with the adapters' ranks.
typedef struct { const uint16_t *dy, *dh; long outputs, ranks; } Given;

// Of `rows` rows from `first` on the outputs, and ranks, of the pairs from `begin` to `end` in tiles, by all threads of a team
// together: for each 16 rows, for each 32 outputs, (16, 32); rows that are missing are 0.
static void tile_rows(uint16_t *tiled, const Given *given, long first, long rows, long begin, long end) {
#pragma omp for schedule(static) collapse(2)
    for (long tile = 0; tile < rows; tile += TILE)
        for (long pair = begin; pair < end; pair++) {
            int own = pair * DEPTH < given->outputs;
            long stride = own ? given->outputs : given->ranks;
            const uint16_t *from = (own ? given->dy : given->dh - given->outputs) + (first + tile) * stride + pair * DEPTH;
            uint16_t *to = tiled + (tile / TILE * (end - begin) + pair - begin) * PAIRS;
            for (long row = 0; row < TILE; row++)
                _mm512_store_si512(to + row * DEPTH, tile + row < rows ? _mm512_loadu_si512(from + row * stride) : _mm512_setzero_si512());
        }
}

// 32 rows of a matrix (…, inputs), 64 inputs of them, as unpack_pairs leaves them.
static inline void pair_up(uint16_t *panel, const uint16_t *matrix, long inputs) {
    for (int group = 0; group < GROUPS; group++)
        for (int i = 0; i < TILE; i++, panel += DEPTH) {
            const uint16_t *at = matrix + 2 * i * inputs + group * TILE;
            __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
            __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(at + inputs)));
            _mm512_store_si512(panel, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

// Sums of 16 or 32 rows for 32 inputs, to their place. sums: (rows, 16) of each 16 inputs, for the first 16 rows and the others.
static inline void put(uint16_t *dx, float sums[4][TILE * TILE], long rows, long inputs) {
    for (long row = 0; row < rows; row++) {
        float *from = sums[row / TILE * 2] + row % TILE * TILE;
        __m512 low = _mm512_load_ps(from), high = _mm512_load_ps(from + TILE * TILE);
        _mm512_storeu_si512(dx + row * inputs, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

// dx (rows, inputs) bfloat16 = dy (rows, outputs) bfloat16 times the packed weight, plus dh (rows, ranks) times a (ranks,
// inputs), what adapters hand back. inputs: a multiple of 64; outputs and ranks: of 32, ranks may be 0.
//
// Some rows and some outputs at a time, so that both sides of a product stay in the second cache; the sums in between are
// kept as float32.
void nf4_grad(uint16_t *dx, const uint16_t *dy, const uint8_t *codes, const float *scales, const float *book, const uint16_t *dh,
              const uint16_t *a, long rows, long inputs, long outputs, long ranks) {
    static _Thread_local Scratch tiled_scratch, between_scratch;
    Weight weight = {codes, scales, book, inputs / BLOCK};
    Given given = {dy, dh, outputs, ranks};
    long pairs = (outputs + ranks) / DEPTH, parts = (pairs + PAIRS_AT_ONCE - 1) / PAIRS_AT_ONCE, each = (pairs + parts - 1) / parts;
    long most = DY_BYTES / (each * DEPTH * 2) / (2 * TILE) * (2 * TILE);
    most = most > rows ? (rows + 2 * TILE - 1) / (2 * TILE) * (2 * TILE) : most;
    uint16_t *tiled = scratch(&tiled_scratch, most * each * DEPTH * 2);
    float *between = scratch(&between_scratch, parts > 1 ? most * inputs * 4 : 0);
#pragma omp parallel
    {
        static _Thread_local Scratch panel_scratch;
        _Alignas(64) float last[4][TILE * TILE];
        uint16_t *panel = scratch(&panel_scratch, each * STEP * 2);
        __m512 values = _mm512_loadu_ps(book);
        begin_blocks();
        for (long first = 0; first < rows; first += most) {
            long now = rows - first < most ? rows - first : most;
            for (long begin = 0; begin < pairs; begin += each) {
                long end = begin + each < pairs ? begin + each : pairs, count = end - begin;
                tile_rows(tiled, &given, first, now, begin, end);
#pragma omp for schedule(static)
                for (long block = 0; block < weight.blocks; block++) {
                    for (long pair = begin; pair < end; pair++) {
                        uint16_t *to = panel + (pair - begin) * STEP;
                        if (pair * DEPTH < outputs) unpack_pairs(to, &weight, 2 * pair, block, values);
                        else pair_up(to, a + (pair * DEPTH - outputs) * inputs + block * BLOCK, inputs);
                    }
                    for (long row = 0; row < now; row += 2 * TILE)
                        for (int group = 0; group < GROUPS; group += 2) {
                            const uint16_t *upper = tiled + row / TILE * count * PAIRS, *lower = now - row > TILE ? upper + count * PAIRS : upper;
                            float *sums = between + row * inputs + (block * BLOCK + group * TILE) * 2 * TILE;  // (4 tiles, 16, 16)
                            const uint16_t *weights = panel + group * PAIRS;
                            long here = now - row < 2 * TILE ? now - row : 2 * TILE;
                            float *to = end == pairs ? last[0] : sums;
                            add_block(to, begin ? sums : NULL, (Places){TILE * TILE, 2 * TILE * TILE, TILE}, (Sides){upper, lower, DEPTH, PAIRS},
                                      (Sides){weights, weights + PAIRS, DEPTH, STEP}, count, here);
                            if (end == pairs) put(dx + (first + row) * inputs + block * BLOCK + group * TILE, last, here, inputs);
                        }
                }
            }
        }
        end_blocks();
    }
}
