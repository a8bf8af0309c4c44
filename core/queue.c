/* queue.c - the parts put together: put, get, wait, sweep.
 * A critical section publishes by one store (side.h), what is in hand stands in a table (hands.c), and nobody ever
 * holds two locks. Each step says what a death there leaves. Waiting is bounded and ends in a look for the dead. */
#include "handle.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* A call that doesn't wait for items still waits so long for a lock: its owner may just have been preempted. */
#define LOCK_GRACE_NS UINT64_C(80000000)
#define LOCK_SLICE_NS UINT64_C(50000000)   /* then it is time to look for signals */
#define WAIT_NS UINT64_C(100000000)        /* a sleeper looks for itself so often */
#define WAIT_AT_REST_NS UINT64_C(250000000) /* and so often after some sleeps that nobody ended */
#define REST_AFTER 10u
#define WAIT_IN_HAND_NS UINT64_C(20000000) /* and so often while a record is in hand: its owner may be dead */
#define LOOK_EVERY_NS UINT64_C(2000000) /* who gets items without waiting looks for the dead so often */
/* So long a sweep waits for a lock: one by the way hardly, one that has something to do as long as any call. */
#define SWEEP_LOCK_NS UINT64_C(2000000)

/* ---- calls and locks */

int shmq_hold(struct shmq *q)
{
    int rc = shmq_usable(q);
    if (rc != SHMQ_OK)
        return rc;
    if ((atomic_fetch_add(&q->calls, 1) & SHMQ_CLOSING) == 0)
        return SHMQ_OK;
    shmq_let_go(q);
    return SHMQ_CLOSED;
}

void shmq_let_go(struct shmq *q)
{
    if (atomic_fetch_sub(&q->calls, 1) == (SHMQ_CLOSING | 1))
        shmq_detach(q);
}

bool shmq_close_begin(struct shmq *q)
{
    uint32_t calls = atomic_load(&q->calls), wish;
    do {
        if (calls & SHMQ_CLOSING)
            return false;
        /* we hold the handle like a call; those of a forked child's parent don't exist */
        wish = (shmq_usable(q) == SHMQ_FORKED ? 1 : calls + 1) | SHMQ_CLOSING;
    } while (!atomic_compare_exchange_weak(&q->calls, &calls, wish));
    return true;
}

static void wake_all(_Atomic uint32_t *count)
{
    atomic_fetch_add_explicit(count, 1, memory_order_release);
    port_wake(count, INT_MAX);
}

int shmq_close_end(struct shmq *q, bool now)
{
    if (shmq_check_file(q) == SHMQ_OK) { /* else they see it when their sleep runs out */
        wake_all(&q->seg->waiters.items);
        wake_all(&q->seg->waiters.room);
    }
    int rc = now && atomic_load(&q->calls) != (SHMQ_CLOSING | 1) ? shmq_leave(q) : SHMQ_OK;
    if (atomic_fetch_sub(&q->calls, 1) == (SHMQ_CLOSING | 1))
        rc = shmq_detach(q);
    return rc;
}

int shmq_close(struct shmq *q, bool now) { return shmq_close_begin(q) ? shmq_close_end(q, now) : SHMQ_OK; }

static const struct shmq_hands *hands_of(const struct shmq *q, int side)
{
    return side == SHMQ_PRODUCING ? &q->reservations : &q->claims;
}

static bool try_side(struct shmq *q, int side) { return shmq_lock_try(&shmq_side(q, side)->lock, q->self); }

int shmq_enter_side(struct shmq *q, int side, uint64_t until_ns)
{
    struct shmq_lock_user user = {q->self, shmq_is_dead, q, q->may_spin};
    switch (try_side(q, side) ? SHMQ_LOCK_TAKEN : shmq_lock(&shmq_side(q, side)->lock, &user, until_ns)) {
    case SHMQ_LOCK_TAKEN_OVER:
        shmq_hands_void(hands_of(q, side), shmq_side_mark(shmq_side(q, side)).pos);
        /* fall through */
    case SHMQ_LOCK_TAKEN:
        return SHMQ_OK;
    case SHMQ_LOCK_INTR:
        return SHMQ_INTR;
    default:
        return SHMQ_BUSY;
    }
}

static uint64_t earlier(uint64_t a, uint64_t b) { return a < b ? a : b; }

int shmq_enter_side_by(struct shmq *q, int side, uint64_t deadline_ns)
{
    uint64_t now = shmq_now_ns();
    uint64_t limit = deadline_ns < SHMQ_FOREVER - LOCK_GRACE_NS ? deadline_ns + LOCK_GRACE_NS : SHMQ_FOREVER;
    if (deadline_ns == 0) /* all in one: a retry after INTR wouldn't know how long was waited before */
        return shmq_enter_side(q, side, now + LOCK_GRACE_NS);
    int rc = shmq_enter_side(q, side, earlier(limit, now + LOCK_SLICE_NS));
    return rc == SHMQ_BUSY && shmq_now_ns() < limit ? SHMQ_INTR : rc;
}

/* ---- the other side's position */

/* Where everything below is published; a bound seen earlier will do when it is beyond get_pos, by no more than can be:
 * a position that was overwritten and mended since is looked at once more. */
static int read_put_pos(struct shmq *q, uint64_t get_pos, uint64_t *put_pos)
{
    struct shmq_mark mark;
    uint64_t seq = 0;
    *put_pos = atomic_load_explicit(&q->put_seen, memory_order_acquire);
    if (*put_pos - get_pos - 1 < q->ring.capacity)
        return SHMQ_OK;
    if (!shmq_side_read(shmq_side(q, SHMQ_PRODUCING), &mark, &seq))
        return shmq_corrupt(q, "producing.seq", seq, 0);
    if (mark.pos - get_pos > q->ring.capacity)
        return shmq_corrupt(q, "put_pos - get_pos", mark.pos - get_pos, q->ring.capacity);
    *put_pos = mark.pos;
    atomic_store_explicit(&q->put_seen, mark.pos, memory_order_release);
    return SHMQ_OK;
}

