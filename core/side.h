/* side.h - one side's mark: the {position, count} that a critical section publishes by one store.
 * Order of loads and stores: docs/protocol.md, labels [S1] [A1] [S2] [A2]. */
#ifndef SHMQ_SIDE_H
#define SHMQ_SIDE_H

#include <stdbool.h>

#include "layout.h"

#define SHMQ_READ_TRIES (1u << 20) /* a reader needs a second one only when a whole publication passes it */

struct shmq_mark {
    uint64_t pos, count;
};

/* The mark, for the holder of the side's lock (which is what orders it after the last publication). */
static inline struct shmq_mark shmq_side_mark(struct shmq_side_hdr *side)
{
    struct shmq_mark_hdr *mark = &side->mark[atomic_load_explicit(&side->seq, memory_order_relaxed) & 1];
    return (struct shmq_mark){atomic_load_explicit(&mark->pos, memory_order_relaxed),
                              atomic_load_explicit(&mark->count, memory_order_relaxed)};
}

/* Publish. Caller holds the side's lock. */
static inline void shmq_side_publish(struct shmq_side_hdr *side, struct shmq_mark to)
{
    uint64_t seq = atomic_load_explicit(&side->seq, memory_order_relaxed);
    struct shmq_mark_hdr *idle = &side->mark[(seq + 1) & 1];
    /* [S2] release, pairs with [A2]: who reads a value written here also sees the seq that made the copy idle */
    atomic_store_explicit(&idle->pos, to.pos, memory_order_release);
    atomic_store_explicit(&idle->count, to.count, memory_order_release);
    SHMQ_FAILPOINT("publish:prepared"); /* the idle copy is garbage; nothing has happened */
    /* [S1] pairs with [A1]: who sees the new seq sees the mark and every byte below it */
    atomic_store_explicit(&side->seq, seq + 1, memory_order_release);
    SHMQ_FAILPOINT("publish:done"); /* everything has happened; the lock is taken over */
}

/* The mark, without a lock. False: it would not hold still, which no honest writer can cause. */
static inline bool shmq_side_read(struct shmq_side_hdr *side, struct shmq_mark *out, uint64_t *seq_out)
{
    for (uint32_t i = 0; i < SHMQ_READ_TRIES; i++) {
        uint64_t seq = atomic_load_explicit(&side->seq, memory_order_acquire); /* [A1] */
        struct shmq_mark_hdr *mark = &side->mark[seq & 1];
        out->pos = atomic_load_explicit(&mark->pos, memory_order_acquire); /* [A2] */
        out->count = atomic_load_explicit(&mark->count, memory_order_acquire);
        if (atomic_load_explicit(&side->seq, memory_order_relaxed) == seq) {
            *seq_out = seq;
            return true;
        }
    }
    return false;
}

#endif
