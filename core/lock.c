/* lock.c - a lock that names its owner.
 * One word: owner (layout.h) and the contended bit; its low half is the futex. A waiter that has slept long enough asks
 * whether the owner lives and takes the lock over from a dead one by CAS, so that of many exactly one does. Taking over
 * repairs nothing: a critical section publishes by one store, so it has happened or it hasn't (side.h).
 * Threads of one attachment share an owner; they are told apart by nothing, since a live process's threads don't die.
 */
#include "lock.h"

#include <errno.h>

#include "port.h"
#include "shmq.h"

#define SPINS 100u                       /* pauses before sleeping: about a critical section or two */
#define FIRST_SLEEP_NS UINT64_C(1000000) /* 1 ms until the owner is looked at */
#define SLEEP_NS UINT64_C(10000000)      /* 10 ms until it is again */

static _Atomic uint32_t *low_half(_Atomic uint64_t *word) { return (_Atomic uint32_t *)word; }

/* Free: take it, contended as others may sleep. Held: mark it contended. Returns the owner to wait for, 0 when taken.
 */
static uint64_t take_or_mark(_Atomic uint64_t *word, uint64_t self)
{
    uint64_t seen = atomic_load_explicit(word, memory_order_relaxed);
    for (;;) {
        uint64_t wish = seen == 0 ? self | SHMQ_CONTENDED : seen | SHMQ_CONTENDED;
        if (seen == wish)
            return seen;
        if (atomic_compare_exchange_weak_explicit(word, &seen, wish, memory_order_acq_rel,
                                                  memory_order_relaxed)) /* [L1] */
            return seen == 0 ? 0 : wish;
    }
}

SHMQ_COLD enum shmq_lock_result shmq_lock(_Atomic uint64_t *word, const struct shmq_lock_user *user, uint64_t until_ns)
{
    for (uint32_t i = 0; user->may_spin && i < SPINS; i++) {
        if (atomic_load_explicit(word, memory_order_relaxed) == 0 && shmq_lock_try(word, user->self))
            return SHMQ_LOCK_TAKEN;
        port_pause();
    }
    for (uint64_t sleep_ns = FIRST_SLEEP_NS;; sleep_ns = SLEEP_NS) {
        uint64_t held = take_or_mark(word, user->self);
        if (held == 0)
            return SHMQ_LOCK_TAKEN;
        uint64_t now = shmq_now_ns();
        uint64_t left = until_ns > now ? until_ns - now : 0;
        int rc = left == 0 ? ETIMEDOUT : port_sleep(low_half(word), (uint32_t)held, left < sleep_ns ? left : sleep_ns);
        if (rc == EINTR)
            return SHMQ_LOCK_INTR;
        /* [L3] the CAS fails when anything changed since `held` was read, so a live owner is never robbed */
        if (rc == ETIMEDOUT && atomic_load_explicit(word, memory_order_relaxed) == held &&
            user->is_dead(user->arg, held & ~SHMQ_CONTENDED) &&
            atomic_compare_exchange_strong_explicit(word, &held, user->self | SHMQ_CONTENDED, memory_order_acq_rel,
                                                    memory_order_relaxed)) {
            SHMQ_FAILPOINT("lock:taken over"); /* dies here: taken over once more */
            return SHMQ_LOCK_TAKEN_OVER;
        }
        if (left == 0)
            return SHMQ_LOCK_TIMEOUT;
    }
}

SHMQ_COLD void shmq_lock_wake(_Atomic uint64_t *word)
{
    SHMQ_FAILPOINT("lock:unlocked"); /* dies here: sleepers look again within SLEEP_NS */
    port_wake(low_half(word), 1);
}
