/* Cells copied and hashed in one pass over memory.
 *
 * A row is a cell. Each of its 64-byte stripes is loaded once; what was loaded is hashed and stored.
 * So a checksum is of the very bytes that arrived, and a copy with its checksum costs one reading
 * and one writing of memory. The checksum is XXH3_64bits with seed 0 and the default secret, as its
 * authors specify it for inputs of more than 240 bytes; shorter ones are left to the library.
 *
 * Stores may stream: they go around the caches and spare the reading of lines that are overwritten
 * whole. That suits what nobody here reads again soon.
 *
 * Nothing here allocates, blocks or fails; the caller (cells.py) keeps to the bounds, and gives no
 * row of fewer than 241 bytes. Portable C for little-endian machines; x86-64 has its stripes in
 * SSE2, which all of them can do, and in AVX2, which is chosen at run time where there is some: it
 * takes a fifth less (docs/adr/0012). What is done with the stripes is in cells_rows.h.
 */

#include "cells.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "cells.c is written for little-endian machines"
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { STRIPE = 64, LANES = 8, SECRET_STEP = 8, SECRET_BYTES = 192 };
enum { STRIPES_PER_BLOCK = (SECRET_BYTES - STRIPE) / SECRET_STEP };
enum { BLOCK = STRIPE * STRIPES_PER_BLOCK };
enum { AHEAD = 2048 }; /* bytes that are asked for before they are needed */

enum mode { HASH, KEEP, COPY, STREAM }; /* KEEP: hashed, for somebody who reads it next */

static const uint64_t PRIME32_1 = 0x9E3779B1U;
static const uint64_t PRIME32_2 = 0x85EBCA77U;
static const uint64_t PRIME32_3 = 0xC2B2AE3DU;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87U;
static const uint64_t PRIME64_2 = 0xC2B2AE3D27D4EB4FU;
static const uint64_t PRIME64_3 = 0x165667B19E3779F9U;
static const uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63U;
static const uint64_t PRIME64_5 = 0x27D4EB2F165667C5U;
static const uint64_t PRIME_MIX = 0x165667919E3779F9U;

static const uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