/* Where everything below is free again. get_pos is read first: whatever was claimed below it stands in H by then. */
SHMQ_COLD static int read_free_pos(struct shmq *q, uint64_t *free_pos)
{
    struct shmq_mark mark;
    uint64_t seq = 0;
    if (!shmq_side_read(shmq_side(q, SHMQ_CONSUMING), &mark, &seq))
        return shmq_corrupt(q, "consuming.seq", seq, 0);
    *free_pos = shmq_hands_lowest(&q->claims, mark.pos);
    return SHMQ_OK;
}

/* Do the bytes below `end` fit? `put_pos` is the published one. OK | FULL | CORRUPT */
static int fits(struct shmq *q, uint64_t put_pos, uint64_t end)
{
    uint64_t free_pos = atomic_load_explicit(&q->free_seen, memory_order_acquire);
    if (end - free_pos <= q->ring.capacity)
        return SHMQ_OK;
    int rc = read_free_pos(q, &free_pos);
    if (rc != SHMQ_OK)
        return rc;
    if (put_pos - free_pos > q->ring.capacity)
        return shmq_corrupt(q, "put_pos - free_pos", put_pos - free_pos, q->ring.capacity);
    atomic_store_explicit(&q->free_seen, free_pos, memory_order_release);
    return end - free_pos <= q->ring.capacity ? SHMQ_OK : SHMQ_FULL;
}

/* ---- waking */

/* [W2] pairs with [W1]: either the sleeper sees what we published or we see its flag. Right after a lock was let go of,
 * by an exchange, which on x86 is such a fence already. */
static inline void fence_after_unlock(void)
{
#if defined(__x86_64__)
    atomic_signal_fence(memory_order_seq_cst);
#else
    atomic_thread_fence(memory_order_seq_cst);
#endif
}

/* Items were published; the caller has fenced. */
static void after_put(struct shmq *q)
{
    if (shmq_items_asleep(&q->seg->waiters))
        shmq_items_wake(&q->seg->waiters, 1); /* who wakes and leaves something behind wakes the next */
}

/* Is a record in that state among those of H without an owner? Takes no lock. */
static bool is_passed(const struct shmq *q, enum shmq_state state)
{
    for (uint32_t i = 0, top = shmq_hands_top(&q->claims); i < top; i++) {
        uint64_t pos1 = shmq_hand_pos1(&q->claims.entry[i]);
        if (pos1 != 0 && shmq_hand_owner(&q->claims.entry[i]) == 0 &&
            (shmq_ring_peek(&q->ring, pos1 - 1) & 0xff) == state)
            return true;
    }
    return false;
}

/* Is there something to take? Takes no lock; "yes" may be a reservation that turns out not to be. */
SHMQ_COLD static bool may_take(struct shmq *q)
{
    struct shmq_mark get, put;
    uint64_t seq;
    return !shmq_side_read(shmq_side(q, SHMQ_CONSUMING), &get, &seq) ||
           !shmq_side_read(shmq_side(q, SHMQ_PRODUCING), &put, &seq) || put.pos != get.pos ||
           is_passed(q, SHMQ_COMMITTED);
}

/* Bytes free at this instant; 0 when that can't be told. */
SHMQ_COLD static uint64_t free_bytes(struct shmq *q)
{
    struct shmq_mark put;
    uint64_t free_pos, seq;
    if (read_free_pos(q, &free_pos) != SHMQ_OK || !shmq_side_read(shmq_side(q, SHMQ_PRODUCING), &put, &seq) ||
        put.pos - free_pos > q->ring.capacity)
        return 0;
    return q->ring.capacity - (put.pos - free_pos);
}

/* Wake producers when their item fits and a good part is free, or when no get will come to do it later. */
static void offer_room(struct shmq *q, bool is_last_chance)
{
    uint64_t wanted = shmq_room_wanted(&q->seg->waiters);
    if (wanted == 0)
        return;
    uint64_t room = free_bytes(q);
    if (room >= wanted && (room >= q->ring.capacity / 4 || is_last_chance || !may_take(q)))
        shmq_room_wake(&q->seg->waiters);
}

/* Records were taken or let go of; the caller has fenced. */
static void after_get(struct shmq *q)
{
    offer_room(q, false);
    if (shmq_items_asleep(&q->seg->waiters) && may_take(q))
        shmq_items_wake(&q->seg->waiters, 1);
}

/* ---- put */

struct shmq_out shmq_out(const struct shmq_part *parts, uint32_t n_parts, uint32_t method, bool is_aligned)
{
    uint64_t len = is_aligned && n_parts > 0 ? (uint64_t)(n_parts - 1) * (SHMQ_ALIGN - 1) : 0;
    for (uint32_t i = 0; i < n_parts && len <= SHMQ_MAX_LEN; i++)
        len = parts[i].len <= SHMQ_MAX_LEN ? len + parts[i].len : UINT64_MAX / 2;
    uint64_t size = len <= SHMQ_MAX_LEN ? shmq_record_size(len) : UINT64_MAX / 2;
    return (struct shmq_out){parts, n_parts, method, is_aligned, size};
}

