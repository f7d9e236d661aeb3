/* Cells through a stream socket, each hashed while the caches hold it.
 *
 * A grid is `layers` x `heads` cells of `cell` bytes, the first at `base`, layers `layer_step` and
 * heads `head_step` bytes apart. It travels in layer-major order, without gaps. A cell is hashed
 * right before it is sent, or right after its last byte arrived: so a checksum is of what the peer
 * is sent, or of what stands here now, and costs no second reading of memory.
 *
 *   kv_send_grid     all of it, behind a head and before its checksums; on a blocking socket
 *   kv_receive_grid  all of it; on a blocking socket
 *   kv_guarded_grid  what comes, as long as two words of shared memory are what they have to be;
 *                    on a non-blocking socket, and it gives up waiting after a while
 *
 * Rules:
 *  1. Who calls (wires.py) answers for the bounds: memory that stays, cells of at least 241 bytes,
 *     at least one of them, room for one checksum each.
 *  2. No call waits longer for a peer that neither takes nor gives a byte than the socket's own
 *     limit (SO_SNDTIMEO, SO_RCVTIMEO) or `wait_ms`. Another thread's shutdown() ends each at once.
 *  3. The guard is looked at right before every system call that copies into a guarded grid, and
 *     none of those calls waits: a peer cannot choose the moment at which its bytes land.
 *  4. Nothing here allocates. Errors come back as -errno; the end of the stream is -ECONNRESET.
 */

#include "cells.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum { EXTENTS_MAX = 256 }; /* of one system call */
enum { WHOLE = 0, LOST = 1, WAITED = 2 };

typedef struct {
    uint8_t *base;
    ptrdiff_t layer_step, head_step;
    size_t layers, heads, cell;
} grid;

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static uint8_t *cell_at(const grid *all, size_t number) {
    return all->base + (ptrdiff_t)(number / all->heads) * all->layer_step +
           (ptrdiff_t)(number % all->heads) * all->head_step;
}

/* Extents for bytes [at, stop) of what travels, beside each other ones joined; how many. `*reached`
 * is where they end: before `stop` when there is no room for more. */
static size_t extents(const grid *all, size_t at, size_t stop, struct iovec *out, size_t room,
                      size_t *reached) {
    size_t used = 0;
    while (at < stop) {
        size_t within = at % all->cell, count = least(all->cell - within, stop - at);
        uint8_t *from = cell_at(all, at / all->cell) + within;
        if (used && (uint8_t *)out[used - 1].iov_base + out[used - 1].iov_len == from) {
            out[used - 1].iov_len += count;
        } else {
            if (used == room)
                break;
            out[used].iov_base = from;
            out[used++].iov_len = count;
        }
        at += count;
    }
    *reached = at;
    return used;
}

/* The checksums of cells [first, stop), into their places in `sums`. */
static void hash(const grid *all, size_t first, size_t stop, uint64_t *sums) {
    while (first < stop) {
        size_t count = least(all->heads - first % all->heads, stop - first);
        kv_hash_rows_kept(cell_at(all, first), all->head_step, count, all->cell, sums + first);
        first += count;
    }
}

/* Leave `moved` bytes out of the first of `left` extents; the new first one. */
static struct iovec *behind(struct iovec *first, size_t *left, size_t moved) {
    while (*left && moved >= first->iov_len) {
        moved -= first->iov_len;
        first++;
        (*left)--;
    }
    if (moved) {
        first->iov_base = (uint8_t *)first->iov_base + moved;
        first->iov_len -= moved;
    }
    return first;
}

