/* Cells through a stream socket, each hashed while the caches hold it.
 *
 * A grid is `layers` x `heads` cells of `cell` bytes, the first at `base`, layers `layer_step` and
 * heads `head_step` bytes apart. It travels in layer-major order, without gaps. A cell is hashed
 * right before it is sent, or right after its last byte arrived: so a checksum is of what the peer
 * is sent, or of what stands here now, and costs no second reading of memory. With `beside`, where
 * cores are to be had, a thread hashes while this one goes on: the checksum is of the same bytes,
 * as no call returns before it.
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
 *  4. Nothing here allocates, but for that thread, which ends within the call, and without which, if
 *     it cannot be had, the call hashes. Errors come back as -errno; the end of the stream is
 *     -ECONNRESET.
 */

#include "cells.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum { EXTENTS_MAX = 256 }; /* of one system call */
enum { STACK_BYTES = 256 << 10 }; /* of a thread that hashes */
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

/* Cells [hashed, ready) of a grid are to be hashed: by a thread beside, or by `reach` itself. */
typedef struct {
    const grid *all;
    uint64_t *sums;
    size_t hashed, ready;
    int over, beside;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t news;
} hashing;

static void *hash_beside(void *argument) {
    hashing *work = argument;
    prctl(PR_SET_NAME, "kvserver-hash");
    for (;;) {
        pthread_mutex_lock(&work->lock);
        while (work->hashed == work->ready && !work->over)
            pthread_cond_wait(&work->news, &work->lock);
        size_t ready = work->ready;
        pthread_mutex_unlock(&work->lock);
        if (work->hashed == ready)
            return NULL;
        hash(work->all, work->hashed, ready, work->sums);
        work->hashed = ready;
    }
}

/* Cells before `first` are hashed already. */
static void hashing_begin(hashing *work, const grid *all, uint64_t *sums, size_t first, int beside) {
    *work = (hashing){.all = all, .sums = sums, .hashed = first, .ready = first};
    if (!beside)
        return;
    pthread_attr_t small;
    sigset_t every, before;
    sigfillset(&every);
    if (pthread_attr_init(&small))
        return;
    pthread_attr_setstacksize(&small, STACK_BYTES);
    pthread_mutex_init(&work->lock, NULL);
    pthread_cond_init(&work->news, NULL);
    pthread_sigmask(SIG_SETMASK, &every, &before); /* signals are for the others */
    work->beside = !pthread_create(&work->thread, &small, hash_beside, work);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&small);
}

/* Cells before `stop` stand. */
static void hashing_reach(hashing *work, size_t stop) {
    if (!work->beside) {
        hash(work->all, work->hashed, stop, work->sums);
        work->hashed = stop;
        return;
    }
    pthread_mutex_lock(&work->lock);
    work->ready = stop;
    pthread_cond_signal(&work->news);
    pthread_mutex_unlock(&work->lock);
}

/* Every cell that stands is hashed, and no thread is left. Again: nothing. */
static void hashing_end(hashing *work) {
    if (!work->beside)
        return;
    pthread_mutex_lock(&work->lock);
    work->over = 1;
    pthread_cond_signal(&work->news);
    pthread_mutex_unlock(&work->lock);
    pthread_join(work->thread, NULL);
    pthread_cond_destroy(&work->news);
    pthread_mutex_destroy(&work->lock);
    work->beside = 0;
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
                 size_t portion, int beside) {
    const grid all = {base, layer_step, head_step, layers, heads, cell};
    const size_t cells = layers * heads, each = portion / cell ? portion / cell : 1;
    int failed = 0;
    hashing work;
    hashing_begin(&work, &all, sums, 0, beside);
    if (work.beside)
        hashing_reach(&work, cells);
    for (size_t first = 0; first < cells && !failed;) {
        struct iovec out[EXTENTS_MAX + 2];
        size_t used = 0, reached = 0, stop = first + least(least(each, EXTENTS_MAX), cells - first);
        if (!work.beside)
            hashing_reach(&work, stop);
        if (first == 0) {
            out[used].iov_base = head;
            out[used++].iov_len = head_bytes;
        }
        used += extents(&all, first * cell, stop * cell, out + used, EXTENTS_MAX, &reached);
        if (stop == cells) {
            hashing_end(&work);
            out[used].iov_base = sums;
            out[used++].iov_len = cells * sizeof *sums;
        }
        failed = all_of(fd, out, used, 1);
        first = stop;
    }
    hashing_end(&work);
    return failed;
}

