// A layer of a 4-bit weight with its adapters, and adapters alone: by tiles where there is AMX, else by dot products.

#pragma once
#ifdef __AMX_BF16__
#include "nf4.c"
#else
#include "dots.c"
#endif

// out (rows, outputs) bfloat16 = x (rows, inputs) bfloat16 times the packed weight, plus bias (outputs) or NULL, plus
// what adapters add. inputs: a multiple of 64; outputs: of 32. most_rank: the highest rank in the table.
void nf4_linear(uint16_t *out, const uint16_t *x, const uint8_t *codes, const float *scales, const uint16_t *bias, const float *book,
                long rows, long inputs, long outputs, const Run *runs, long count, const int64_t *a, const int64_t *b,
                const int32_t *ranks, const float *scaling, long most_rank) {
    linear(out, x, (Weight){codes, scales, book, inputs / BLOCK}, bias, rows, inputs, outputs,
           (Lora){runs, count, a, b, ranks, scaling, (most_rank + DEPTH - 1) / DEPTH, NULL});
}

// out (rows, outputs) bfloat16 += what the slots of x (rows, inputs) bfloat16 add. Both: multiples of 32.
void lora_add(uint16_t *out, const uint16_t *x, long rows, long inputs, long outputs, const Run *runs, long count,
              const int64_t *a, const int64_t *b, const int32_t *ranks, const float *scaling, long most_rank) {
    linear(out, x, (Weight){NULL, NULL, (const float[TILE]){0}, 0}, NULL, rows, inputs, outputs,
           (Lora){runs, count, a, b, ranks, scaling, (most_rank + DEPTH - 1) / DEPTH, NULL});
}