/* Publish a record that is yet to be written. The lock is held on entry and not on return. */
SHMQ_COLD static void begin_reserved(struct shmq *q, const struct shmq_record *record, struct shmq_mark next)
{
    shmq_ring_begin(&q->ring, record, SHMQ_RESERVED);
    SHMQ_FAILPOINT("put:reserved"); /* dies here: the entry is void */
    shmq_side_publish(shmq_side(q, SHMQ_PRODUCING), next);
    shmq_leave_side(q, SHMQ_PRODUCING);
    SHMQ_FAILPOINT("put:unlocked"); /* dies here, or while copying: swept to abandoned; put() had not returned */
}

SHMQ_COLD static void commit(struct shmq *q, uint64_t pos, int32_t hand)
{
    SHMQ_FAILPOINT("put:filled");
    shmq_ring_set_state(&q->ring, pos, SHMQ_COMMITTED);
    SHMQ_FAILPOINT("put:committed"); /* dies here: delivered; the entry is swept */
    shmq_hands_free(&q->reservations, hand);
    atomic_thread_fence(memory_order_seq_cst); /* [W2] */
}

/* An entry of R for a big record at pos, -1 when R is full. Caller holds the producing lock. */
SHMQ_COLD static int32_t reserve_hand(struct shmq *q, uint64_t pos, uint64_t end)
{
    struct shmq_mark get;
    uint64_t seq;
    shmq_hands_trim(&q->reservations);
    if (shmq_hands_top(&q->reservations) > 0 && shmq_side_read(shmq_side(q, SHMQ_CONSUMING), &get, &seq))
        shmq_hands_settle_reservations(&q->reservations, get.pos);
    return shmq_hands_take(&q->reservations, pos, end, q->self);
}

/* Put as many records as fit, at least one. Caller holds the producing lock, which is let go of in every case, with a
 * fence. */
static int put_locked(struct shmq *q, const struct shmq_out *outs, uint32_t n, uint32_t *done)
{
    struct shmq_mark start = shmq_side_mark(shmq_side(q, SHMQ_PRODUCING)), mark = start;
    int rc = SHMQ_OK;
    for (uint32_t i = 0; i < n; i++) {
        struct shmq_mark next = {mark.pos + outs[i].size, mark.count + 1};
        if ((rc = outs[i].size > q->ring.capacity ? SHMQ_TOO_BIG : fits(q, start.pos, next.pos)) != SHMQ_OK)
            break;
        uint32_t len = (uint32_t)(outs[i].size - SHMQ_RECORD_HDR);
        struct shmq_record record = {mark.pos, len, outs[i].method};
        int32_t hand = -1;
        if (len > SHMQ_SMALL && (i > 0 || (hand = reserve_hand(q, mark.pos, next.pos)) >= 0)) {
            if (i > 0)
                break; /* it comes next, by itself */
            begin_reserved(q, &record, next);
            shmq_ring_fill(&q->ring, record.pos, &outs[0]);
            commit(q, record.pos, hand);
            *done = 1;
            return SHMQ_OK;
        }
        shmq_ring_begin(&q->ring, &record, SHMQ_COMMITTED);
        shmq_ring_fill(&q->ring, mark.pos, &outs[i]);
        SHMQ_FAILPOINT("put:written"); /* dies here: beyond put_pos, so nothing has happened */
        mark = next;
        *done = i + 1;
    }
    if (*done > 0) {
        shmq_side_publish(shmq_side(q, SHMQ_PRODUCING), mark);
        rc = SHMQ_OK;
    }
    shmq_leave_side(q, SHMQ_PRODUCING);
    fence_after_unlock();
    return rc;
}

int shmq_put_try(struct shmq *q, const struct shmq_out *outs, uint32_t n, uint32_t *done)
{
    *done = 0;
    int rc = shmq_usable(q);
    if (rc != SHMQ_OK)
        return rc;
    if (!try_side(q, SHMQ_PRODUCING))
        return SHMQ_BUSY;
    if ((rc = put_locked(q, outs, n, done)) == SHMQ_OK)
        after_put(q);
    return rc;
}

/* ---- get */

/* Hand a claimed or copied record to the caller. */
static void describe(const struct shmq *q, const struct shmq_record *r, int32_t hand, struct shmq_in *in)
{
    const uint8_t *payload = shmq_ring_payload(&q->ring, r->pos);
    uint32_t phase = (uint32_t)((uintptr_t)payload % SHMQ_ALIGN);
    *in = (struct shmq_in){payload, NULL, r->pos, r->len, r->method, phase, 0, hand};
}

/* Reserve room for a record that the caller writes. Caller holds the producing lock, which is let go of. */
SHMQ_COLD static int reserve_locked(struct shmq *q, uint32_t len, uint32_t method, struct shmq_in *room)
{
    struct shmq_mark mark = shmq_side_mark(shmq_side(q, SHMQ_PRODUCING));
    struct shmq_mark next = {mark.pos + shmq_record_size(len), mark.count + 1};
    struct shmq_record record = {mark.pos, len, method};
    int rc = fits(q, mark.pos, next.pos);
    int32_t hand = rc == SHMQ_OK ? reserve_hand(q, mark.pos, next.pos) : -1;
    if (hand < 0) {
        shmq_leave_side(q, SHMQ_PRODUCING);
        return rc == SHMQ_OK ? SHMQ_CLAIMED : rc;
    }
    begin_reserved(q, &record, next);
    describe(q, &record, hand, room);
    return SHMQ_OK;
}

/* A claimed one. */
SHMQ_COLD static void describe_claim(const struct shmq *q, const struct shmq_record *r, int32_t hand,
                                     struct shmq_in *in)
{
    describe(q, r, hand, in);
    in->deliveries = atomic_load_explicit(&q->claims.entry[hand].deliveries, memory_order_relaxed);
}

