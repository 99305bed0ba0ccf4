// What a step's adapters add to one layer, scaling B (A x): whose the tokens are, and where A and B lie, as peft keeps them, row
// after row.

#pragma once
#include "common.h"

// Neighbouring tokens of one slot, in one tile of tokens.
typedef struct { int32_t first, tokens, slot; } Run;

// The runs, what the table holds by slot, and h = scaling A x of each run, rounded to bfloat16 as peft rounds A x.
typedef struct {
    const Run *runs;
    long count;
    const int64_t *a, *b;
    const int32_t *ranks;
    const float *scaling;
    long chunks;  // of 32 ranks, in the highest rank of the table
    uint16_t *h;
} Lora;

enum { CHUNK = TILE * DEPTH };  // values of h for 16 tokens and 32 ranks

static inline int chunks_of(const Lora *lora, long run) { return (lora->ranks[lora->runs[run].slot] + DEPTH - 1) / DEPTH; }