/* Every byte of `count` extents, sent or received. 0 or -errno. */
static int all_of(int fd, struct iovec *first, size_t count, int sends) {
    while (count) {
        struct msghdr message = {.msg_iov = first, .msg_iovlen = count};
        ssize_t moved = sends ? sendmsg(fd, &message, MSG_NOSIGNAL)
                              : recvmsg(fd, &message, MSG_WAITALL);
        if (moved < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (moved == 0 && !sends)
            return -ECONNRESET;
        first = behind(first, &count, (size_t)moved);
    }
    return 0;
}

int kv_send_grid(int fd, uint8_t *head, size_t head_bytes, uint8_t *base, ptrdiff_t layer_step,
                 ptrdiff_t head_step, size_t layers, size_t heads, size_t cell, uint64_t *sums,
                 size_t portion) {
    const grid all = {base, layer_step, head_step, layers, heads, cell};
    const size_t cells = layers * heads, each = portion / cell ? portion / cell : 1;
    for (size_t first = 0; first < cells;) {
        struct iovec out[EXTENTS_MAX + 2];
        size_t used = 0, reached = 0, stop = first + least(least(each, EXTENTS_MAX), cells - first);
        hash(&all, first, stop, sums);
        if (first == 0) {
            out[used].iov_base = head;
            out[used++].iov_len = head_bytes;
        }
        used += extents(&all, first * cell, stop * cell, out + used, EXTENTS_MAX, &reached);
        if (stop == cells) {
            out[used].iov_base = sums;
            out[used++].iov_len = cells * sizeof *sums;
        }
        int failed = all_of(fd, out, used, 1);
        if (failed)
            return failed;
        first = stop;
    }
    return 0;
}

int kv_receive_grid(int fd, uint8_t *base, ptrdiff_t layer_step, ptrdiff_t head_step, size_t layers,
                    size_t heads, size_t cell, uint64_t *sums, size_t portion) {
    const grid all = {base, layer_step, head_step, layers, heads, cell};
    const size_t cells = layers * heads, each = portion / cell ? portion / cell : 1;
    for (size_t first = 0; first < cells;) {
        struct iovec out[EXTENTS_MAX];
        size_t reached = 0, stop = first + least(least(each, EXTENTS_MAX), cells - first);
        size_t used = extents(&all, first * cell, stop * cell, out, EXTENTS_MAX, &reached);
        int failed = all_of(fd, out, used, 0);
        if (failed)
            return failed;
        hash(&all, first, stop, sums);
        first = stop;
    }
    return 0;
}

static int holds(const uint64_t *word, uint64_t wanted) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE) == wanted;
}

/* `*done` counts what has arrived, over all calls for a grid; checksums of cells that are whole are
 * in `sums`. `*low` is the socket's low-water mark as it was left: of a grid that is coming, `more`
 * bytes are waited for together. WHOLE, LOST when a word of the guard is another one, WAITED when
 * nothing came for `wait_ms`, or -errno. */
int kv_guarded_grid(int fd, uint8_t *base, ptrdiff_t layer_step, ptrdiff_t head_step, size_t layers,
                    size_t heads, size_t cell, uint64_t *sums, const uint64_t *generation,
                    uint64_t generation_wanted, const uint64_t *epoch, uint64_t epoch_wanted,
                    size_t portion, size_t more, int wait_ms, size_t *done, int *low) {
    const grid all = {base, layer_step, head_step, layers, heads, cell};
    const size_t total = layers * heads * cell;
    while (*done < total) {
        struct iovec out[EXTENTS_MAX];
        size_t reached = 0, stop = *done + least(portion, total - *done);
        struct msghdr message = {.msg_iov = out};
        message.msg_iovlen = extents(&all, *done, stop, out, EXTENTS_MAX, &reached);
        if (!holds(generation, generation_wanted) || !holds(epoch, epoch_wanted))
            return LOST;
        ssize_t moved = recvmsg(fd, &message, MSG_DONTWAIT);
        if (moved > 0) {
            size_t before = *done / cell;
            *done += (size_t)moved;
            hash(&all, before, *done / cell, sums);
            continue;
        }
        if (moved == 0)
            return -ECONNRESET;
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            return -errno;
        int mark = (int)least(more, total - *done);
        if (mark != *low) {
            if (setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &mark, sizeof mark))
                return -errno;
            *low = mark;
        }
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        int ready = poll(&wait, 1, wait_ms);
        if (ready == 0)
            return WAITED;
        if (ready < 0 && errno != EINTR)
            return -errno;
    }
    return WHOLE;
}