/* Entries of H but for passed reservations, which have room of their own. Caller holds the consuming lock. */
SHMQ_COLD static uint32_t n_claimed(const struct shmq *q)
{
    uint32_t n = 0;
    for (uint32_t i = 0, top = shmq_hands_top(&q->claims); i < top; i++) {
        const struct shmq_hand_hdr *e = &q->claims.entry[i];
        uint64_t pos1 = shmq_hand_pos1(e);
        n += pos1 != 0 && (shmq_hand_owner(e) != 0 || shmq_ring_state(&q->ring, pos1 - 1) != SHMQ_RESERVED);
    }
    return n;
}

/* Copy the record out; to the heap if it is bigger than the scratch. */
static int copy_out(struct shmq *q, const struct shmq_record *r, uint8_t *scratch, struct shmq_in *in)
{
    describe(q, r, -1, in);
    uint8_t *to = scratch;
    if (r->len > SHMQ_SMALL && (to = in->heap = malloc(r->len)) == NULL) {
        q->fault = (struct shmq_fault){"allocate", r->len, 0, ENOMEM};
        return SHMQ_SYSTEM;
    }
    memcpy(to, in->payload, r->len);
    in->payload = to;
    return SHMQ_OK;
}

/* The entry of H to deliver from: of those without an owner the lowest that is committed; -1 when there is none.
 * Abandoned ones are freed. Caller holds the consuming lock. */
SHMQ_COLD static int32_t deliverable(struct shmq *q)
{
    int32_t best = -1;
    uint64_t lowest = UINT64_MAX;
    shmq_hands_trim(&q->claims);
    for (uint32_t i = 0, top = shmq_hands_top(&q->claims); i < top; i++) {
        const struct shmq_hand_hdr *e = &q->claims.entry[i];
        /* the owner first: without one only the lock's holder changes the entry, with one it may be advanced and then
         * given back in between, and what stood there before may be anybody's bytes by now */
        if (shmq_hand_owner(e) != 0)
            continue;
        uint64_t pos1 = shmq_hand_pos1(e);
        if (pos1 == 0 || pos1 > lowest) /* not >=: garbage of all ones is for the caller to name */
            continue;
        uint8_t state = shmq_ring_state(&q->ring, pos1 - 1);
        if (state == SHMQ_ABANDONED) {
            shmq_hands_free(&q->claims, (int32_t)i);
        } else if (state == SHMQ_COMMITTED) {
            lowest = pos1;
            best = (int32_t)i;
        }
    }
    return best;
}

/* Deliver the first record of entry i. One store to the entry decides. */
SHMQ_COLD static int take_from_hand(struct shmq *q, int32_t i, uint8_t *scratch, struct shmq_in *in)
{
    const struct shmq_hand_hdr *e = &q->claims.entry[i];
    struct shmq_record r;
    uint64_t pos = shmq_hand_pos1(e) - 1, end = shmq_hand_end(e);
    if (!shmq_ring_read(&q->ring, pos, end, &r))
        return shmq_corrupt(q, "length of a record in hand", r.len, end - pos);
    uint64_t next = pos + shmq_record_size(r.len);
    if (scratch == NULL && next != end && (n_claimed(q) >= SHMQ_H_CLAIMS + SHMQ_H_SPLITS ||
                                           !shmq_hands_split(&q->claims, i, next, q->self)))
        return SHMQ_CLAIMED;
    if (scratch == NULL || (r.len > SHMQ_SMALL && next == end)) {
        shmq_hands_claim(&q->claims, i, q->self);
        describe_claim(q, &r, i, in);
        return SHMQ_OK;
    }
    int rc = copy_out(q, &r, scratch, in);
    if (rc == SHMQ_OK)
        shmq_hands_advance(&q->claims, i, next);
    return rc;
}

/* Move past what can't be delivered at the front: abandoned records, and live reservations, which go to H.
 * OK: *r is a committed record | EMPTY | CORRUPT. Caller holds the consuming lock; *mark is not published yet. */
static int skip(struct shmq *q, uint64_t put_pos, struct shmq_mark *mark, struct shmq_record *r)
{
    for (; mark->pos < put_pos; *mark = (struct shmq_mark){mark->pos + shmq_record_size(r->len), mark->count + 1}) {
        uint8_t state = shmq_ring_state(&q->ring, mark->pos);
        if (!shmq_ring_read(&q->ring, mark->pos, put_pos, r))
            return shmq_corrupt(q, "length of a record", r->len, put_pos - mark->pos);
        if (state == SHMQ_COMMITTED)
            return SHMQ_OK;
        if (state != SHMQ_RESERVED && state != SHMQ_ABANDONED)
            return shmq_corrupt(q, "state of a record", state, SHMQ_ABANDONED);
        uint64_t end = mark->pos + shmq_record_size(r->len);
        if (state == SHMQ_RESERVED && shmq_hands_take(&q->claims, mark->pos, end, 0) < 0)
            return shmq_corrupt(q, "passed reservations", SHMQ_H_ENTRIES, SHMQ_R_ENTRIES);
    }
    return SHMQ_EMPTY;
}

