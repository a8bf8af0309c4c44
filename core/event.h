/* event.h - eventcounts: sleep until somebody says that something changed; see event.c. */
#ifndef SHMQ_EVENT_H
#define SHMQ_EVENT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* How long waits are. One per handle. */
struct shmq_spin {
    _Atomic uint64_t typical_ns;
    _Atomic uint32_t waits;
};

/* Spin until *word differs from `seen`, or for as long as that is better than to sleep. True: it differs. Else the caller
 * sleeps, and then tells how long it waited in all. */
bool shmq_spin(struct shmq_spin *spin, _Atomic uint64_t *word, uint64_t seen);
void shmq_spin_slept(struct shmq_spin *spin, uint64_t waited_ns);

/* How many pauses pay, learnt from success. One per handle. */
struct shmq_lag {
    _Atomic uint32_t pauses;
    _Atomic uint32_t skipped;
};

/* Pause without looking, so that more gathers; then learn whether it has. */
uint32_t shmq_lag(struct shmq_lag *lag);
void shmq_lag_learn(struct shmq_lag *lag, uint32_t pauses, bool has_paid);

/* A sleeper: key = shmq_sleep_begin_..(); look once more; shmq_sleep(count, key, ns) or go on; shmq_sleep_end_..(). */
uint32_t shmq_items_begin(struct shmq_waiters_hdr *w);
uint32_t shmq_room_begin(struct shmq_waiters_hdr *w, uint64_t bytes);
int shmq_sleep(_Atomic uint32_t *count, uint32_t key, uint64_t timeout_ns); /* 0 | EINTR | ETIMEDOUT */

/* A waker, after it has published: how much the sleepers want, 0 when nobody sleeps; then wake them. */
static inline uint32_t shmq_items_asleep(struct shmq_waiters_hdr *w)
{
    return atomic_load_explicit(&w->items_asleep, memory_order_relaxed);
}
static inline uint64_t shmq_room_wanted(struct shmq_waiters_hdr *w)
{
    return atomic_load_explicit(&w->room_wanted, memory_order_relaxed);
}
void shmq_items_wake(struct shmq_waiters_hdr *w, int n);
void shmq_room_wake(struct shmq_waiters_hdr *w);

#endif
