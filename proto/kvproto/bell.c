/* A bell whose ringing is one store: a thread looks at it, and passes it on to an eventfd.
 *
 * To wake a thread takes whoever wakes it 5 us, and 30 to 100 on a virtual machine, where the core
 * that is to run it has to be woken as well; then it is 0.2 to 1 ms now and then (docs/adr/0015).
 * The thread that runs a model's steps does not pay that: it stores a 1.
 *
 * The thread looks each `tick_us`, after `idle_after` looks in vain each `idle_us`, and after
 * `asleep_after` of those it falls asleep. Who rings then writes the eventfd; who hears that wakes
 * the thread.
 *
 * Rules:
 *  1. No ring is lost: either the thread takes `rung` away and then writes the eventfd, or whoever
 *     rang has seen `asleep` and does. Who rings stores `rung`, then loads `asleep`, both plainly
 *     (bell.py). The thread stores `asleep`, makes all others see that (membarrier), then loads
 *     `rung` for the last time. Where it cannot, it does not fall asleep. Rings that nobody has
 *     heard yet are one.
 *  2. Its memory is never freed: it is rung by anybody at any time, also when the thread has ended.
 *  3. The thread takes no signals, runs where the thread may that started it, and ends with
 *     `kv_bell_stop`, which waits for it: then the eventfd is touched by who rings only.
 */

#define _GNU_SOURCE

#include <linux/membarrier.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { STACK_BYTES = 256 << 10 };

struct bell {
    _Atomic uint32_t rung, asleep; /* in this order, for bell.py */
    _Atomic uint32_t stopped;
    int eventfd; /* non-blocking */
    uint32_t tick_us, idle_us, idle_after, asleep_after;
    sem_t woken;
    pthread_t thread;
};

static void pass_on(struct bell *bell) {
    const uint64_t one = 1;
    ssize_t written = write(bell->eventfd, &one, sizeof one);
    (void)written; /* fails if it was rung 2^64 times and never heard */
}

static int barrier(int command) { return (int)syscall(SYS_membarrier, command, 0, 0); }

/* Says that it sleeps; whether it may: no ring came before anybody could see that. */
static int falls_asleep(struct bell *bell) {
    atomic_store(&bell->asleep, 1);
    if (barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED) == 0 && !atomic_load(&bell->rung)) return 1;
    return !atomic_exchange(&bell->asleep, 0); /* else somebody has heard one, and has woken it */
}

static void *watch(void *given) {
    struct bell *bell = given;
    uint32_t quiet = 0;
    while (!atomic_load(&bell->stopped)) {
        uint32_t us = quiet < bell->idle_after ? bell->tick_us : bell->idle_us;
        struct timespec wait = {us / 1000000, (long)(us % 1000000) * 1000};
        clock_nanosleep(CLOCK_MONOTONIC, 0, &wait, NULL);
        if (atomic_exchange(&bell->rung, 0)) {
            quiet = 0;
            pass_on(bell);
        } else if (++quiet >= bell->idle_after + bell->asleep_after) {
            if (falls_asleep(bell)) while (sem_wait(&bell->woken) != 0) continue;
            quiet = 0;
        }
    }
    return NULL;
}

/* NULL if there is no memory or no thread. */
struct bell *kv_bell_start(int eventfd, uint32_t tick_us, uint32_t idle_us, uint32_t idle_after,
                           uint32_t asleep_after) {
    struct bell *bell = calloc(1, sizeof *bell);
    if (bell == NULL) return NULL;
    barrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
    bell->eventfd = eventfd;
    bell->tick_us = tick_us;
    bell->idle_us = idle_us;
    bell->idle_after = idle_after;
    bell->asleep_after = asleep_after;
    sem_init(&bell->woken, 0, 0);
    sigset_t all, before;
    pthread_attr_t attributes;
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&bell->thread, &attributes, watch, bell);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (error) {
        free(bell);
        return NULL;
    }
    pthread_setname_np(bell->thread, "kvserver-bell");
    return bell;
}

/* The eventfd was read: there is work, and more is likely. */
void kv_bell_heard(struct bell *bell) {
    if (atomic_load(&bell->asleep) && !atomic_load(&bell->stopped)) {
        atomic_store(&bell->rung, 0);
        if (atomic_exchange(&bell->asleep, 0)) sem_post(&bell->woken);
    }
}

void kv_bell_stop(struct bell *bell) {
    atomic_store(&bell->stopped, 1);
    sem_post(&bell->woken);
    pthread_join(bell->thread, NULL);
}