INLINE uint64_t word(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* ---- parts of one row's checksum -------------------------------------------------------------- */

INLINE uint64_t folded(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* ---- one stripe: loaded, perhaps stored, added to the eight lanes --------------------------- */

#if defined(__SSE2__)

INLINE void ahead(const uint8_t *from, enum mode mode) {
    if (mode == KEEP)
        _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
    else
        _mm_prefetch((const char *)from + AHEAD, _MM_HINT_NTA);
}

static void settle(void) { _mm_sfence(); } /* what was streamed is seen before what follows */

#define SET(name) name##_sse2
#define TARGET

typedef struct { __m128i lane[4]; } SET(lanes);

INLINE __m128i SET(vector)(const uint8_t *at) { return _mm_loadu_si128((const __m128i *)at); }

INLINE void SET(stripe)(SET(lanes) *sum, uint8_t *to, const uint8_t *from,
                        const uint8_t *secret, enum mode mode) {
    for (int i = 0; i < 4; i++) {
        __m128i data = SET(vector)(from + 16 * i);
        __m128i key = _mm_xor_si128(data, SET(vector)(secret + 16 * i));
        __m128i product = _mm_mul_epu32(key, _mm_srli_epi64(key, 32));
        __m128i swapped = _mm_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
        if (mode == STREAM)
            _mm_stream_si128((__m128i *)(to + 16 * i), data);
        else if (mode == COPY)
            _mm_storeu_si128((__m128i *)(to + 16 * i), data);
        sum->lane[i] = _mm_add_epi64(sum->lane[i], _mm_add_epi64(product, swapped));
    }
}

INLINE void SET(scramble)(SET(lanes) *sum, const uint8_t *secret) {
    const __m128i prime = _mm_set1_epi32((int)PRIME32_1);
    for (int i = 0; i < 4; i++) {
        __m128i lane = sum->lane[i];
        lane = _mm_xor_si128(lane, _mm_srli_epi64(lane, 47));
        lane = _mm_xor_si128(lane, SET(vector)(secret + 16 * i));
        __m128i low = _mm_mul_epu32(lane, prime);
        __m128i high = _mm_mul_epu32(_mm_srli_epi64(lane, 32), prime);
        sum->lane[i] = _mm_add_epi64(low, _mm_slli_epi64(high, 32));
    }
}

#include "cells_rows.h"

#undef SET
#undef TARGET

#define SET(name) name##_avx2
#define TARGET __attribute__((target("avx2")))

typedef struct { __m256i lane[2]; } SET(lanes);

TARGET INLINE __m256i SET(vector)(const uint8_t *at) {
    return _mm256_loadu_si256((const __m256i *)at);
}

TARGET INLINE void SET(stripe)(SET(lanes) *sum, uint8_t *to, const uint8_t *from,
                               const uint8_t *secret, enum mode mode) {
    for (int i = 0; i < 2; i++) {
        __m256i data = SET(vector)(from + 32 * i);
        __m256i key = _mm256_xor_si256(data, SET(vector)(secret + 32 * i));
        __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
        __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
        if (mode == STREAM)
            _mm256_stream_si256((__m256i *)(to + 32 * i), data);
        else if (mode == COPY)
            _mm256_storeu_si256((__m256i *)(to + 32 * i), data);
        sum->lane[i] = _mm256_add_epi64(sum->lane[i], _mm256_add_epi64(product, swapped));
    }
}

TARGET INLINE void SET(scramble)(SET(lanes) *sum, const uint8_t *secret) {
    const __m256i prime = _mm256_set1_epi32((int)PRIME32_1);
    for (int i = 0; i < 2; i++) {
        __m256i lane = sum->lane[i];
        lane = _mm256_xor_si256(lane, _mm256_srli_epi64(lane, 47));
        lane = _mm256_xor_si256(lane, SET(vector)(secret + 32 * i));
        __m256i low = _mm256_mul_epu32(lane, prime);
        __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(lane, 32), prime);
        sum->lane[i] = _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
    }
}

#include "cells_rows.h"

#undef SET
#undef TARGET

enum { SSE2_BYTES = 16, AVX2_BYTES = 32 };

INLINE int aligned(const uint8_t *to, ptrdiff_t step, ptrdiff_t bytes) {
    return (uintptr_t)to % (uintptr_t)bytes == 0 && step % bytes == 0;
}

static void rows(uint8_t *to, ptrdiff_t to_step, const uint8_t *from, ptrdiff_t from_step,
                 size_t count, size_t length, enum mode mode, uint64_t *sums) {
    int wide = __builtin_cpu_supports("avx2") != 0;
    if (mode == STREAM) { /* to whole vectors only */
        wide = wide && aligned(to, to_step, AVX2_BYTES);
        if (!wide && !aligned(to, to_step, SSE2_BYTES))
            mode = COPY;
    }
    if (wide)
        rows_avx2(to, to_step, from, from_step, count, length, mode, sums);
    else
        rows_sse2(to, to_step, from, from_step, count, length, mode, sums);
}

#else

INLINE void ahead(const uint8_t *from, enum mode mode) {
    if (mode == KEEP)
        __builtin_prefetch(from + AHEAD, 0, 3);
    else
        __builtin_prefetch(from + AHEAD, 0, 0);
}

static void settle(void) {}

#define SET(name) name##_portable
#define TARGET

typedef struct { uint64_t lane[LANES]; } SET(lanes);

INLINE void SET(stripe)(SET(lanes) *sum, uint8_t *to, const uint8_t *from,
                        const uint8_t *secret, enum mode mode) {
    uint64_t data[LANES];
    memcpy(data, from, STRIPE);
    if (mode == COPY || mode == STREAM)
        memcpy(to, data, STRIPE);
    for (int i = 0; i < LANES; i++) {
        uint64_t key = data[i] ^ word(secret + 8 * i);
        sum->lane[i] += data[i ^ 1] + (key & 0xFFFFFFFFU) * (key >> 32);
    }
}

INLINE void SET(scramble)(SET(lanes) *sum, const uint8_t *secret) {
    for (int i = 0; i < LANES; i++) {
        uint64_t lane = sum->lane[i];
        lane ^= lane >> 47;
        lane ^= word(secret + 8 * i);
        sum->lane[i] = lane * PRIME32_1;
    }
}

#include "cells_rows.h"

static void rows(uint8_t *to, ptrdiff_t to_step, const uint8_t *from, ptrdiff_t from_step,
                 size_t count, size_t length, enum mode mode, uint64_t *sums) {
    mode = mode == STREAM ? COPY : mode;
    rows_portable(to, to_step, from, from_step, count, length, mode, sums);
}

#endif

/* ---- what Python calls ------------------------------------------------------------------------ */

int kv_cells_interface(void) { return 4; } /* changes with any function that Python calls */

/* The checksums of `count` rows of `length` bytes, the first at `from` and `step` bytes apart. */
void kv_hash_rows(const uint8_t *from, ptrdiff_t step, size_t count, size_t length,
                  uint64_t *sums) {
    rows(NULL, 0, from, step, count, length, HASH, sums);
}

void kv_hash_rows_kept(const uint8_t *from, ptrdiff_t step, size_t count, size_t length,
                       uint64_t *sums) {
    rows(NULL, 0, from, step, count, length, KEEP, sums);
}

/* The same of rows that are copied to `to`, `to_step` bytes apart; with `stream` around caches. */
void kv_copy_rows(uint8_t *to, ptrdiff_t to_step, const uint8_t *from, ptrdiff_t from_step,
                  size_t count, size_t length, int stream, uint64_t *sums) {
    rows(to, to_step, from, from_step, count, length, stream ? STREAM : COPY, sums);
    if (stream)
        settle();
}
