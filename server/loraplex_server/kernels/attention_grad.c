// Causal attention over whole rows, forward and backward, for training: queries by heads, keys and values by fewer.
//
// Scores lie with keys as rows and queries as columns, so that a softmax is a sum of rows, and what one product gives is
// what the next one reads. 32 queries at a time see all their keys: the scores of more are never there. Nothing is kept for
// the backward pass but two numbers for each query and head (arXiv:2205.14135). bfloat16, with float32 sums and softmax.

#include "tiles.h"

enum { SIDE = 2 * TILE, SQUARE = SIDE * SIDE };  // queries, or keys, that go together

typedef struct {
    long tokens, heads, kv_heads, width, padded;  // padded: tokens, up to a multiple of 32
    const int32_t *starts;                        // (rows, tokens): the first key that a query sees; NULL: it sees all before it
    float scale;
} Shape;

static inline __m512i row_of(const uint16_t *from, long row, long count, long stride) {
    return row < count ? _mm512_loadu_si512(from + row * stride) : _mm512_setzero_si512();
}

static inline __m512i half_row(const uint16_t *from, long row, long count, long stride) {
    return row < count ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from + row * stride))) : _mm512_setzero_si512();
}

// Rows of one head, missing ones as 0: (padded, width).
static void copy_rows(uint16_t *to, const uint16_t *from, long count, long padded, long width, long stride) {
    for (long row = 0; row < padded; row++)
        for (long d = 0; d < width; d += DEPTH) _mm512_store_si512(to + row * width + d, row_of(from + d, row, count, stride));
}

