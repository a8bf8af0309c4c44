/* event.c - eventcounts: sleep until somebody says that something changed.
 * A sleeper reads the count, raises the flag, looks once more, and sleeps unless the count has moved. A waker
 * publishes, looks at the flag, and only if it's up lowers it, bumps the count and wakes. A flag, not a number of
 * sleepers: a killed sleeper would leave the number too high for ever. Who lowers the flag may leave others asleep, so
 * whoever has slept raises it again, and whoever leaves something behind wakes the next (queue.c). */
#include "event.h"

#include <limits.h>

#include "port.h"
#include "shmq.h"

#define SPIN_MIN 32u
#define SPIN_MAX 1000u /* some 20 us, what a futex round trip costs */
#define LAG_MAX 128u   /* some 2 us */
#define SPIN_RETRY 64u /* one try in so many when it hasn't paid */
#define LAG_RETRY 1024u

/* Pauses to make now. Threads may overwrite each other's numbers here, which are only guesses. */
static uint32_t budget_of(struct shmq_spin *spin, uint32_t retry)
{
    uint32_t budget = atomic_load_explicit(&spin->budget, memory_order_relaxed);
    if (budget >= SPIN_MIN)
        return budget;
    uint32_t skipped = atomic_load_explicit(&spin->skipped, memory_order_relaxed);
    atomic_store_explicit(&spin->skipped, skipped + 1, memory_order_relaxed);
    return skipped % retry == 0 ? SPIN_MIN : 0;
}

static void learn(struct shmq_spin *spin, uint32_t budget, bool has_paid, uint32_t max)
{
    uint32_t more = budget < SPIN_MIN ? SPIN_MIN : budget * 2 < max ? budget * 2 : max;
    atomic_store_explicit(&spin->budget, has_paid ? more : budget / 2, memory_order_relaxed);
}

bool shmq_spin(struct shmq_spin *spin, _Atomic uint64_t *word, uint64_t seen)
{
    uint32_t budget = budget_of(spin, SPIN_RETRY);
    if (budget == 0)
        return false;
    bool has_changed = false;
    for (uint32_t i = 0; i < budget && !has_changed; i++) {
        has_changed = atomic_load_explicit(word, memory_order_relaxed) != seen;
        if (!has_changed)
            port_pause();
    }
    learn(spin, budget, has_changed, SPIN_MAX);
    return has_changed;
}

uint32_t shmq_lag(struct shmq_spin *spin)
{
    uint32_t budget = budget_of(spin, LAG_RETRY);
    for (uint32_t i = 0; i < budget; i++)
        port_pause();
    return budget;
}

void shmq_lag_learn(struct shmq_spin *spin, uint32_t budget, bool has_paid) { learn(spin, budget, has_paid, LAG_MAX); }

uint32_t shmq_items_begin(struct shmq_waiters_hdr *w)
{
    /* [K1] acquire, pairs with [K2] */
    uint32_t key = atomic_load_explicit(&w->items, memory_order_acquire);
    atomic_store_explicit(&w->items_asleep, 1, memory_order_relaxed);
    /* [W1] pairs with [W2]: either the waker sees the flag or we see what it published */
    atomic_thread_fence(memory_order_seq_cst);
    return key;
}

uint32_t shmq_room_begin(struct shmq_waiters_hdr *w, uint64_t bytes)
{
    uint32_t key = atomic_load_explicit(&w->room, memory_order_acquire); /* [K1] */
    uint64_t wanted = atomic_load_explicit(&w->room_wanted, memory_order_relaxed);
    while ((wanted == 0 || wanted > bytes) &&
           !atomic_compare_exchange_weak_explicit(&w->room_wanted, &wanted, bytes, memory_order_relaxed,
                                                  memory_order_relaxed))
        ;
    atomic_thread_fence(memory_order_seq_cst); /* [W1] */
    return key;
}

int shmq_sleep(_Atomic uint32_t *count, uint32_t key, uint64_t timeout_ns)
{
    return port_sleep(count, key, timeout_ns);
}

SHMQ_COLD void shmq_items_wake(struct shmq_waiters_hdr *w, int n)
{
    if (atomic_exchange_explicit(&w->items_asleep, 0, memory_order_relaxed) == 0)
        return;                     /* somebody else does */
    SHMQ_FAILPOINT("wake:lowered"); /* dies here: sleepers look again by themselves, queue.c */
    atomic_fetch_add_explicit(&w->items, 1, memory_order_release); /* [K2] pairs with [K1] */
    port_wake(&w->items, n);
}

SHMQ_COLD void shmq_room_wake(struct shmq_waiters_hdr *w)
{
    if (atomic_exchange_explicit(&w->room_wanted, 0, memory_order_relaxed) == 0)
        return;
    SHMQ_FAILPOINT("wake:lowered");
    atomic_fetch_add_explicit(&w->room, 1, memory_order_release); /* [K2] */
    port_wake(&w->room, INT_MAX);
}
