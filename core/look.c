/* look.c - looking at a segment without changing it: positions and counts of one instant, and every invariant. */
#include "handle.h"

#include <inttypes.h>
#include <stdio.h>

#define INFO_TRIES 1000 /* then what was seen last will do */

/* ---- one instant, without a lock */

/* Records of [pos, end) that are committed: what an entry of H without an owner will deliver. */
static uint64_t committed_in(const struct shmq *q, uint64_t pos, uint64_t end)
{
    uint64_t n = 0; /* a run is a batch at most */
    while (n < SHMQ_MAX_BATCH && pos < end) {
        uint64_t word = shmq_ring_peek(&q->ring, pos);
        if ((word & 0xff) != SHMQ_COMMITTED)
            break;
        pos += shmq_record_size(word >> 32);
        n++;
    }
    return n;
}

/* Items that entries of H without an owner will deliver. False: one changed while we looked. An entry at or beyond
 * get_pos is void: its record still counts among those ahead. */
static bool given_back(const struct shmq *q, uint64_t get_pos, uint64_t *n)
{
    *n = 0;
    for (uint32_t i = 0, top = shmq_hands_top(&q->claims); i < top; i++) {
        const struct shmq_hand_hdr *e = &q->claims.entry[i];
        uint64_t pos1 = shmq_hand_pos1(e);
        if (pos1 == 0 || pos1 > get_pos || shmq_hand_owner(e) != 0)
            continue;
        *n += committed_in(q, pos1 - 1, shmq_hand_end(e));
        /* while it stands there, nobody writes to its records; that we have read them before this is the fence's work
         */
        atomic_thread_fence(memory_order_acquire);
        if (shmq_hand_pos1(e) != pos1 || shmq_hand_owner(e) != 0)
            return false;
    }
    return true;
}

/* Reservations between the positions that are no items: not committed yet, or abandoned. */
static uint64_t not_items(const struct shmq *q, uint64_t get_pos, uint64_t put_pos)
{
    uint64_t n = 0;
    for (uint32_t i = 0, top = shmq_hands_top(&q->reservations); i < top; i++) {
        uint64_t pos = shmq_hand_pos1(&q->reservations.entry[i]) - 1;
        n += pos >= get_pos && pos < put_pos && (shmq_ring_peek(&q->ring, pos) & 0xff) != SHMQ_COMMITTED;
    }
    return n;
}

/* Can these numbers be? Of two marks, each whole, they hold even when they aren't of one instant. */
static int check_info(struct shmq *q, const struct shmq_info *info, uint64_t n_records, uint64_t n_absent)
{
    uint64_t bytes = info->put_pos - info->get_pos, used = info->put_pos - info->free_pos;
    if (bytes > q->ring.capacity)
        return shmq_corrupt(q, "put_pos - get_pos", bytes, q->ring.capacity);
    if (used > q->ring.capacity)
        return shmq_corrupt(q, "put_pos - free_pos", used, q->ring.capacity);
    if (n_records > bytes / SHMQ_RECORD_HDR)
        return shmq_corrupt(q, "records between get_pos and put_pos", n_records, bytes / SHMQ_RECORD_HDR);
    if (n_absent > n_records)
        return shmq_corrupt(q, "reservations between get_pos and put_pos", n_absent, n_records);
    return SHMQ_OK;
}

int shmq_info(struct shmq *q, struct shmq_info *info)
{
    struct shmq_side_hdr *getting = shmq_side(q, SHMQ_CONSUMING), *putting = shmq_side(q, SHMQ_PRODUCING);
    for (int tries = 1;; tries++) {
        struct shmq_mark get, put, again;
        uint64_t get_seq = 0, put_seq = 0, get_seq2 = 0, put_seq2 = 0;
        if (!shmq_side_read(getting, &get, &get_seq))
            return shmq_corrupt(q, "consuming.seq", get_seq, 0);
        if (!shmq_side_read(putting, &put, &put_seq))
            return shmq_corrupt(q, "producing.seq", put_seq, 0);
        *info = (struct shmq_info){put.pos, get.pos, shmq_hands_lowest(&q->claims, get.pos), 0};
        bool is_whole = given_back(q, get.pos, &info->qsize);
        uint64_t n_records = put.count - get.count, n_absent = not_items(q, get.pos, put.pos);
        info->qsize += n_records - n_absent;
        is_whole = is_whole && shmq_side_read(getting, &again, &get_seq2) && get_seq2 == get_seq &&
                   shmq_side_read(putting, &again, &put_seq2) && put_seq2 == put_seq;
        if (is_whole || tries == INFO_TRIES) /* a table full of garbage takes so long that it never holds still */
            return check_info(q, info, n_records, n_absent);
    }
}

