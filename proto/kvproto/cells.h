/* What the files of the native code need of each other. */

#include <stddef.h>
#include <stdint.h>

/* Checksums of `count` rows of `length` (at least 241) bytes, the first at `from` and `step` bytes
 * apart; the rows are kept in the caches, for who reads them next. */
void kv_hash_rows_kept(const uint8_t *from, ptrdiff_t step, size_t count, size_t length,
                       uint64_t *sums);
