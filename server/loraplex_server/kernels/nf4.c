// y = x W^T for a weight in 4-bit NormalFloat, and what adapters add to it, on a CPU with AMX: the weight is read once, as
// 4 bits, however many rows x has.
//
// Knows the layout that kernels/nf4.py packs: for each tile of 16 outputs, for each block of 64 inputs, 512 bytes of
// codes and 16 scales. Byte j of code row c holds, for output j / 2, the codes of inputs 2c + j % 2 (low four bits) and
// 32 + 2c + j % 2 (high four bits): the two AMX operands of the block. A block's sum is scaled after it was summed, in
// float32, so a row's result is the same bits whatever other rows there are.

#include "lora.c"

enum { TILE = 16, BLOCK = 64, CODE_BYTES = TILE * BLOCK / 2, MOST_TILES = 8, AHEAD = 64 };

// book: what the values 0 to 15 stand for, as bfloat16, twice, since vpermw looks at five bits of an index.
static void unpack(const uint8_t *codes, __m512i book, uint16_t *low, uint16_t *high) {
    for (int row = 0; row < TILE; row++) {
        __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + row * 32)));
        _mm512_store_si512(low + row * 32, _mm512_permutexvar_epi16(index, book));
        _mm512_store_si512(high + row * 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 4), book));
    }
}

// Tile `tile` of x (rows, inputs), for each block of inputs 16 x 64 values side by side, next to the same block of the
// other tiles; rows that are missing are 0.
static void tile_rows(uint16_t *tiled, const uint16_t *x, long tile, long tiles, long rows, long inputs) {
    for (long row = 0; row < TILE; row++) {
        const uint16_t *from = x + (tile * TILE + row) * inputs;
        uint16_t *to = tiled + (tile * TILE + row) * BLOCK;
        int there = tile * TILE + row < rows;
        for (long block = 0; block < inputs / BLOCK; block++, from += BLOCK, to += tiles * TILE * BLOCK) {
            __m512i low = there ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
            __m512i high = there ? _mm512_loadu_si512(from + 32) : _mm512_setzero_si512();
            _mm512_store_si512(to, low);
            _mm512_store_si512(to + 32, high);
        }
    }
}

static inline void add_scaled(float *sums, const float *products, __m512 scale, int rows) {
    for (int row = 0; row < rows; row++) {
        __m512 sum = _mm512_load_ps(sums + row * TILE), product = _mm512_load_ps(products + row * TILE);
        _mm512_store_ps(sums + row * TILE, _mm512_fmadd_ps(product, scale, sum));
    }
}

// Two tiles of outputs for some tiles of rows, each of `height` rows that count. sums: 2 x tiles x 16 x 16.
static void two_tiles(float *sums, const uint16_t *tiled, const uint8_t *codes, const float *scales, __m512i book,
                      long tiles, int height, long blocks) {
    _Alignas(64) uint16_t weight[4][TILE * 32];
    _Alignas(64) float products[2][TILE * TILE];
    const uint8_t *codes1 = codes + blocks * CODE_BYTES;
    const float *scales1 = scales + blocks * TILE;
    memset(sums, 0, 2 * tiles * TILE * TILE * sizeof(float));
    for (long block = 0; block < blocks; block++) {
        for (int line = 0; line < CODE_BYTES; line += 64) {
            _mm_prefetch(codes + (block + AHEAD) * CODE_BYTES + line, _MM_HINT_T0);
            _mm_prefetch(codes1 + (block + AHEAD) * CODE_BYTES + line, _MM_HINT_T0);
        }
        unpack(codes + block * CODE_BYTES, book, weight[0], weight[1]);
        unpack(codes1 + block * CODE_BYTES, book, weight[2], weight[3]);
        __m512 scale0 = _mm512_loadu_ps(scales + block * TILE), scale1 = _mm512_loadu_ps(scales1 + block * TILE);
        _tile_loadd(2, weight[0], 64);
        _tile_loadd(3, weight[1], 64);
        _tile_loadd(4, weight[2], 64);
        _tile_loadd(5, weight[3], 64);
        for (long tile = 0; tile < tiles; tile++) {
            const uint16_t *part = tiled + (block * tiles + tile) * TILE * BLOCK;
            _tile_loadd(0, part, BLOCK * 2);
            _tile_loadd(1, part + 32, BLOCK * 2);
            _tile_zero(6);
            _tile_zero(7);
            _tile_dpbf16ps(6, 0, 2);
            _tile_dpbf16ps(7, 0, 4);
            _tile_dpbf16ps(6, 1, 3);
            _tile_dpbf16ps(7, 1, 5);
            _tile_stored(6, products[0], 64);
            _tile_stored(7, products[1], 64);
            float *sum = sums + 2 * tile * TILE * TILE;
            if (height == TILE) {
                add_scaled(sum, products[0], scale0, TILE);
                add_scaled(sum + TILE * TILE, products[1], scale1, TILE);
            } else {
                add_scaled(sum, products[0], scale0, height);
                add_scaled(sum + TILE * TILE, products[1], scale1, height);
            }
        }
    }
}