/* Take the record at the front of the ring. Caller holds the consuming lock. */
static int take_from_ring(struct shmq *q, uint64_t put_pos, struct shmq_mark mark, uint8_t *scratch, struct shmq_in *in)
{
    struct shmq_side_hdr *side = shmq_side(q, SHMQ_CONSUMING);
    struct shmq_record r;
    uint64_t start = mark.pos;
    int rc = skip(q, put_pos, &mark, &r);
    if (rc == SHMQ_OK) {
        struct shmq_mark next = {mark.pos + shmq_record_size(r.len), mark.count + 1};
        int32_t hand = -1;
        if ((r.len > SHMQ_SMALL || scratch == NULL) && n_claimed(q) < SHMQ_H_CLAIMS)
            hand = shmq_hands_take(&q->claims, mark.pos, next.pos, q->self);
        if (hand >= 0)
            describe_claim(q, &r, hand, in);
        else
            rc = scratch == NULL ? SHMQ_CLAIMED : copy_out(q, &r, scratch, in);
        if (rc == SHMQ_OK)
            mark = next;
    }
    atomic_store_explicit(&q->has_caught_up, mark.pos == put_pos, memory_order_relaxed);
    if (mark.pos != start)
        shmq_side_publish(side, mark); /* a death before leaves all in place, one after takes it along */
    return rc;
}

/* Take the oldest record. Caller holds the consuming lock. put_pos is read before H is looked at, and nothing at or
 * beyond it is taken: else a record put after a passed reservation's commit could overtake it. */
static inline int take_oldest(struct shmq *q, uint8_t *scratch, struct shmq_in *in)
{
    struct shmq_mark mark = shmq_side_mark(shmq_side(q, SHMQ_CONSUMING));
    uint64_t put_pos;
    int rc = read_put_pos(q, mark.pos, &put_pos);
    if (rc != SHMQ_OK)
        return rc;
    int32_t i = shmq_hands_top(&q->claims) > 0 ? deliverable(q) : -1;
    return i >= 0 ? take_from_hand(q, i, scratch, in) : take_from_ring(q, put_pos, mark, scratch, in);
}

static void sweep(struct shmq *q, uint64_t lock_ns);

/* Where items never run out nobody waits, so nobody would sweep, and what the dead hold would never come. */
SHMQ_COLD static void look_for_the_dead(struct shmq *q)
{
    uint64_t now = shmq_now_ns(), next = atomic_load_explicit(&q->next_look_ns, memory_order_relaxed);
    if (now < next || !atomic_compare_exchange_strong_explicit(&q->next_look_ns, &next, now + LOOK_EVERY_NS,
                                                               memory_order_relaxed, memory_order_relaxed))
        return;
    if (shmq_is_sweep_due(q))
        sweep(q, SWEEP_LOCK_NS);
}

/* Let go of the consuming lock, with a fence. Who comes back with nothing looks by itself, and then once more. */
static inline void leave_after_get(struct shmq *q, int rc)
{
    bool looks = rc == SHMQ_OK && shmq_hands_top(&q->claims) > 0; /* read while the lock's line is ours */
    shmq_leave_side(q, SHMQ_CONSUMING);
    fence_after_unlock();
    if (looks)
        look_for_the_dead(q);
}

/* The first look's bound may have been old, and have ended in reservations. */
SHMQ_COLD static int look_twice(struct shmq *q, uint8_t *scratch, struct shmq_in *in)
{
    return take_oldest(q, scratch, in);
}

/* Take the oldest record. Caller holds the consuming lock, which is let go of, with a fence. */
static int get_locked(struct shmq *q, uint8_t *scratch, struct shmq_in *in)
{
    int rc = take_oldest(q, scratch, in);
    if (rc == SHMQ_EMPTY)
        rc = look_twice(q, scratch, in);
    leave_after_get(q, rc);
    return rc;
}

/* The run of small committed records at the front, claimed as one. */
static int get_batch_locked(struct shmq *q, struct shmq_in *in, uint32_t *n)
{
    struct shmq_mark mark = shmq_side_mark(shmq_side(q, SHMQ_CONSUMING));
    struct shmq_record r[SHMQ_MAX_BATCH];
    uint64_t put_pos, start = mark.pos;
    uint32_t want = *n < SHMQ_MAX_BATCH ? *n : SHMQ_MAX_BATCH;
    *n = 0;
    int rc = read_put_pos(q, mark.pos, &put_pos);
    if (rc != SHMQ_OK)
        return rc;
    if (shmq_hands_top(&q->claims) > 0 && (deliverable(q) >= 0 || n_claimed(q) >= SHMQ_H_CLAIMS / 2))
        return SHMQ_EMPTY; /* those come first, one by one; and runs may have to be split */
    for (; *n < want && mark.pos < put_pos; mark.count++) {
        if (shmq_ring_state(&q->ring, mark.pos) != SHMQ_COMMITTED ||
            !shmq_ring_read(&q->ring, mark.pos, put_pos, &r[*n]) || r[*n].len > SHMQ_SMALL)
            break; /* shmq_get_try deals with it */
        mark.pos += shmq_record_size(r[(*n)++].len);
    }
    if (*n == 0)
        return SHMQ_EMPTY;
    int32_t hand = shmq_hands_take(&q->claims, start, mark.pos, q->self);
    if (hand < 0)
        return SHMQ_EMPTY;
    for (uint32_t i = 0; i < *n; i++)
        describe(q, &r[i], hand, &in[i]);
    shmq_side_publish(shmq_side(q, SHMQ_CONSUMING), mark);
    return SHMQ_OK;
}

/* ---- sweep */

bool shmq_is_in_hand(const struct shmq *q)
{
    return shmq_hands_top(&q->reservations) > 0 || shmq_hands_top(&q->claims) > 0;
}

/* Is the record at the front abandoned? Takes no lock. */
static bool is_front_abandoned(struct shmq *q)
{
    struct shmq_mark get, put;
    uint64_t seq;
    return shmq_side_read(shmq_side(q, SHMQ_CONSUMING), &get, &seq) &&
           shmq_side_read(shmq_side(q, SHMQ_PRODUCING), &put, &seq) && get.pos < put.pos &&
           (shmq_ring_peek(&q->ring, get.pos) & 0xff) == SHMQ_ABANDONED;
}