// The same on its side: (width, padded).
static void turn_rows(uint16_t *to, const uint16_t *from, long count, long padded, long width, long stride) {
    for (long first = 0; first < padded; first += SIDE)
        for (long d = 0; d < width; d += TILE) {
            __m512i part[TILE];
            for (int i = 0; i < TILE; i++) {
                __m512i even = half_row(from + d, first + 2 * i, count, stride), odd = half_row(from + d, first + 2 * i + 1, count, stride);
                part[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
            }
            transpose(part);
            for (int i = 0; i < TILE; i++) _mm512_storeu_si512(to + (d + i) * padded + first, part[i]);
        }
}

// 32 rows as the right side of a product over their width: for each 32 of it, for each 16 rows, (16 pairs, 16 rows, 2).
static void pairs_of_width(uint16_t *to, const uint16_t *from, long count, long width, long stride) {
    for (long d = 0; d < width; d += DEPTH)
        for (int group = 0; group < 2; group++, to += SQUARE / 2) {
            __m512i part[TILE];
            for (int i = 0; i < TILE; i++) part[i] = row_of(from + d, group * TILE + i, count, stride);
            transpose(part);
            for (int i = 0; i < TILE; i++) _mm512_store_si512(to + i * DEPTH, part[i]);
        }
}

// 32 rows as the right side of a product over themselves: for each 16 of their width, (16 pairs of rows, 16, 2).
static void pairs_of_rows(uint16_t *to, const uint16_t *from, long count, long width, long stride) {
    for (long d = 0; d < width; d += TILE)
        for (int i = 0; i < TILE; i++, to += DEPTH) {
            __m512i even = half_row(from + d, 2 * i, count, stride), odd = half_row(from + d, 2 * i + 1, count, stride);
            _mm512_store_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

// sums (32 rows, 32 columns) float32 = left times right. left: rows with `stride` values between them. right: of each 32 of
// the depth, at `step` values, two groups of columns as (16 pairs, 16, 2), `apart` values from each other, `line` a pair.
static inline void square(float *sums, const uint16_t *left, long stride, const uint16_t *right, long step, long apart, long line, long depth) {
    add_block(sums, NULL, (Places){TILE, TILE * SIDE, SIDE}, (Sides){left, left + TILE * stride, stride, DEPTH}, (Sides){right, right + apart, line, step}, depth / DEPTH, SIDE);
}

// sums (32 rows, width) float32 += left (32, 32) times right, for each 16 of the width (16 pairs, 16, 2).
static inline void add_products(float *sums, const uint16_t *left, const uint16_t *right, long width) {
    Places places = {TILE, TILE * width, width};
    for (long d = 0; d < width; d += SIDE, sums += SIDE, right += SQUARE)
        add_block(sums, sums, places, (Sides){left, left + TILE * SIDE, SIDE, 0}, (Sides){right, right + SQUARE / 2, DEPTH, 0}, 1, SIDE);
}

// Which of 16 queries see a key.
static inline __mmask16 sees(long key, __m512i queries, __m512i starts) {
    __m512i at = _mm512_set1_epi32((int)key);
    return _mm512_cmple_epi32_mask(at, queries) & _mm512_cmple_epi32_mask(starts, at);
}

// The first key that 16 queries see each, from `first` on; and the lowest of them.
static __m512i starts_of(const Shape *shape, long row, long first, long *lowest) {
    _Alignas(64) int32_t starts[TILE];
    for (int i = 0; i < TILE; i++) {
        long query = first + i < shape->tokens ? first + i : shape->tokens - 1;
        starts[i] = shape->starts ? shape->starts[row * shape->tokens + query] : 0;
        if (starts[i] < *lowest) *lowest = starts[i];
    }
    return _mm512_load_si512(starts);
}

static inline __m512i numbers_from(long first) {
    return _mm512_add_epi32(_mm512_set1_epi32((int)first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

// Two rows of 16 values as bfloat16, turn about.
static inline __m512i paired(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even)), high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// sums (width, 32 queries) to (queries, width) bfloat16, times one factor for each query.
static void put_queries(uint16_t *to, const float *sums, long count, long width, long stride, const __m512 factors[2]) {
    for (int group = 0; group < 2; group++)
        for (long d = 0; d < width; d += TILE) {
            __m512i part[TILE];
            for (int i = 0; i < TILE; i++)
                part[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(sums + (d + i) * SIDE + group * TILE), factors[group]));
            transpose(part);
            for (long i = 0; i < TILE && group * TILE + i < count; i++)
                to_bf16(to + (group * TILE + i) * stride + d, _mm512_castsi512_ps(part[i]));
        }
}

// out (rows, tokens, heads, width) and stats (rows, heads, padded, 2): of each query its highest score, scaled, and 1 / the
// sum of its weights. query (rows, tokens, heads, width); keys, values (rows, tokens, kv_heads, width). width: a multiple of 32.
void causal(uint16_t *out, float *stats, const uint16_t *query, const uint16_t *keys, const uint16_t *values, const int32_t *starts,
            long rows, long tokens, long heads, long kv_heads, long width, float scale) {
    Shape shape = {tokens, heads, kv_heads, width, (tokens + SIDE - 1) / SIDE * SIDE, starts, scale};
    long group = heads / kv_heads, padded = shape.padded;
#pragma omp parallel
    {
        static _Thread_local Scratch kept;
        uint16_t *own_keys = scratch(&kept, padded * width * 4 + SIDE * width * 2 + padded * SIDE * 6 + SIDE * width * 4);
        uint16_t *turned = own_keys + padded * width, *asked = turned + padded * width, *weights = asked + SIDE * width;
        float *scores = (float *)(weights + padded * SIDE), *sums = scores + padded * SIDE;
        begin_blocks();
#pragma omp for schedule(static) collapse(2)
        for (long row = 0; row < rows; row++)
            for (long kv = 0; kv < kv_heads; kv++) {
                long place = (row * tokens * kv_heads + kv) * width;
                copy_rows(own_keys, keys + place, tokens, padded, width, kv_heads * width);
                turn_rows(turned, values + place, tokens, padded, width, kv_heads * width);
                for (long head = kv * group; head < (kv + 1) * group; head++)
                    for (long first = 0; first < padded; first += SIDE) {
                        long at = ((row * tokens + first) * heads + head) * width, count = tokens - first, lowest = first;
                        __m512i begin[2] = {starts_of(&shape, row, first, &lowest), starts_of(&shape, row, first + TILE, &lowest)};
                        long from = lowest / SIDE * SIDE, seen = first + SIDE - from;
                        pairs_of_width(asked, query + at, count, width, heads * width);
                        for (long key = 0; key < seen; key += SIDE)
                            square(scores + key * SIDE, own_keys + (from + key) * width, width, asked, SQUARE, SQUARE / 2, DEPTH, width);
                        __m512 share[2];
                        for (int n = 0; n < 2; n++) {
                            __m512i mine = numbers_from(first + n * TILE);
                            __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), by = _mm512_set1_ps(scale);
                            float *column = scores + n * TILE;
                            for (long key = 0; key < seen; key++)
                                most = _mm512_mask_max_ps(most, sees(from + key, mine, begin[n]), most, _mm512_load_ps(column + key * SIDE));
                            most = _mm512_mul_ps(most, by);
                            for (long key = 0; key < seen; key += 2) {
                                __m512 weight[2];
                                for (int i = 0; i < 2; i++) {
                                    __m512 less = _mm512_fmsub_ps(_mm512_load_ps(column + (key + i) * SIDE), by, most);
                                    weight[i] = _mm512_maskz_mov_ps(sees(from + key + i, mine, begin[n]), exponential(less));
                                    sum = _mm512_add_ps(sum, weight[i]);
                                }
                                _mm512_store_si512(weights + (key + n) * SIDE, paired(weight[0], weight[1]));
                            }
                            share[n] = _mm512_div_ps(_mm512_set1_ps(1), sum);
                            float *stat = stats + ((row * heads + head) * padded + first) * 2 + n * TILE;
                            _mm512_storeu_ps(stat, most);
                            _mm512_storeu_ps(stat + SIDE, share[n]);
                        }
                        for (long d = 0; d < width; d += SIDE)  // (width, queries): weights are (pairs of keys, 2 groups, 16, 2)
                            square(sums + d * SIDE, turned + d * padded + from, padded, weights, SQUARE, DEPTH, 2 * DEPTH, seen);
                        put_queries(out + at, sums, count, width, heads * width, share);
                    }
            }
        end_blocks();
    }
}

// What `causal` hands back to query, keys and values, with what was handed to out, `given`.
void causal_grad(uint16_t *dquery, uint16_t *dkeys, uint16_t *dvalues, const uint16_t *given, const uint16_t *query, const uint16_t *keys,
                 const uint16_t *values, const uint16_t *out, const float *stats, const int32_t *starts, long rows, long tokens,
                 long heads, long kv_heads, long width, float scale) {
    Shape shape = {tokens, heads, kv_heads, width, (tokens + SIDE - 1) / SIDE * SIDE, starts, scale};
    long group = heads / kv_heads, padded = shape.padded, all = padded * width, block = SIDE * width;
#pragma omp parallel
    {
        static _Thread_local Scratch kept;
        uint16_t *own_keys = scratch(&kept, all * 6 + all * 8 + block * 8 + padded * SIDE * 2 + block * 4);
        uint16_t *own_values = own_keys + all, *turned = own_values + all, *asked = turned + all, *asked_rows = asked + block;
        uint16_t *handed = asked_rows + block, *handed_rows = handed + block, *slopes = handed_rows + block;
        float *of_keys = (float *)(slopes + padded * SIDE), *of_values = of_keys + all, *sums = of_values + all;
        _Alignas(64) float scores[SQUARE], onward[SQUARE], dots[SIDE];
        _Alignas(64) uint16_t weights[SQUARE], changes[SQUARE];  // (keys, queries)
        __m512 by = _mm512_set1_ps(scale);
        begin_blocks();
#pragma omp for schedule(static) collapse(2)
        for (long row = 0; row < rows; row++)
            for (long kv = 0; kv < kv_heads; kv++) {
                long place = (row * tokens * kv_heads + kv) * width;
                copy_rows(own_keys, keys + place, tokens, padded, width, kv_heads * width);
                copy_rows(own_values, values + place, tokens, padded, width, kv_heads * width);
                turn_rows(turned, keys + place, tokens, padded, width, kv_heads * width);
                memset(of_keys, 0, all * 8);
                for (long head = kv * group; head < (kv + 1) * group; head++)
                    for (long first = 0; first < padded; first += SIDE) {
                        long at = ((row * tokens + first) * heads + head) * width, count = tokens - first, lowest = first;
                        __m512i begin[2] = {starts_of(&shape, row, first, &lowest), starts_of(&shape, row, first + TILE, &lowest)};
                        long from = lowest / SIDE * SIDE, seen = first + SIDE - from, stride = heads * width;
                        pairs_of_width(asked, query + at, count, width, stride);
                        pairs_of_rows(asked_rows, query + at, count, width, stride);
                        pairs_of_width(handed, given + at, count, width, stride);
                        pairs_of_rows(handed_rows, given + at, count, width, stride);
                        for (long i = 0; i < SIDE; i++) {
                            __m512 sum = _mm512_setzero_ps();
                            for (long d = 0; d < width && i < count; d += TILE)
                                sum = _mm512_fmadd_ps(from_bf16(given + at + i * stride + d), from_bf16(out + at + i * stride + d), sum);
                            dots[i] = _mm512_reduce_add_ps(sum);
                        }
                        const float *stat = stats + ((row * heads + head) * padded + first) * 2;
                        for (long key = 0; key < seen; key += SIDE) {
                            square(scores, own_keys + (from + key) * width, width, asked, SQUARE, SQUARE / 2, DEPTH, width);
                            square(onward, own_values + (from + key) * width, width, handed, SQUARE, SQUARE / 2, DEPTH, width);
                            for (int n = 0; n < 2; n++) {
                                __m512i mine = numbers_from(first + n * TILE);
                                __m512 most = _mm512_loadu_ps(stat + n * TILE), share = _mm512_loadu_ps(stat + SIDE + n * TILE);
                                __m512 dot = _mm512_load_ps(dots + n * TILE);
                                for (int i = 0; i < SIDE; i += 2) {
                                    __m512 change[2];
                                    for (int j = 0; j < 2; j++) {
                                        long in = (i + j) * SIDE + n * TILE;
                                        __m512 less = _mm512_fmsub_ps(_mm512_load_ps(scores + in), by, most);
                                        __m512 weight = _mm512_maskz_mul_ps(sees(from + key + i + j, mine, begin[n]), exponential(less), share);
                                        change[j] = _mm512_mul_ps(_mm512_mul_ps(weight, by), _mm512_sub_ps(_mm512_load_ps(onward + in), dot));
                                        to_bf16(weights + in, weight);
                                        to_bf16(changes + in, change[j]);
                                    }
                                    _mm512_store_si512(slopes + (key + i + n) * SIDE, paired(change[0], change[1]));
                                }
                            }
                            add_products(of_values + (from + key) * width, weights, handed_rows, width);
                            add_products(of_keys + (from + key) * width, changes, asked_rows, width);
                        }
                        for (long d = 0; d < width; d += SIDE)
                            square(sums + d * SIDE, turned + d * padded + from, padded, slopes, SQUARE, DEPTH, 2 * DEPTH, seen);
                        put_queries(dquery + at, sums, count, width, stride, (const __m512[2]){_mm512_set1_ps(1), _mm512_set1_ps(1)});
                    }
                for (long token = 0; token < tokens; token++)
                    for (long d = 0; d < width; d += TILE) {
                        long to = place + token * kv_heads * width + d, from = token * width + d;
                        to_bf16(dkeys + to, _mm512_load_ps(of_keys + from));
                        to_bf16(dvalues + to, _mm512_load_ps(of_values + from));
                    }
            }
        end_blocks();
    }
}
