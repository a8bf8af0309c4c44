/* hands.h - who has which record in hand; see hands.c. */
#ifndef SHMQ_HANDS_H
#define SHMQ_HANDS_H

#include "ring.h"

/* A table of records in hand: `n` entries of the segment; those at and above *top are free. */
struct shmq_hands {
    struct shmq_hand_hdr *entry;
    uint32_t n;
    _Atomic uint32_t *top;
};

typedef bool shmq_is_dead_fn(void *arg, uint64_t owner);

static inline uint64_t shmq_hand_pos1(const struct shmq_hand_hdr *e)
{
    return atomic_load_explicit(&((struct shmq_hand_hdr *)e)->pos1, memory_order_acquire); /* [A5] */
}
static inline uint64_t shmq_hand_owner(const struct shmq_hand_hdr *e)
{
    return atomic_load_explicit(&((struct shmq_hand_hdr *)e)->owner, memory_order_acquire); /* [A4] */
}
static inline uint32_t shmq_hands_top(const struct shmq_hands *h)
{
    uint32_t top = atomic_load_explicit(h->top, memory_order_acquire);
    return top < h->n ? top : h->n;
}

static inline uint64_t shmq_hand_end(const struct shmq_hand_hdr *e)
{
    return atomic_load_explicit(&((struct shmq_hand_hdr *)e)->end, memory_order_relaxed);
}

/* Take a free entry for the records in [pos, end); -1 when there is none. Caller holds the side's lock. It is void
 * until a position beyond pos is published. */
int32_t shmq_hands_take(const struct shmq_hands *h, uint64_t pos, uint64_t end, uint64_t owner);

/* Claim an entry that has no owner. Caller holds the side's lock. */
void shmq_hands_claim(const struct shmq_hands *h, int32_t i, uint64_t owner);

/* Split the run in entry i, which has no owner: the records from `at` on get an entry of their own. Caller holds the
 * side's lock. False: there is no entry for them; nothing changed. */
bool shmq_hands_split(const struct shmq_hands *h, int32_t i, uint64_t at, uint64_t self);

/* Endings, one store each: the owner's, or with the side's lock held anybody's. */
void shmq_hands_free(const struct shmq_hands *h, int32_t i);
void shmq_hands_give_back(const struct shmq_hands *h, int32_t i);
void shmq_hands_advance(const struct shmq_hands *h, int32_t i,
                        uint64_t pos); /* the run now begins at pos; frees it at its end */

/* Lower *top as far as entries are free. Caller holds the side's lock. */
void shmq_hands_trim(const struct shmq_hands *h);

/* The lowest position in the table, or `limit` if that's lower. Takes no lock. */
uint64_t shmq_hands_lowest(const struct shmq_hands *h, uint64_t limit);

/* After taking the side's lock over: free the void entries, those at or beyond the published position and those inside
 * others. */
void shmq_hands_void(const struct shmq_hands *h, uint64_t published);

/* Does a dead owner hold something? Takes no lock. */
bool shmq_hands_have_dead(const struct shmq_hands *h, shmq_is_dead_fn *is_dead, void *arg);

/* Take what dead owners hold out of their hands; the side's lock is held. True: something changed.
 * claims: they can be delivered again. reservations: they are abandoned (`free_pos` tells which records are gone). */
bool shmq_hands_sweep_claims(const struct shmq_hands *h, shmq_is_dead_fn *is_dead, void *arg);
bool shmq_hands_sweep_reservations(const struct shmq_hands *h, const struct shmq_ring *ring, uint64_t free_pos,
                                   shmq_is_dead_fn *is_dead, void *arg);

/* Free the entries of abandoned reservations below get_pos: they were kept only so that they aren't counted. */
void shmq_hands_settle_reservations(const struct shmq_hands *h, uint64_t get_pos);

#endif
