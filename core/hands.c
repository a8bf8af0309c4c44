/* hands.c - who has which record in hand.
 * Two tables of entries {position, owner}: R for reservations (producing side), H for claims (consuming side).
 * Beginnings happen under the side's lock and store the position last; endings are one store by the owner and need no
 * lock, so they also work while a lock's holder is frozen. A dead owner's entries are given back for it by sweeping.
 * An entry of H without an owner is a record that get_pos has passed: deliverable once it's committed. */
#include "hands.h"


static uint64_t pos1_of(const struct shmq_hands *h, uint32_t i) { return shmq_hand_pos1(&h->entry[i]); }

int32_t shmq_hands_take(const struct shmq_hands *h, uint64_t pos, uint64_t end, uint64_t owner)
{
    uint32_t top = shmq_hands_top(h), i = 0;
    while (i < top && pos1_of(h, i) != 0)
        i++;
    if (i == h->n)
        return -1;
    struct shmq_hand_hdr *e = &h->entry[i];
    atomic_store_explicit(&e->owner, owner, memory_order_relaxed);
    atomic_store_explicit(&e->end, end, memory_order_relaxed);
    atomic_store_explicit(&e->deliveries, owner != 0, memory_order_relaxed);
    if (i >= top)
        atomic_store_explicit(h->top, i + 1, memory_order_release); /* before pos1, so that the bound holds */
    SHMQ_FAILPOINT("hands:prepared");                               /* dies here: the entry is still free */
    atomic_store_explicit(&e->pos1, pos + 1, memory_order_release); /* [R5] pairs with [A5] */
    SHMQ_FAILPOINT("hands:taken"); /* dies here: the entry is void, as nothing was published */
    return (int32_t)i;
}

void shmq_hands_claim(const struct shmq_hands *h, int32_t i, uint64_t owner)
{
    struct shmq_hand_hdr *e = &h->entry[i];
    uint32_t before = atomic_load_explicit(&e->deliveries, memory_order_relaxed);
    atomic_store_explicit(&e->deliveries, before + 1, memory_order_relaxed);
    atomic_store_explicit(&e->owner, owner, memory_order_release);
    SHMQ_FAILPOINT("hands:claimed"); /* dies here: swept back to nobody */
}

bool shmq_hands_split(const struct shmq_hands *h, int32_t i, uint64_t at, uint64_t self)
{
    struct shmq_hand_hdr *e = &h->entry[i];
    int32_t rest = shmq_hands_take(h, at, shmq_hand_end(e), self); /* ours, so that nobody counts it twice */
    if (rest < 0)
        return false;
    uint32_t deliveries = atomic_load_explicit(&e->deliveries, memory_order_relaxed);
    atomic_store_explicit(&h->entry[rest].deliveries, deliveries, memory_order_relaxed);
    SHMQ_FAILPOINT("hands:doubled"); /* dies here: the new entry is inside the old one, so it's void */
    atomic_store_explicit(&e->end, at, memory_order_release);
    SHMQ_FAILPOINT("hands:split"); /* dies here: the rest is swept back to nobody */
    shmq_hands_give_back(h, rest);
    return true;
}

void shmq_hands_free(const struct shmq_hands *h, int32_t i)
{
    /* [R5] release, pairs with [A5] of who takes the room: our reads and writes of the record are over */
    atomic_store_explicit(&h->entry[i].pos1, 0, memory_order_release);
    SHMQ_FAILPOINT("hands:freed"); /* dies here: it's over, sleepers look again by themselves */
}

void shmq_hands_give_back(const struct shmq_hands *h, int32_t i)
{
    atomic_store_explicit(&h->entry[i].owner, 0, memory_order_release); /* [R4] pairs with [A4] */
    SHMQ_FAILPOINT("hands:given back");
}

void shmq_hands_advance(const struct shmq_hands *h, int32_t i, uint64_t pos)
{
    uint64_t pos1 = pos < shmq_hand_end(&h->entry[i]) ? pos + 1 : 0;
    atomic_store_explicit(&h->entry[i].pos1, pos1, memory_order_release); /* [R5] */
    SHMQ_FAILPOINT("hands:advanced");
}

void shmq_hands_trim(const struct shmq_hands *h)
{
    uint32_t old = shmq_hands_top(h), top = old;
    while (top > 0 && pos1_of(h, top - 1) == 0)
        top--;
    if (top != old)
        atomic_store_explicit(h->top, top, memory_order_release);
}

