/* event.h - eventcounts: sleep until somebody says that something changed; see event.c. */
#ifndef SHMQ_EVENT_H
#define SHMQ_EVENT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* How many pauses pay, learnt from success. One per handle and purpose. */
struct shmq_spin {
    _Atomic uint32_t budget; /* pauses */
    _Atomic uint32_t skipped;
};

/* Spin until *word differs from `seen` or the budget is spent. True: it differs. */
bool shmq_spin(struct shmq_spin *spin, _Atomic uint64_t *word, uint64_t seen);

/* Pause without looking, so that more gathers; then learn whether it has. */
uint32_t shmq_lag(struct shmq_spin *spin);
void shmq_lag_learn(struct shmq_spin *spin, uint32_t budget, bool has_paid);

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
