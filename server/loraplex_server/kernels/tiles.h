// Products in blocks of 32 rows and 32 columns, bfloat16 with float32 sums: four of AMX's tiles, or AVX-512 BF16's registers.
//
// A tile is sixteen lines of 64 bytes: of a left side 16 rows of 32 values, of a right side 16 pairs of rows, (16 columns, 2).

#pragma once
#include "common.h"

// Two tiles of one side, `line` values from a line to the next, and `step` to the tiles that follow in the depth.
typedef struct { const uint16_t *first, *second; long line, step; } Sides;

// Four tiles of sums: to the right of one lies one, below the two are two more. All distances in values.
typedef struct { long right, below, line; } Places;

#ifdef __AMX_BF16__

// For sums (rows, width) += left (rows, 32) times right: tiles 0 to 3 hold sums, 4 and 5 left sides, 6 and 7 right ones, in pairs
// of the depth, (16 pairs, width, 2).
static inline void shape_tiles(int rows, int width) {
    _Alignas(64) uint8_t shape[64] = {1};
    for (int tile = 0; tile < 8; tile++) {
        *(uint16_t *)(shape + 16 + 2 * tile) = tile == 4 || tile == 5 ? 64 : 4 * width;
        shape[48 + tile] = tile < 6 ? rows : TILE;
    }
    __asm__ volatile("" : : "r"(shape) : "memory");  // gcc 12 believes that the next line reads only eight bytes
    _tile_loadconfig(shape);
}

static inline void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void begin_blocks(void) { shape_tiles(TILE, TILE); }

static inline void end_blocks(void) { _tile_release(); }

// to = from (NULL: 0) + left times right, over so many tiles of the depth; at least the first `rows` of 32 rows. Between
// begin_blocks and end_blocks.
static inline __attribute__((always_inline)) void add_block(float *to, const float *from, Places places, Sides left, Sides right, long steps,
                                                            long rows) {
    if (from) {
        _tile_loadd(0, from, places.line * 4);
        _tile_loadd(1, from + places.right, places.line * 4);
        _tile_loadd(2, from + places.below, places.line * 4);
        _tile_loadd(3, from + places.below + places.right, places.line * 4);
    } else zero_sums();
    for (long step = 0; step < steps; step++) {
        _tile_loadd(4, left.first + step * left.step, left.line * 2);
        _tile_loadd(5, left.second + step * left.step, left.line * 2);
        _tile_loadd(6, right.first + step * right.step, right.line * 2);
        _tile_loadd(7, right.second + step * right.step, right.line * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, places.line * 4);
    _tile_stored(1, to + places.right, places.line * 4);
    _tile_stored(2, to + places.below, places.line * 4);
    _tile_stored(3, to + places.below + places.right, places.line * 4);
}

#else

enum { ROWS = 8 };  // whose 16 sums of 16 columns stay in registers

static inline void begin_blocks(void) {}

static inline void end_blocks(void) {}

static inline __attribute__((always_inline)) void add_rows(float *to, const float *from, Places places, const uint16_t *left, long line, long left_step,
                                                           Sides right, long steps) {
    __m512 sum[ROWS][2];
    for (int row = 0; row < ROWS; row++)
        for (int n = 0; n < 2; n++)
            sum[row][n] = from ? _mm512_loadu_ps(from + row * places.line + n * places.right) : _mm512_setzero_ps();
    for (long step = 0; step < steps; step++, left += left_step, right.first += right.step, right.second += right.step)
        for (int pair = 0; pair < TILE; pair++) {
            __m512bh first = (__m512bh)_mm512_loadu_si512(right.first + pair * right.line);
            __m512bh second = (__m512bh)_mm512_loadu_si512(right.second + pair * right.line);
            for (int row = 0; row < ROWS; row++) {
                __m512bh value = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(left + row * line + pair * 2));
                sum[row][0] = _mm512_dpbf16_ps(sum[row][0], value, first);
                sum[row][1] = _mm512_dpbf16_ps(sum[row][1], value, second);
            }
        }
    for (int row = 0; row < ROWS; row++)
        for (int n = 0; n < 2; n++) _mm512_storeu_ps(to + row * places.line + n * places.right, sum[row][n]);
}

static inline __attribute__((always_inline)) void add_block(float *to, const float *from, Places places, Sides left, Sides right, long steps,
                                                            long rows) {
    for (int row = 0; row < rows; row += ROWS) {
        const uint16_t *side = row < TILE ? left.first : left.second;
        long at = row / TILE * places.below + row % TILE * places.line;
        add_rows(to + at, from ? from + at : NULL, places, side + row % TILE * left.line, left.line, left.step, right, steps);
    }
}

#endif