SHMQ_COLD static bool is_sweep_worth_it(struct shmq *q)
{
    return shmq_hands_have_dead(&q->reservations, shmq_is_dead, q) ||
           shmq_hands_have_dead(&q->claims, shmq_is_dead, q) || is_front_abandoned(q) ||
           is_passed(q, SHMQ_ABANDONED);
}

bool shmq_is_sweep_due(struct shmq *q) { return shmq_is_in_hand(q) && is_sweep_worth_it(q); }

static void sweep_producing(struct shmq *q, uint64_t lock_ns)
{
    struct shmq_mark get;
    uint64_t seq, free_pos;
    bool changed = false;
    if (shmq_hands_top(&q->reservations) == 0 ||
        shmq_enter_side(q, SHMQ_PRODUCING, shmq_now_ns() + lock_ns) != SHMQ_OK)
        return;
    if (read_free_pos(q, &free_pos) == SHMQ_OK && shmq_side_read(shmq_side(q, SHMQ_CONSUMING), &get, &seq)) {
        changed = shmq_hands_sweep_reservations(&q->reservations, &q->ring, free_pos, shmq_is_dead, q);
        shmq_hands_settle_reservations(&q->reservations, get.pos);
        shmq_hands_trim(&q->reservations);
    }
    shmq_leave_side(q, SHMQ_PRODUCING);
    fence_after_unlock();
    if (changed)
        after_put(q); /* it may have died between its commit and the wake */
}

static void sweep_consuming(struct shmq *q, uint64_t lock_ns)
{
    struct shmq_mark mark;
    struct shmq_record r;
    uint64_t put_pos, start;
    if (shmq_enter_side(q, SHMQ_CONSUMING, shmq_now_ns() + lock_ns) != SHMQ_OK)
        return;
    shmq_hands_sweep_claims(&q->claims, shmq_is_dead, q);
    mark = shmq_side_mark(shmq_side(q, SHMQ_CONSUMING));
    start = mark.pos;
    if (read_put_pos(q, mark.pos, &put_pos) == SHMQ_OK) {
        deliverable(q); /* frees what was abandoned after get_pos had passed it */
        skip(q, put_pos, &mark, &r);
        if (mark.pos != start)
            shmq_side_publish(shmq_side(q, SHMQ_CONSUMING), mark);
    }
    shmq_leave_side(q, SHMQ_CONSUMING);
    fence_after_unlock();
    if (may_take(q))
        shmq_items_wake(&q->seg->waiters, 1);
    offer_room(q, true);
}

/* Take what the dead hold out of their hands, on both sides, one lock at a time. */
static void sweep(struct shmq *q, uint64_t lock_ns)
{
    sweep_producing(q, lock_ns);
    sweep_consuming(q, lock_ns);
}

void shmq_sweep(struct shmq *q)
{
    if (shmq_hold(q) != SHMQ_OK)
        return;
    sweep(q, LOCK_GRACE_NS);
    shmq_let_go(q);
}

/* ---- calls that get, and ends of what they have in hand */

/* A consumer that keeps up with its producers fetches their lines for each record, which slows down both. So where the
 * next record as a rule is there by then, it first falls behind by a few. */
int shmq_get_try(struct shmq *q, uint8_t *scratch, struct shmq_in *in)
{
    int rc = shmq_usable(q);
    if (rc != SHMQ_OK)
        return rc;
    bool lags = q->may_spin && atomic_load_explicit(&q->has_caught_up, memory_order_relaxed);
    uint32_t pauses = lags ? shmq_lag(&q->lag) : 0;
    rc = try_side(q, SHMQ_CONSUMING) ? get_locked(q, scratch, in) : SHMQ_BUSY;
    bool has_paid = lags && rc == SHMQ_OK && !atomic_load_explicit(&q->has_caught_up, memory_order_relaxed);
    if (has_paid || pauses > 0)
        shmq_lag_learn(&q->lag, pauses, has_paid);
    if (rc == SHMQ_OK)
        after_get(q);
    return rc;
}

int shmq_get_batch_try(struct shmq *q, struct shmq_in *in, uint32_t *n)
{
    int rc = shmq_usable(q);
    if (rc != SHMQ_OK)
        return rc;
    if (!try_side(q, SHMQ_CONSUMING))
        return SHMQ_BUSY;
    rc = get_batch_locked(q, in, n);
    leave_after_get(q, rc);
    if (rc == SHMQ_OK)
        after_get(q);
    return rc;
}

void shmq_give_back_from(struct shmq *q, int32_t hand, uint64_t pos)
{
    if (q->is_cut)
        return;
    bool is_any_left = pos < shmq_hand_end(&q->claims.entry[hand]); /* if not, the entry may be another's in a moment */
    shmq_hands_advance(&q->claims, hand, pos);
    if (is_any_left)
        shmq_hands_give_back(&q->claims, hand); /* dies before: swept to the same */
    atomic_thread_fence(memory_order_seq_cst);
    shmq_items_wake(&q->seg->waiters, 1);
    after_get(q);
}

void shmq_release(struct shmq *q, int32_t hand)
{
    if (q->is_cut)
        return;
    shmq_hands_free(&q->claims, hand);
    atomic_thread_fence(memory_order_seq_cst); /* [W2] */
    after_get(q);
}

void shmq_commit(struct shmq *q, const struct shmq_in *room)
{
    if (q->is_cut)
        return;
    commit(q, room->pos, room->hand);
    after_put(q);
}

