/* event.c - eventcounts: sleep until somebody says that something changed.
 * A sleeper reads the count, raises the flag, looks once more, and sleeps unless the count has moved. A waker
 * publishes, looks at the flag, and only if it's up lowers it, bumps the count and wakes. A flag, not a number of
 * sleepers: a killed sleeper would leave the number too high for ever. Who lowers the flag may leave others asleep, so
 * whoever has slept raises it again, and whoever leaves something behind wakes the next (queue.c). */
#include "event.h"

#include <limits.h>

#include "port.h"
#include "shmq.h"

#define SPIN_NS UINT64_C(50000) /* about what it costs to be woken; waits of up to that are spent awake */
#define SPIN_MIN_NS UINT64_C(5000) /* about what it costs to fall asleep; so long always, or two could never meet awake */
#define TRIAL_EVERY 256u
#define TRIAL_WAITS 8u
#define LOOKS 16u /* between two looks at the clock */

/* Threads may overwrite each other's numbers here, which are only guesses. */
static void learn(struct shmq_spin *spin, uint64_t waited_ns)
{
    uint64_t typical = atomic_load_explicit(&spin->typical_ns, memory_order_relaxed);
    atomic_store_explicit(&spin->typical_ns, typical - typical / 4 + waited_ns / 4, memory_order_relaxed);
}

/* However short it was: where who is waited for needs our processor, staying awake only delays it. */
void shmq_spin_slept(struct shmq_spin *spin, uint64_t waited_ns)
{
    learn(spin, waited_ns < 2 * SPIN_NS ? 2 * SPIN_NS : waited_ns < 8 * SPIN_NS ? waited_ns : 8 * SPIN_NS);
}

/* Two that answer each other wait for as long as a wake-up takes, and for next to nothing if both stay awake: neither
 * finds out alone. So now and then one stays awake for some waits, through the other's wake-up. */
static uint64_t time_to_spin(struct shmq_spin *spin)
{
    uint64_t typical = atomic_load_explicit(&spin->typical_ns, memory_order_relaxed);
    uint32_t waits = atomic_load_explicit(&spin->waits, memory_order_relaxed);
    atomic_store_explicit(&spin->waits, waits + 1, memory_order_relaxed);
    if (typical <= SPIN_NS)
        return SPIN_NS;
    return typical <= 4 * SPIN_NS && waits % TRIAL_EVERY < TRIAL_WAITS ? 2 * SPIN_NS : SPIN_MIN_NS;
}

bool shmq_spin(struct shmq_spin *spin, _Atomic uint64_t *word, uint64_t seen)
{
    uint64_t start = shmq_now_ns(), limit = time_to_spin(spin), now;
    do {
        for (uint32_t i = 0; i < LOOKS; i++) {
            if (atomic_load_explicit(word, memory_order_relaxed) != seen) {
                learn(spin, shmq_now_ns() - start);
                return true;
            }
            port_pause();
        }
        now = shmq_now_ns();
    } while (now - start < limit);
    return false;
}

#define LAG_MIN 32u
#define LAG_MAX 128u /* pauses, some 2 us */
#define LAG_RETRY 1024u

uint32_t shmq_lag(struct shmq_lag *lag)
{
    uint32_t pauses = atomic_load_explicit(&lag->pauses, memory_order_relaxed);
    if (pauses < LAG_MIN) {
        uint32_t skipped = atomic_load_explicit(&lag->skipped, memory_order_relaxed);
        atomic_store_explicit(&lag->skipped, skipped + 1, memory_order_relaxed);
        pauses = skipped % LAG_RETRY == 0 ? LAG_MIN : 0;
    }
    for (uint32_t i = 0; i < pauses; i++)
        port_pause();
    return pauses;
}

void shmq_lag_learn(struct shmq_lag *lag, uint32_t pauses, bool has_paid)
{
    uint32_t more = pauses < LAG_MIN ? LAG_MIN : pauses * 2 < LAG_MAX ? pauses * 2 : LAG_MAX;
    atomic_store_explicit(&lag->pauses, has_paid ? more : pauses / 2, memory_order_relaxed);
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