// out (rows, outputs) bfloat16 = x (rows, inputs) bfloat16 times the packed weight, plus bias (outputs) or NULL, plus
// what adapters add. inputs: a multiple of 64; outputs: of 32, and of 64 with adapters.
void nf4_linear(uint16_t *out, const uint16_t *x, const uint8_t *codes, const float *scales, const uint16_t *bias,
                const uint16_t *codebook, long rows, long inputs, long outputs, const Run *runs, long count,
                const int64_t *a, const int64_t *b, const int32_t *ranks, const float *scaling, long most_rank) {
    static _Thread_local Scratch tiled_scratch, h_scratch;
    long blocks = inputs / BLOCK, most = MOST_TILES * TILE;
    uint16_t *tiled = scratch(&tiled_scratch, (rows < most ? (rows + TILE - 1) / TILE * TILE : most) * inputs * 2);
    Lora lora = {runs, count, a, b, ranks, scaling, most_rank, scratch(&h_scratch, rows * most_rank * sizeof(float))};
#pragma omp parallel
    {
        static _Thread_local Scratch sums_scratch;
        float *sums = scratch(&sums_scratch, 2 * MOST_TILES * TILE * TILE * sizeof(float));
        __m512i book = _mm512_loadu_si512(codebook);
        long column, end;
        own_columns(outputs, outputs % COLUMNS ? 2 * TILE : COLUMNS, &column, &end);
        tiles_of_rows(rows < TILE ? rows : TILE);
        shrink_all(&lora, x, inputs);
        for (long first = 0; first < rows; first += most) {  // what fits the second cache with room for weights
            long now = rows - first < most ? rows - first : most, tiles = (now + TILE - 1) / TILE;
#pragma omp for schedule(static)
            for (long tile = 0; tile < tiles; tile++) tile_rows(tiled, x + first * inputs, tile, tiles, now, inputs);
            for (long at = column; at < end; at += 2 * TILE) {
                two_tiles(sums, tiled, codes + at / TILE * blocks * CODE_BYTES, scales + at / TILE * blocks * TILE, book, tiles,
                          rows < TILE ? rows : TILE, blocks);
                __m512 add0 = bias ? from_bf16(bias + at) : _mm512_setzero_ps();
                __m512 add1 = bias ? from_bf16(bias + at + TILE) : _mm512_setzero_ps();
                for (long row = 0; row < now; row++) {
                    float *sum = sums + (row / TILE * 2 * TILE + row % TILE) * TILE;
                    uint16_t *to = out + (first + row) * outputs + at;
                    to_bf16(to, _mm512_add_ps(_mm512_load_ps(sum), add0));
                    to_bf16(to + TILE, _mm512_add_ps(_mm512_load_ps(sum + TILE * TILE), add1));
                }
            }
            if (first + now < rows) {
#pragma omp barrier
            }
        }
        _tile_release();
        if (count) expand_own(out, &lora, outputs);  // to columns that this thread has written
    }
}
