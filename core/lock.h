/* lock.h - a lock that names its owner, so that it can be taken over from a dead one; see lock.c. */
#ifndef SHMQ_LOCK_H
#define SHMQ_LOCK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

enum shmq_lock_result { SHMQ_LOCK_TAKEN, SHMQ_LOCK_TAKEN_OVER, SHMQ_LOCK_TIMEOUT, SHMQ_LOCK_INTR };

/* Who asks, and how to find out whether an owner lives. */
struct shmq_lock_user {
    uint64_t self;
    bool (*is_dead)(void *arg, uint64_t owner);
    void *arg;
    bool may_spin;
};

/* Take the lock if it is free. */
static inline bool shmq_lock_try(_Atomic uint64_t *word, uint64_t self)
{
    uint64_t none = 0;
    /* [L1] acquire, pairs with [L2]: the last holder's critical section is visible */
    return atomic_compare_exchange_strong_explicit(word, &none, self, memory_order_acq_rel, memory_order_relaxed);
}

/* Wake one who sleeps for the lock. */
void shmq_lock_wake(_Atomic uint64_t *word);

/* Take the lock, sleeping until `until_ns`; from a dead owner it is taken over (what it had begun is for the caller to
 * void). INTR: a signal came. */
enum shmq_lock_result shmq_lock(_Atomic uint64_t *word, const struct shmq_lock_user *user, uint64_t until_ns);

/* Let go. Caller holds it. */
static inline void shmq_unlock(_Atomic uint64_t *word)
{
    /* [L2] release, pairs with [L1] */
    if (atomic_exchange_explicit(word, 0, memory_order_acq_rel) & SHMQ_CONTENDED)
        shmq_lock_wake(word);
}

#endif