int kv_receive_grid(int fd, uint8_t *base, ptrdiff_t layer_step, ptrdiff_t head_step, size_t layers,
                    size_t heads, size_t cell, uint64_t *sums, size_t portion, int beside) {
    const grid all = {base, layer_step, head_step, layers, heads, cell};
    const size_t cells = layers * heads, each = portion / cell ? portion / cell : 1;
    int failed = 0;
    hashing work;
    hashing_begin(&work, &all, sums, 0, beside);
    for (size_t first = 0; first < cells && !failed;) {
        struct iovec out[EXTENTS_MAX];
        size_t reached = 0, stop = first + least(least(each, EXTENTS_MAX), cells - first);
        size_t used = extents(&all, first * cell, stop * cell, out, EXTENTS_MAX, &reached);
        failed = all_of(fd, out, used, 0);
        if (!failed)
            hashing_reach(&work, stop);
        first = stop;
    }
    hashing_end(&work);
    return failed;
}

static int holds(const uint64_t *word, uint64_t wanted) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE) == wanted;
}

/* What has come of a grid, and what it may come into. */
typedef struct {
    const uint64_t *generation, *epoch;
    uint64_t generation_wanted, epoch_wanted;
    size_t portion, more;
    int wait_ms;
    size_t *done;
    int *low;
} arrival;

static int guarded(int fd, const grid *all, const arrival *what, hashing *work) {
    const size_t total = all->layers * all->heads * all->cell;
    size_t *done = what->done;
    while (*done < total) {
        struct iovec out[EXTENTS_MAX];
        size_t reached = 0, stop = *done + least(what->portion, total - *done);
        struct msghdr message = {.msg_iov = out};
        message.msg_iovlen = extents(all, *done, stop, out, EXTENTS_MAX, &reached);
        if (!holds(what->generation, what->generation_wanted) ||
            !holds(what->epoch, what->epoch_wanted))
            return LOST;
        ssize_t moved = recvmsg(fd, &message, MSG_DONTWAIT);
        if (moved > 0) {
            *done += (size_t)moved;
            hashing_reach(work, *done / all->cell);
            continue;
        }
        if (moved == 0)
            return -ECONNRESET;
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            return -errno;
        int mark = (int)least(what->more, total - *done);
        if (mark != *what->low) {
            if (setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &mark, sizeof mark))
                return -errno;
            *what->low = mark;
        }
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        int ready = poll(&wait, 1, what->wait_ms);
        if (ready == 0)
            return WAITED;
        if (ready < 0 && errno != EINTR)
            return -errno;
    }
    return WHOLE;
}

/* `*done` counts what has arrived, over all calls for a grid; checksums of cells that are whole are
 * in `sums`. `*low` is the socket's low-water mark as it was left: of a grid that is coming, `more`
 * bytes are waited for together. WHOLE, LOST when a word of the guard is another one, WAITED when
 * nothing came for `wait_ms`, or -errno. */
int kv_guarded_grid(int fd, uint8_t *base, ptrdiff_t layer_step, ptrdiff_t head_step, size_t layers,
                    size_t heads, size_t cell, uint64_t *sums, const uint64_t *generation,
                    uint64_t generation_wanted, const uint64_t *epoch, uint64_t epoch_wanted,
                    size_t portion, size_t more, int wait_ms, size_t *done, int *low, int beside) {
    const grid all = {base, layer_step, head_step, layers, heads, cell};
    const arrival what = {generation, epoch, generation_wanted, epoch_wanted, portion,
                          more,       wait_ms, done, low};
    hashing work;
    hashing_begin(&work, &all, sums, *done / cell, beside);
    int came = guarded(fd, &all, &what, &work);
    hashing_end(&work);
    return came;
}
