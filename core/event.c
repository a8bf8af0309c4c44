/* event.c - eventcounts: sleep until somebody says that something changed.
 * A sleeper reads the count, raises the flag, looks once more, and sleeps unless the count has moved. A waker
 * publishes, looks at the flag, and only if it's up lowers it, bumps the count and wakes. A flag, not a number of
 * sleepers: a killed sleeper would leave the number too high for ever. Who lowers the flag may leave others asleep, so
 * whoever has slept raises it again, and whoever leaves something behind wakes the next (queue.c). */
#include "event.h"

#include <limits.h>

#include "port.h"
#include "shmq.h"

#define SPIN_MAX 1000u /* pauses; some 20 us, what a futex round trip costs */
#define SPIN_MIN 32u
#define SPIN_RETRY 64u /* one try in so many when spinning hasn't paid */

bool shmq_spin(struct shmq_spin *spin, _Atomic uint64_t *word, uint64_t seen)
{
    uint32_t budget = atomic_load_explicit(&spin->budget, memory_order_relaxed);
    if (budget < SPIN_MIN) {
        if (atomic_fetch_add_explicit(&spin->skipped, 1, memory_order_relaxed) % SPIN_RETRY != 0)
            return false;
        budget = SPIN_MIN;
    }
    for (uint32_t i = 0; i < budget; i++) {
        if (atomic_load_explicit(word, memory_order_relaxed) != seen) {
            atomic_store_explicit(&spin->budget, budget * 2 < SPIN_MAX ? budget * 2 : SPIN_MAX, memory_order_relaxed);
            return true;
        }
        port_pause();
    }
    atomic_store_explicit(&spin->budget, budget / 2, memory_order_relaxed);
    return false;
}

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