uint64_t shmq_hands_lowest(const struct shmq_hands *h, uint64_t limit)
{
    for (uint32_t i = 0, top = shmq_hands_top(h); i < top; i++) {
        uint64_t pos1 = pos1_of(h, i);
        if (pos1 != 0 && pos1 - 1 < limit)
            limit = pos1 - 1;
    }
    return limit;
}

static bool is_inside_another(const struct shmq_hands *h, uint64_t pos)
{
    for (uint32_t i = 0, top = shmq_hands_top(h); i < top; i++) {
        uint64_t pos1 = pos1_of(h, i);
        if (pos1 != 0 && pos1 - 1 < pos && pos < shmq_hand_end(&h->entry[i]))
            return true;
    }
    return false;
}

void shmq_hands_void(const struct shmq_hands *h, uint64_t published)
{
    for (uint32_t i = 0, top = shmq_hands_top(h); i < top; i++) {
        uint64_t pos1 = pos1_of(h, i);
        if (pos1 > published || (pos1 != 0 && is_inside_another(h, pos1 - 1)))
            shmq_hands_free(h, (int32_t)i);
    }
}

bool shmq_hands_have_dead(const struct shmq_hands *h, shmq_is_dead_fn *is_dead, void *arg)
{
    uint64_t live = 0; /* the last one found: one probe serves all entries of an owner */
    for (uint32_t i = 0, top = shmq_hands_top(h); i < top; i++) {
        uint64_t owner = shmq_hand_owner(&h->entry[i]);
        if (owner == 0 || owner == live || pos1_of(h, i) == 0)
            continue;
        if (is_dead(arg, owner))
            return true;
        live = owner;
    }
    return false;
}

bool shmq_hands_sweep_claims(const struct shmq_hands *h, shmq_is_dead_fn *is_dead, void *arg)
{
    bool changed = false;
    uint64_t dead = 0, live = 0; /* the last ones found: one probe serves all entries of an owner */
    for (uint32_t i = 0, top = shmq_hands_top(h); i < top; i++) {
        uint64_t owner = shmq_hand_owner(&h->entry[i]);
        if (owner == 0 || owner == live || pos1_of(h, i) == 0)
            continue;
        if (owner != dead && !is_dead(arg, owner)) {
            live = owner;
            continue;
        }
        dead = owner;
        shmq_hands_give_back(h, (int32_t)i);
        changed = true;
    }
    return changed;
}

/* The owner of this reservation is dead and the producing lock is held, so nobody writes to its record: below free_pos
 * it is gone, else its state is its own. */
static void abandon(const struct shmq_hands *h, uint32_t i, const struct shmq_ring *ring, uint64_t free_pos)
{
    uint64_t pos1 = pos1_of(h, i), pos = pos1 - 1;
    if (pos1 == 0)
        return; /* its owner came to the end of it before it left, while we asked */
    uint8_t state = pos < free_pos ? SHMQ_COMMITTED : shmq_ring_state(ring, pos);
    if (state == SHMQ_COMMITTED) {
        shmq_hands_free(h, (int32_t)i); /* it died after its commit */
        return;
    }
    shmq_ring_set_state(ring, pos, SHMQ_ABANDONED);
    SHMQ_FAILPOINT("sweep:abandoned"); /* dies here: the next sweep finishes it */
    shmq_hands_give_back(h, (int32_t)i);
}

bool shmq_hands_sweep_reservations(const struct shmq_hands *h, const struct shmq_ring *ring, uint64_t free_pos,
                                   shmq_is_dead_fn *is_dead, void *arg)
{
    bool changed = false;
    for (uint32_t i = 0, top = shmq_hands_top(h); i < top; i++) {
        uint64_t owner = shmq_hand_owner(&h->entry[i]);
        if (owner == 0 || pos1_of(h, i) == 0 || !is_dead(arg, owner))
            continue;
        abandon(h, i, ring, free_pos);
        changed = true;
    }
    return changed;
}

void shmq_hands_settle_reservations(const struct shmq_hands *h, uint64_t get_pos)
{
    for (uint32_t i = 0, top = shmq_hands_top(h); i < top; i++)
        if (shmq_hand_owner(&h->entry[i]) == 0 && pos1_of(h, i) != 0 && pos1_of(h, i) - 1 < get_pos)
            shmq_hands_free(h, (int32_t)i);
}
