/* What is done with stripes: rows hashed, and copied and hashed. Included by cells.c once for each
 * set of instructions, after SET(lanes), SET(stripe) and SET(scramble) of that set.
 */

TARGET INLINE uint64_t SET(merged)(const SET(lanes) *sum, uint64_t length) {
    uint64_t lane[LANES], result = length * PRIME64_1;
    memcpy(lane, sum, sizeof lane);
    for (int i = 0; i < LANES; i += 2)
        result += folded(lane[i] ^ word(SECRET + 11 + 8 * i), lane[i + 1] ^ word(SECRET + 19 + 8 * i));
    result ^= result >> 37;
    result *= PRIME_MIX;
    return result ^ result >> 32;
}

/* The checksum of `length` (at least 64) bytes at `from`, which a copy leaves at `to`. */
TARGET INLINE uint64_t SET(row)(uint8_t *to, const uint8_t *from, size_t length, enum mode mode) {
    const uint64_t begin[LANES] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                   PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    const int copies = mode == COPY || mode == STREAM;
    const size_t whole = (length - 1) / STRIPE; /* the last stripe, whole or not, comes apart */
    SET(lanes) sum;
    memcpy(&sum, begin, sizeof sum);
    for (size_t done = 0; done < whole;) {
        size_t left = whole - done < STRIPES_PER_BLOCK ? whole - done : STRIPES_PER_BLOCK;
        for (size_t i = 0; i < left; i++) {
            size_t at = (done + i) * STRIPE;
            ahead(from + at, mode);
            SET(stripe)(&sum, copies ? to + at : to, from + at, SECRET + SECRET_STEP * i, mode);
        }
        if (left == STRIPES_PER_BLOCK)
            SET(scramble)(&sum, SECRET + SECRET_BYTES - STRIPE);
        done += left;
    }
    /* The last 64 bytes are hashed together; the first of them may have been hashed and stored. */
    uint8_t last[STRIPE];
    memcpy(last, from + length - STRIPE, STRIPE);
    if (copies) {
        size_t rest = length - whole * STRIPE;
        memcpy(to + length - rest, last + STRIPE - rest, rest);
    }
    SET(stripe)(&sum, NULL, last, SECRET + SECRET_BYTES - STRIPE - 7, HASH);
    return SET(merged)(&sum, length);
}

/* Rows `from`, `from_step` bytes apart, which a copy leaves at `to`, `to_step` bytes apart. */
TARGET static void SET(rows)(uint8_t *to, ptrdiff_t to_step, const uint8_t *from,
                             ptrdiff_t from_step, size_t count, size_t length, enum mode mode,
                             uint64_t *sums) {
    for (size_t i = 0; i < count; i++) {
        uint8_t *into = to + (ptrdiff_t)i * to_step;
        const uint8_t *source = from + (ptrdiff_t)i * from_step;
        switch (mode) { /* each a constant for what is inlined */
        case HASH: sums[i] = SET(row)(NULL, source, length, HASH); break;
        case KEEP: sums[i] = SET(row)(NULL, source, length, KEEP); break;
        case COPY: sums[i] = SET(row)(into, source, length, COPY); break;
        case STREAM: sums[i] = SET(row)(into, source, length, STREAM); break;
        }
    }
}