void shmq_abandon(struct shmq *q, const struct shmq_in *room)
{
    if (q->is_cut)
        return;
    shmq_ring_set_state(&q->ring, room->pos, SHMQ_ABANDONED);
    SHMQ_FAILPOINT("abandon:marked"); /* dies here: swept to the same */
    shmq_hands_give_back(&q->reservations, room->hand); /* until get_pos has passed it, so that it isn't counted */
    atomic_thread_fence(memory_order_seq_cst);
    sweep_consuming(q, SWEEP_LOCK_NS); /* its bytes are free again, if nothing lies before it */
    sweep_producing(q, SWEEP_LOCK_NS);
}

/* ---- wait */

/* Sleep until woken, at most until the deadline; a sleep that just runs out ends in a sweep. OK | INTR | CORRUPT */
static int sleep_by(struct shmq *q, _Atomic uint32_t *count, uint32_t key, uint64_t deadline_ns)
{
    uint32_t unbroken = atomic_load_explicit(&q->unbroken_sleeps, memory_order_relaxed);
    uint64_t now = shmq_now_ns(), slice = unbroken < REST_AFTER ? WAIT_NS : WAIT_AT_REST_NS;
    if (shmq_is_in_hand(q))
        slice = WAIT_IN_HAND_NS;
    if (deadline_ns <= now)
        return SHMQ_OK;
    int rc = shmq_sleep(count, key, earlier(slice, deadline_ns - now));
    if (rc != 0 && shmq_check_file(q) != SHMQ_OK)
        return SHMQ_CORRUPT;
    if (rc == ETIMEDOUT)
        sweep(q, SWEEP_LOCK_NS);
    atomic_store_explicit(&q->unbroken_sleeps, rc == ETIMEDOUT ? unbroken + 1 : 0, memory_order_relaxed);
    return rc == 0 ? SHMQ_OK : SHMQ_INTR;
}

/* Time is up. One more look is worth it if a dead one holds something. */
static bool swept_at_the_end(struct shmq *q, bool *is_swept)
{
    if (*is_swept || !shmq_is_sweep_due(q))
        return false;
    *is_swept = true;
    sweep(q, LOCK_GRACE_NS);
    return true;
}

static int wait_for_room(struct shmq *q, uint64_t bytes, uint64_t deadline_ns)
{
    struct shmq_waiters_hdr *w = &q->seg->waiters;
    uint32_t key = shmq_room_begin(w, bytes);
    if (free_bytes(q) >= bytes || shmq_is_closing(q))
        return SHMQ_OK;
    return sleep_by(q, &w->room, key, deadline_ns);
}

/* `seen`: the producing side's seq from before the queue was found empty. */
static int wait_for_items(struct shmq *q, uint64_t seen, uint64_t deadline_ns)
{
    struct shmq_waiters_hdr *w = &q->seg->waiters;
    uint64_t start = shmq_now_ns();
    atomic_thread_fence(memory_order_seq_cst); /* [W2] */
    offer_room(q, true); /* nobody will take anything for a while, so a good part may never be free */
    if (q->may_spin && shmq_spin(&q->spin, &shmq_side(q, SHMQ_PRODUCING)->seq, seen))
        return SHMQ_OK;
    uint32_t key = shmq_items_begin(w);
    if (may_take(q) || shmq_is_closing(q))
        return SHMQ_OK;
    int rc = sleep_by(q, &w->items, key, deadline_ns);
    shmq_spin_slept(&q->spin, shmq_now_ns() - start);
    if (rc != SHMQ_CORRUPT)
        shmq_items_begin(w); /* who woke us has lowered the flag; others may still be asleep */
    return rc;
}

/* All that can be claimed is. Who ends a claim wakes one who sleeps; a look now and then does for what that misses. */
static int wait_for_a_claim(struct shmq *q, uint64_t deadline_ns)
{
    struct shmq_waiters_hdr *w = &q->seg->waiters;
    uint32_t key = shmq_items_begin(w);
    bool is_any_free = n_claimed(q) < SHMQ_H_CLAIMS; /* without the lock, so no more than a hint */
    return is_any_free || shmq_is_closing(q) ? SHMQ_INTR : sleep_by(q, &w->items, key, deadline_ns);
}

/* As many reservations are open as can be. A look now and then finds out when one has ended. */
static int wait_for_a_reservation(struct shmq *q, uint64_t bytes, uint64_t deadline_ns)
{
    struct shmq_waiters_hdr *w = &q->seg->waiters;
    return sleep_by(q, &w->room, shmq_room_begin(w, bytes), deadline_ns);
}

/* What to do under the producing lock, which is let go of: put records, or reserve room for one. */
struct putting {
    const struct shmq_out *outs;
    uint32_t n, *done;
    struct shmq_in *room; /* where to say what was reserved; NULL: put */
};

static int put_or_reserve_locked(struct shmq *q, const struct putting *p)
{
    if (p->room != NULL)
        return reserve_locked(q, (uint32_t)(p->outs->size - SHMQ_RECORD_HDR), p->outs->method, p->room);
    int rc = put_locked(q, p->outs, p->n, p->done);
    if (rc == SHMQ_OK)
        after_put(q);
    return rc;
}

SHMQ_COLD static int put_wait(struct shmq *q, const struct putting *p, uint64_t deadline_ns)
{
    bool is_swept = false;
    for (;;) {
        if (shmq_is_closing(q))
            return SHMQ_CLOSED;
        int rc = shmq_enter_side_by(q, SHMQ_PRODUCING, deadline_ns);
        if (rc == SHMQ_OK)
            rc = put_or_reserve_locked(q, p);
        if (rc != SHMQ_FULL && rc != SHMQ_CLAIMED)
            return rc;
        if (shmq_now_ns() >= deadline_ns) {
            if (!swept_at_the_end(q, &is_swept))
                return rc;
            continue;
        }
        rc = rc == SHMQ_FULL ? wait_for_room(q, p->outs->size, deadline_ns)
                             : wait_for_a_reservation(q, p->outs->size, deadline_ns);
        if (rc == SHMQ_CORRUPT || (rc != SHMQ_OK && shmq_now_ns() < deadline_ns))
            return rc;
    }
}

