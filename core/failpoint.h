/* failpoint.h - where the test build kills or pauses a process; nothing at all in a real build.
 * After every atomic store to the segment, by itself, named "file:line" (the atomic operations are redefined for that);
 * and at named spots, whose comments say what a death there leaves: after a store that decides something, and between
 * stores that aren't atomic. */
#ifndef SHMQ_FAILPOINT_H
#define SHMQ_FAILPOINT_H

#include <stdatomic.h>

#ifdef SHMQ_TEST

extern void (*shmq_failpoint)(const char *name);
#define SHMQ_FAILPOINT(name) (shmq_failpoint != NULL ? shmq_failpoint(name) : (void)0)

void shmq_at_store(const char *file, int line);
#define SHMQ_AT_STORE() shmq_at_store(__FILE__, __LINE__)

#undef atomic_store_explicit
#define atomic_store_explicit(to, value, order)                                                                        \
    do {                                                                                                               \
        __auto_type to_ = (to);                                                                                        \
        __typeof__((void)0, *to_) value_ = (value);                                                                    \
        __atomic_store(to_, &value_, (order));                                                                         \
        SHMQ_AT_STORE();                                                                                               \
    } while (0)

#undef atomic_exchange_explicit
#define atomic_exchange_explicit(to, value, order)                                                                     \
    ({                                                                                                                 \
        __auto_type to_ = (to);                                                                                        \
        __typeof__((void)0, *to_) value_ = (value), was_;                                                              \
        __atomic_exchange(to_, &value_, &was_, (order));                                                               \
        SHMQ_AT_STORE();                                                                                               \
        was_;                                                                                                          \
    })

#undef atomic_fetch_add_explicit
#define atomic_fetch_add_explicit(to, value, order)                                                                    \
    ({                                                                                                                 \
        __auto_type was_ = __atomic_fetch_add((to), (value), (order));                                                 \
        SHMQ_AT_STORE();                                                                                               \
        was_;                                                                                                          \
    })

#define SHMQ_TEST_CAS(to, expected, value, is_weak, order, order_if_not)                                               \
    ({                                                                                                                 \
        __auto_type to_ = (to);                                                                                        \
        __typeof__((void)0, *to_) value_ = (value);                                                                    \
        _Bool is_done_ = __atomic_compare_exchange(to_, (expected), &value_, is_weak, (order), (order_if_not));        \
        if (is_done_)                                                                                                  \
            SHMQ_AT_STORE();                                                                                           \
        is_done_;                                                                                                      \
    })
#undef atomic_compare_exchange_strong_explicit
#define atomic_compare_exchange_strong_explicit(to, expected, value, order, order_if_not)                              \
    SHMQ_TEST_CAS(to, expected, value, 0, order, order_if_not)
#undef atomic_compare_exchange_weak_explicit
#define atomic_compare_exchange_weak_explicit(to, expected, value, order, order_if_not)                                \
    SHMQ_TEST_CAS(to, expected, value, 1, order, order_if_not)

#else
#define SHMQ_FAILPOINT(name) ((void)0)
#endif

#endif
