// An adapter's file in one call, on the one thread that asks: read, checked for NaN and infinity, rounded to bfloat16.
//
// It takes no more of its core than it is given: the engine's threads wait for each other in every layer, so that what is
// taken from one of them is taken from all.

#include "common.h"
#include <errno.h>
#include <time.h>
#include <unistd.h>

enum { F32, F16, BF16, PIECE = 1 << 15 };  // values read at a time: they stay in the second cache
enum { TURN = 500000 };                    // nanoseconds of work between two rests

static long worked(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

// Sleep, if a turn of work was done since `since`, until it is `share` of the time. Returns when the next turn began.
static long rest(long since, double share) {
    long now = worked();
    if (now - since < TURN) return since;
    long pause = share < 1 ? (now - since) * (1 / share - 1) : 0;
    struct timespec left = {pause / 1000000000, pause % 1000000000};
    if (pause) nanosleep(&left, NULL);
    return now;
}

static int whole_pread(int fd, void *to, long bytes, long at) {
    while (bytes > 0) {
        ssize_t got = pread(fd, to, bytes, at);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return got < 0 ? errno : EIO;  // the file is shorter than it was
        to = (char *)to + got, bytes -= got, at += got;
    }
    return 0;
}

// To the nearest, ties to even, as torch does; denormal numbers stay. Not for NaN.
static inline __m256i nearest_bf16(__m512i bits) {
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

static inline __mmask16 not_finite(__m512i bits) {
    __m512i exponent = _mm512_set1_epi32(0x7f800000);
    return _mm512_cmpeq_epi32_mask(_mm512_and_si512(bits, exponent), exponent);
}

static inline __m512i as_f32(const void *values, long i, int kind, __mmask16 mask) {
    if (kind == F32) return _mm512_maskz_loadu_epi32(mask, (const int32_t *)values + i);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const int16_t *)values + i);
    if (kind == F16) return _mm512_castps_si512(_mm512_cvtph_ps(half));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

// Tensor t: counts[t] values of kinds[t] from byte begins[t] of the file, to out + starts[t]. share: how much of the time may
// be worked, above 0; it may change meanwhile.
// Returns 0; an errno; or -1 - t when the values of tensor t are not finite, or not once they are rounded.
long load_bf16(int fd, uint16_t *out, long tensors, const long *begins, const long *counts, const long *kinds, const long *starts,
               const volatile double *share) {
    _Alignas(64) char piece[PIECE * 4];
    long since = worked();
    for (long t = 0; t < tensors; t++) {
        long size = kinds[t] == F32 ? 4 : 2;
        for (long done = 0; done < counts[t]; done += PIECE) {
            long count = counts[t] - done < PIECE ? counts[t] - done : PIECE;
            int failed = whole_pread(fd, piece, count * size, begins[t] + done * size);
            if (failed) return failed;
            uint16_t *to = out + starts[t] + done;
            __mmask16 bad = 0;
            for (long i = 0; i < count; i += 16) {
                __mmask16 mask = count - i < 16 ? (1 << (count - i)) - 1 : 0xffff;
                __m512i bits = as_f32(piece, i, kinds[t], mask);
                __m256i rounded = nearest_bf16(bits);
                bad |= not_finite(bits) | not_finite(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
                _mm256_mask_storeu_epi16(to + i, mask, rounded);
            }
            if (bad) return -1 - t;
            since = rest(since, *share);
        }
    }
    return 0;
}