SHMQ_COLD int shmq_put_wait(struct shmq *q, const struct shmq_out *outs, uint32_t n, uint32_t *done,
                            uint64_t deadline_ns)
{
    struct putting p = {outs, n, done, NULL};
    *done = 0;
    int rc = shmq_hold(q);
    if (rc != SHMQ_OK)
        return rc;
    rc = put_wait(q, &p, deadline_ns);
    shmq_let_go(q);
    return rc;
}

SHMQ_COLD int shmq_reserve(struct shmq *q, uint64_t len, uint32_t method, struct shmq_in *room, uint64_t deadline_ns)
{
    struct shmq_part any = {NULL, len};
    struct shmq_out out = shmq_out(&any, 1, method, false);
    struct putting p = {&out, 1, NULL, room};
    if (out.size > q->ring.capacity)
        return SHMQ_TOO_BIG;
    int rc = shmq_hold(q);
    if (rc != SHMQ_OK)
        return rc;
    rc = put_wait(q, &p, deadline_ns);
    shmq_let_go(q);
    return rc;
}

SHMQ_COLD static int get_wait(struct shmq *q, uint8_t *scratch, struct shmq_in *in, uint64_t deadline_ns)
{
    bool is_swept = false;
    for (;;) {
        if (shmq_is_closing(q))
            return SHMQ_CLOSED;
        uint64_t seen = atomic_load_explicit(&shmq_side(q, SHMQ_PRODUCING)->seq, memory_order_relaxed);
        int rc = shmq_enter_side_by(q, SHMQ_CONSUMING, deadline_ns);
        if (rc == SHMQ_OK)
            rc = get_locked(q, scratch, in);
        if (rc == SHMQ_OK)
            after_get(q);
        if (rc != SHMQ_EMPTY && rc != SHMQ_CLAIMED)
            return rc;
        if (shmq_now_ns() >= deadline_ns) {
            if (!swept_at_the_end(q, &is_swept))
                return rc;
            continue;
        }
        rc = rc == SHMQ_EMPTY ? wait_for_items(q, seen, deadline_ns) : wait_for_a_claim(q, deadline_ns);
        if (rc == SHMQ_CORRUPT || (rc != SHMQ_OK && shmq_now_ns() < deadline_ns))
            return rc;
    }
}

SHMQ_COLD int shmq_get_wait(struct shmq *q, uint8_t *scratch, struct shmq_in *in, uint64_t deadline_ns)
{
    int rc = shmq_hold(q);
    if (rc != SHMQ_OK)
        return rc;
    rc = get_wait(q, scratch, in, deadline_ns);
    if (rc != SHMQ_OK && rc != SHMQ_CORRUPT)
        after_get(q); /* who was woken, and goes without an item, wakes the next */
    shmq_let_go(q);
    return rc;
}

/* ---- clear */

/* Put the reservations in [get_pos, put_pos) into H, as skip() does one by one. */
static int pass_reservations(struct shmq *q, uint64_t get_pos, uint64_t put_pos)
{
    for (uint32_t i = 0, top = shmq_hands_top(&q->reservations); i < top; i++) {
        uint64_t pos = shmq_hand_pos1(&q->reservations.entry[i]) - 1;
        struct shmq_record r;
        if (pos < get_pos || pos >= put_pos || shmq_ring_state(&q->ring, pos) != SHMQ_RESERVED)
            continue; /* passed already, newer than this clear(), or no longer a reservation */
        if (!shmq_ring_read(&q->ring, pos, put_pos, &r))
            return shmq_corrupt(q, "length of a reservation", r.len, put_pos - pos);
        if (shmq_hands_take(&q->claims, pos, pos + shmq_record_size(r.len), 0) < 0)
            return shmq_corrupt(q, "passed reservations", SHMQ_H_ENTRIES, SHMQ_R_ENTRIES);
    }
    return SHMQ_OK;
}

/* Drop what is below put: the items, by one publication; live reservations among them go to H. */
static int clear_locked(struct shmq *q)
{
    struct shmq_mark put, get = shmq_side_mark(shmq_side(q, SHMQ_CONSUMING));
    uint64_t seq;
    if (!shmq_side_read(shmq_side(q, SHMQ_PRODUCING), &put, &seq) || put.pos - get.pos > q->ring.capacity)
        return shmq_corrupt(q, "put_pos", put.pos, get.pos + q->ring.capacity);
    for (int32_t i; (i = deliverable(q)) >= 0;)
        shmq_hands_free(&q->claims, i);
    int rc = pass_reservations(q, get.pos, put.pos);
    if (rc != SHMQ_OK)
        shmq_hands_void(&q->claims, get.pos);
    else if (put.pos != get.pos)
        shmq_side_publish(shmq_side(q, SHMQ_CONSUMING), put);
    return rc;
}

int shmq_clear(struct shmq *q, uint64_t deadline_ns)
{
    int rc = shmq_hold(q);
    if (rc != SHMQ_OK)
        return rc;
    if (shmq_is_sweep_due(q))
        sweep(q, LOCK_GRACE_NS); /* what the dead hold is nobody's, and goes too */
    if ((rc = shmq_enter_side_by(q, SHMQ_CONSUMING, deadline_ns)) == SHMQ_OK) {
        rc = clear_locked(q);
        shmq_leave_side(q, SHMQ_CONSUMING);
        fence_after_unlock();
        after_get(q);
    }
    shmq_let_go(q);
    return rc;
}