/* ---- every invariant */

struct checker {
    struct shmq *q;
    void (*report)(void *arg, const char *line);
    void *arg;
};

static void broken(const struct checker *c, const char *what, uint64_t found, uint64_t allowed)
{
    char line[160];
    snprintf(line, sizeof line, "%s: found %" PRIu64 ", allowed %" PRIu64, what, found, allowed);
    c->report(c->arg, line);
}

/* The records between the positions, with the consuming lock held: they stay where they are. */
static void check_ring(const struct checker *c, struct shmq_mark get, struct shmq_mark put)
{
    struct shmq_record r;
    uint64_t n = 0;
    for (uint64_t pos = get.pos; pos < put.pos; pos += shmq_record_size(r.len), n++) {
        uint8_t state = shmq_ring_state(&c->q->ring, pos);
        if (state < SHMQ_RESERVED || state > SHMQ_ABANDONED) {
            broken(c, "state of a record", state, SHMQ_ABANDONED);
            return;
        }
        if (!shmq_ring_read(&c->q->ring, pos, put.pos, &r)) {
            broken(c, "length of a record", r.len, put.pos - pos);
            return;
        }
    }
    if (n != put.count - get.count)
        broken(c, "records between get_pos and put_pos", n, put.count - get.count);
}

static void check_entry(const struct checker *c, const struct shmq_hands *h, uint32_t i, uint64_t below)
{
    uint64_t pos1 = shmq_hand_pos1(&h->entry[i]), end = shmq_hand_end(&h->entry[i]);
    uint64_t owner = shmq_hand_owner(&h->entry[i]);
    if (pos1 == 0)
        return;
    if (i >= shmq_hands_top(h))
        broken(c, "entry above its table's top", i, shmq_hands_top(h));
    if (pos1 > below)
        broken(c, "position in hand", pos1 - 1, below);
    if (end <= pos1 - 1 || end - (pos1 - 1) > c->q->ring.capacity)
        broken(c, "end of what is in hand", end, pos1 - 1 + c->q->ring.capacity);
    if (owner != 0 && shmq_slot_of(owner) >= SHMQ_SLOTS)
        broken(c, "slot of an owner", shmq_slot_of(owner), SHMQ_SLOTS - 1);
    for (uint32_t k = 0; k < i; k++)
        if (shmq_hand_pos1(&h->entry[k]) == pos1) {
            broken(c, "position twice in hand", pos1 - 1, 0);
            break; /* a table overwritten with one value has 300,000 such pairs */
        }
}

static int check_side(const struct checker *c, int side, uint64_t deadline_ns)
{
    struct shmq *q = c->q;
    struct shmq_mark put;
    uint64_t seq;
    int rc = shmq_enter_side_by(q, side, deadline_ns);
    if (rc != SHMQ_OK)
        return rc;
    struct shmq_mark mark = shmq_side_mark(shmq_side(q, side));
    const struct shmq_hands *h = side == SHMQ_PRODUCING ? &q->reservations : &q->claims;
    if (side == SHMQ_CONSUMING && shmq_side_read(shmq_side(q, SHMQ_PRODUCING), &put, &seq)) {
        uint64_t free_pos = shmq_hands_lowest(&q->claims, mark.pos);
        if (put.pos < mark.pos || put.pos - free_pos > q->ring.capacity)
            broken(c, "bytes in use", put.pos - free_pos, q->ring.capacity);
        else
            check_ring(c, mark, put);
    }
    for (uint32_t i = 0; i < h->n; i++)
        check_entry(c, h, i, mark.pos);
    shmq_leave_side(q, side);
    return SHMQ_OK;
}

int shmq_check(struct shmq *q, void (*report)(void *arg, const char *line), void *arg, uint64_t deadline_ns)
{
    struct checker c = {q, report, arg};
    int rc = shmq_hold(q);
    if (rc != SHMQ_OK)
        return rc;
    if ((rc = check_side(&c, SHMQ_PRODUCING, deadline_ns)) == SHMQ_OK)
        rc = check_side(&c, SHMQ_CONSUMING, deadline_ns);
    shmq_let_go(q);
    return rc;
}
