// Tiles of sixteen rows of 64 bytes, and their products: by AMX, or by AVX-512 BF16 where the compiler is not told of AMX.
//
// For sums (rows, width) += left (rows, 32) times right, in pairs of the depth: (16 pairs, width, 2). Tiles 0 to 3 hold sums,
// 4 and 5 left sides, 6 and 7 right ones. Whoever loads a side leaves it in its place until it was multiplied.

#pragma once
#include "common.h"

#ifdef __AMX_BF16__

#define tile_load _tile_loadd
#define tile_store _tile_stored
#define tile_zero _tile_zero
#define tile_product _tile_dpbf16ps
#define tiles_release _tile_release

static inline void shape_tiles(int rows, int width) {
    _Alignas(64) uint8_t shape[64] = {1};
    for (int tile = 0; tile < 8; tile++) {
        *(uint16_t *)(shape + 16 + 2 * tile) = tile == 4 || tile == 5 ? 64 : 4 * width;
        shape[48 + tile] = tile < 6 ? rows : TILE;
    }
    __asm__ volatile("" : : "r"(shape) : "memory");  // gcc 12 believes that the next line reads only eight bytes
    _tile_loadconfig(shape);
}

#else

// A side is not copied, but read where it lies.
typedef struct { const char *at; long stride; } Side;

static _Thread_local struct {
    _Alignas(64) float sums[4][TILE][TILE];
    Side sides[8];
    int rows;
    __mmask16 columns;
} tiles;

static inline void shape_tiles(int rows, int width) {
    tiles.rows = rows;
    tiles.columns = (1 << width) - 1;
}

static inline void tile_zero(int tile) { memset(tiles.sums[tile], 0, sizeof tiles.sums[tile]); }

static inline void tile_load(int tile, const void *at, long stride) {
    if (tile > 3) tiles.sides[tile] = (Side){at, stride};
    else
        for (int row = 0; row < tiles.rows; row++)
            _mm512_store_ps(tiles.sums[tile][row], _mm512_maskz_loadu_ps(tiles.columns, (const char *)at + row * stride));
}

static inline void tile_store(int tile, void *at, long stride) {
    for (int row = 0; row < tiles.rows; row++)
        _mm512_mask_storeu_ps((char *)at + row * stride, tiles.columns, _mm512_load_ps(tiles.sums[tile][row]));
}

// Rows that are missing are read from the last one, and not stored.
static inline __attribute__((always_inline)) void product_of(float (*sums)[TILE], Side left, Side right, int count, int rows, __mmask16 columns) {
    __m512 sum[TILE];
    const char *at[TILE];
    for (int row = 0; row < count; row++) {
        sum[row] = _mm512_load_ps(sums[row]);
        at[row] = left.at + (row < rows ? row : rows - 1) * left.stride;
    }
#pragma GCC unroll 2
    for (int pair = 0; pair < TILE; pair++) {
        __m512bh other = (__m512bh)_mm512_maskz_loadu_epi32(columns, right.at + pair * right.stride);
#pragma GCC unroll 16
        for (int row = 0; row < count; row++)
            sum[row] = _mm512_dpbf16_ps(sum[row], (__m512bh)_mm512_set1_epi32(*(const int32_t *)(at[row] + pair * 4)), other);
    }
    for (int row = 0; row < count; row++) _mm512_store_ps(sums[row], sum[row]);
}

static inline void tile_product(int sum, int left, int right) {
    Side of_rows = tiles.sides[left], of_columns = tiles.sides[right];
    if (tiles.rows == TILE) product_of(tiles.sums[sum], of_rows, of_columns, TILE, TILE, tiles.columns);
    else product_of(tiles.sums[sum], of_rows, of_columns, TILE / 2, tiles.rows, tiles.columns);
}

static inline void tiles_release(void) {}

#endif

static inline void zero_sums(void) {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
}
