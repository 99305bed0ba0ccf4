// dx = dy W for a weight in 4-bit NormalFloat, as nf4.c knows it: what a frozen layer hands back when adapters are trained.
//
// Tokens are the rows of the products, so that dy lies as it is needed and the sums as they are wanted. Weights are unpacked
// in pairs of outputs, over which the products run: all outputs of 64 inputs at a time, which all tokens then share.

#include "nf4.c"

enum { PAIRS = TILE * DEPTH, GROUPS = BLOCK / TILE, STEP = GROUPS * PAIRS };  // values: of a tile of pairs; of 32 outputs

static inline __attribute__((always_inline)) __m512i values_of(__m512i index, __m512i table, int high) {
    return _mm512_permutexvar_epi16(high ? _mm512_srli_epi16(index, 4) : index, table);
}

// 32 outputs and 64 inputs as bfloat16: (4 groups of inputs, 16 pairs of outputs, 16 inputs, 2).
static inline void unpack_pairs(uint16_t *panel, const Weight *weight, long tile, long block, __m512 book) {
    _Alignas(64) uint16_t order[2][2 * TILE];
    for (int i = 0; i < TILE; i++)
        for (int part = 0; part < 2; part++) order[part][2 * i] = part * TILE + i, order[part][2 * i + 1] = 2 * TILE + part * TILE + i;
    __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
    for (int row = 0; row < 2 * TILE; row += 2) {
        long place = (tile + row / TILE) * weight->blocks + block;
        __m512i index[2], table[2];
        for (int n = 0; n < 2; n++) {
            __m512 values = _mm512_mul_ps(book, _mm512_set1_ps(weight->scales[place * TILE + row % TILE + n]));
            table[n] = (__m512i)_mm512_cvtne2ps_pbh(values, values);
            index[n] = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(weight->codes + place * CODE_BYTES + (row % TILE + n) * 32)));
        }
        uint16_t *to = panel + row / 2 * 2 * TILE;
        for (int half = 0; half < 2; half++, to += 2 * PAIRS) {
            __m512i even = values_of(index[0], table[0], half), odd = values_of(index[1], table[1], half);
            _mm512_store_si512(to, _mm512_permutex2var_epi16(even, first, odd));
            _mm512_store_si512(to + PAIRS, _mm512_permutex2var_epi16(even, second, odd));
        }
    }
}

// `rows` rows of dy in tiles, by all threads of a team together: for each 16 rows, for each 32 outputs, (16, 32); rows that
// are missing are 0.
static void tile_rows(uint16_t *tiled, const uint16_t *dy, long rows, long outputs) {
#pragma omp for schedule(static) collapse(2)
    for (long first = 0; first < rows; first += TILE)
        for (long depth = 0; depth < outputs; depth += DEPTH)
            for (long row = 0; row < TILE; row++) {
                __m512i values = first + row < rows ? _mm512_loadu_si512(dy + (first + row) * outputs + depth) : _mm512_setzero_si512();
                _mm512_store_si512(tiled + first * outputs + depth * TILE + row * DEPTH, values);
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

// dx (rows, inputs) bfloat16 = dy (rows, outputs) bfloat16 times the packed weight. inputs: a multiple of 64; outputs: of 32.
void nf4_grad(uint16_t *dx, const uint16_t *dy, const uint8_t *codes, const float *scales, const float *book, long rows, long inputs,
              long outputs) {
    static _Thread_local Scratch tiled_scratch;
    Weight weight = {codes, scales, book, inputs / BLOCK};
    long most = X_BYTES / (outputs * 2) / (2 * TILE) * (2 * TILE);  // rows at a time: they stay in the second cache
    most = most < 2 * TILE ? 2 * TILE : most > rows ? (rows + 2 * TILE - 1) / (2 * TILE) * (2 * TILE) : most;
    uint16_t *tiled = scratch(&tiled_scratch, most * outputs * 2);
#pragma omp parallel
    {
        static _Thread_local Scratch panel_scratch;
        _Alignas(64) float sums[4][TILE * TILE];
        uint16_t *panel = scratch(&panel_scratch, outputs / DEPTH * STEP * 2);
        __m512 values = _mm512_loadu_ps(book);
        for (long first = 0; first < rows; first += most) {
            long now = rows - first < most ? rows - first : most;
            tile_rows(tiled, dy + first * outputs, now, outputs);
            shape_tiles(TILE, TILE);
#pragma omp for schedule(static)
            for (long block = 0; block < weight.blocks; block++) {
                for (long pair = 0; pair < outputs / DEPTH; pair++) unpack_pairs(panel + pair * STEP, &weight, 2 * pair, block, values);
                for (long row = 0; row < now; row += 2 * TILE) {
                    const uint16_t *upper = tiled + row * outputs, *lower = now - row > TILE ? upper + TILE * outputs : upper;
                    for (int group = 0; group < GROUPS; group += 2) {
                        zero_sums();
                        for (long pair = 0; pair < outputs / DEPTH; pair++) {
                            _tile_loadd(4, upper + pair * PAIRS, 64);
                            _tile_loadd(5, lower + pair * PAIRS, 64);
                            _tile_loadd(6, panel + pair * STEP + group * PAIRS, 64);
                            _tile_loadd(7, panel + pair * STEP + (group + 1) * PAIRS, 64);
                            _tile_dpbf16ps(0, 4, 6);
                            _tile_dpbf16ps(1, 4, 7);
                            _tile_dpbf16ps(2, 5, 6);
                            _tile_dpbf16ps(3, 5, 7);
                        }
                        _tile_stored(0, sums[0], 64);
                        _tile_stored(1, sums[1], 64);
                        _tile_stored(2, sums[2], 64);
                        _tile_stored(3, sums[3], 64);
                        long here = now - row < 2 * TILE ? now - row : 2 * TILE;
                        put(dx + (first + row) * inputs + block * BLOCK + group * TILE, sums, here, inputs);
                    }
                }
            }
        }
        _tile_release();
    }
}
