/* test_queue.c - the parts put together (queue.c): put, get, batches, giving back, clear, waiting, closing; in one
 * process and among threads. Deaths are in test_queue_deaths.c, broken segments in test_queue_corrupt.c. */
#include "check.h"

#define PAGE port_page_size()
#define BIG (SHMQ_SMALL + 1000)

static struct shmq *q;

/* Both sides stand at `pos`, as after a long life. */
static void start_at(uint64_t pos)
{
    for (int side = 0; side < 2; side++)
        shmq_side_publish(shmq_side(q, side), (struct shmq_mark){pos, 1000});
}

static struct shmq_info info(void)
{
    struct shmq_info info;
    CHECK_EQ(shmq_info(q, &info), SHMQ_OK);
    return info;
}

static uint64_t in_use(void) { return info().put_pos - info().free_pos; }

static void is_empty(void)
{
    uint32_t id;
    CHECK_EQ(item_get(q, &id, 0), SHMQ_EMPTY);
    CHECK_EQ(info().qsize, 0);
    CHECK_EQ(in_use(), 0);
}

static void done(void)
{
    CHECK_EQ(broken_invariants(q), 0);
    shmq_free(q);
    CHECK_EQ(access(check_path, F_OK), -1);
}

/* Take a record and keep it. */
static struct shmq_in claim(uint32_t id)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    CHECK_EQ(shmq_get_try(q, scratch, &in), SHMQ_OK);
    CHECK(in.hand >= 0 && in.method == id);
    return in;
}

/* Take n records as one hand; the first is `id`, the others follow it. */
static uint32_t claim_batch(struct shmq_in *in, uint32_t n, uint32_t id)
{
    CHECK_EQ(shmq_get_batch_try(q, in, &n), SHMQ_OK);
    for (uint32_t i = 0; i < n; i++) {
        CHECK(in[i].method == id + i && in[i].hand == in[0].hand);
        item_check(in[i].payload, id + i, in[i].len);
    }
    return n;
}

/* Items to put in one call, all of `len` bytes. */
struct outs {
    uint8_t *payload[SHMQ_MAX_BATCH];
    struct shmq_part part[SHMQ_MAX_BATCH];
    struct shmq_out out[SHMQ_MAX_BATCH];
};

static struct outs *make_outs(uint32_t n, uint32_t id, const size_t *len)
{
    struct outs *outs = malloc(sizeof *outs);
    for (uint32_t i = 0; i < SHMQ_MAX_BATCH; i++) {
        outs->payload[i] = i < n ? malloc(len[i] + 1) : NULL;
        if (i >= n)
            continue;
        item_fill(outs->payload[i], id + i, len[i]);
        outs->part[i] = (struct shmq_part){outs->payload[i], len[i]};
        outs->out[i] = shmq_out(&outs->part[i], 1, id + i, false);
    }
    return outs;
}

static void free_outs(struct outs *outs)
{
    for (uint32_t i = 0; i < SHMQ_MAX_BATCH; i++)
        free(outs->payload[i]);
    free(outs);
}

/* Reserve as a big put does, by hand. */
static struct shmq_in reserve(uint32_t id, uint32_t len)
{
    struct shmq_in room;
    CHECK_EQ(shmq_reserve(q, len, id, &room, in_ms(STATE_MS)), SHMQ_OK);
    CHECK_EQ(room.len, len);
    CHECK_EQ(room.phase, (uintptr_t)room.payload % SHMQ_ALIGN);
    return room;
}

static void commit(uint32_t id, const struct shmq_in *room)
{
    item_fill((uint8_t *)room->payload, id, room->len);
    shmq_commit(q, room);
}

/* ---- put and get */

static void test_items_of_all_sizes_come_whole_and_in_order_through_every_wrap(void)
{
    for (uint64_t pages = 1; pages <= 5; pages += 2) {
        q = attach(pages * PAGE);
        start_at(pages * PAGE * 7 - 100);
        uint32_t put = 0, got = 0;
        for (uint64_t len = 0; put < 3000; len = (len * 5 + 13) % 3000, put++) {
            while (shmq_record_size(len) > pages * PAGE - in_use())
                gets(q, got++);
            puts_ok(q, put, len);
        }
        while (got < put)
            gets(q, got++);
        is_empty();
        done();
    }
}

static void test_big_items_wrap_too(void)
{
    q = attach(5 * PAGE);
    for (uint32_t id = 0; id < 500; id++) {
        puts_ok(q, id, BIG + id * 7);
        puts_ok(q, 1000 + id, id);
        gets(q, id);
        gets(q, 1000 + id);
    }
    is_empty();
    done();
}

static void test_queue_is_filled_to_the_byte(void)
{
    q = attach(PAGE);
    for (uint64_t start = 0; start < 3 * PAGE; start += 997) {
        start_at(start);
        q->put_seen = q->free_seen = 0;
        puts_ok(q, 1, 100);
        puts_ok(q, 2, PAGE - 108 - 8 - 8);
        CHECK_EQ(item_put(q, 3, 1, 0), SHMQ_FULL);
        CHECK_EQ(item_put(q, 3, 0, 0), SHMQ_OK);
        CHECK_EQ(in_use(), PAGE);
        CHECK_EQ(item_put(q, 4, 0, 0), SHMQ_FULL);
        for (uint32_t id = 1; id <= 3; id++)
            gets(q, id);
        is_empty();
        CHECK_EQ(item_put(q, 5, PAGE - 8, 0), SHMQ_OK); /* one item, all of it */
        CHECK_EQ(item_put(q, 6, 0, 0), SHMQ_FULL);
        gets(q, 5);
    }
    done();
}

static void test_item_that_can_never_fit_changes_nothing(void)
{
    q = attach(2 * PAGE);
    puts_ok(q, 1, 10);
    CHECK_EQ(item_put(q, 2, 2 * PAGE - 7, STATE_MS), SHMQ_TOO_BIG);
    struct shmq_part huge[] = {{"", UINT32_MAX}, {"", UINT32_MAX}};
    struct shmq_out out = shmq_out(huge, 2, 0, false);
    uint32_t n;
    CHECK_EQ(shmq_put_try(q, &out, 1, &n), SHMQ_TOO_BIG);
    CHECK_EQ(n, 0);
    CHECK_EQ(in_use(), 18);
    gets(q, 1);
    done();
}

static void test_ring_full_of_empty_items(void)
{
    q = attach(PAGE);
    start_at(PAGE - 4); /* headers wrap */
    for (uint32_t id = 0; id < PAGE / 8; id++)
        puts_ok(q, id, 0);
    CHECK_EQ(item_put(q, 0, 0, 0), SHMQ_FULL);
    CHECK_EQ(info().qsize, PAGE / 8);
    for (uint32_t id = 0; id < PAGE / 8; id++)
        gets(q, id);
    is_empty();
    done();
}

static void test_aligned_parts_arrive_aligned(void)
{
    uint8_t payload[9000], scratch[SHMQ_SMALL];
    struct shmq_in in;
    uint32_t n;
    item_fill(payload, 5, sizeof payload);
    struct shmq_part parts[] = {{payload, 33}, {payload, 9000}, {payload, 70}};
    struct shmq_out out = shmq_out(parts, 3, 77, true);
    q = attach(5 * PAGE);
    for (uint64_t start = 5 * PAGE - 300; start < 5 * PAGE; start += 7) {
        start_at(start);
        q->put_seen = q->free_seen = 0;
        CHECK_EQ(shmq_put_try(q, &out, 1, &n), SHMQ_OK);
        CHECK_EQ(shmq_get_try(q, scratch, &in), SHMQ_OK);
        CHECK(in.hand >= 0 && in.len == out.size - 8 && in.phase == (uintptr_t)in.payload % SHMQ_ALIGN);
        const uint8_t *at = in.payload;
        for (int i = 0; i < 3; at += parts[i++].len) {
            at += i > 0 ? -(uintptr_t)at % SHMQ_ALIGN : 0;
            CHECK(memcmp(at, payload, parts[i].len) == 0);
        }
        CHECK(at <= in.payload + in.len);
        shmq_release(q, in.hand);
    }
    done();
}

static void test_small_item_is_off_the_queue_and_a_big_one_in_hand(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    q = attach(5 * PAGE);
    puts_ok(q, 1, SHMQ_SMALL);
    puts_ok(q, 2, SHMQ_SMALL + 1);
    CHECK_EQ(shmq_get_try(q, scratch, &in), SHMQ_OK);
    CHECK(in.hand == -1 && in.payload == scratch && in.len == SHMQ_SMALL && in.heap == NULL);
    in = claim(2);
    CHECK_EQ(in_use(), SHMQ_SMALL + 9);
    shmq_release(q, in.hand);
    is_empty();
    done();
}

/* ---- batches */

static void test_batch_goes_in_as_far_as_it_fits(void)
{
    size_t len[8] = {500, 500, 500, 500, 500, 500, 500, 500};
    struct outs *outs = make_outs(8, 10, len);
    uint32_t n = 0;
    q = attach(PAGE);
    puts_ok(q, 1, 1000);
    CHECK_EQ(shmq_put_try(q, outs->out, 8, &n), SHMQ_OK);
    CHECK_EQ(n, (PAGE - 1008) / 508);
    uint32_t sent = n;
    CHECK_EQ(shmq_put_try(q, outs->out + sent, 8 - sent, &n), SHMQ_FULL);
    CHECK_EQ(n, 0);
    gets(q, 1);
    CHECK_EQ(shmq_put_try(q, outs->out + sent, 8 - sent, &n), SHMQ_OK);
    CHECK_EQ(n, 8 - sent < 1 + 1008 / 508 ? 8 - sent : 1 + 1008 / 508);
    for (uint32_t i = 0; i < sent + n; i++)
        gets(q, 10 + i);
    is_empty();
    free_outs(outs);
    done();
}

static void test_big_record_goes_by_itself(void)
{
    size_t len[5] = {10, 20, BIG, 30, 40};
    struct outs *outs = make_outs(5, 10, len);
    uint32_t n = 0, sent = 0;
    static const uint32_t steps[] = {2, 1, 2};
    q = attach(5 * PAGE);
    for (int i = 0; i < 3; i++, sent += n) {
        CHECK_EQ(shmq_put_wait(q, outs->out + sent, 5 - sent, &n, 0), SHMQ_OK);
        CHECK_EQ(n, steps[i]);
    }
    for (uint32_t i = 0; i < 5; i++)
        gets(q, 10 + i);
    is_empty();
    free_outs(outs);
    done();
}

static void test_batch_with_one_that_can_never_fit_goes_in_up_to_there(void)
{
    size_t len[3] = {10, 3 * PAGE, 20};
    struct outs *outs = make_outs(3, 10, len);
    uint32_t n;
    q = attach(2 * PAGE);
    CHECK_EQ(shmq_put_try(q, outs->out, 3, &n), SHMQ_OK);
    CHECK_EQ(n, 1);
    CHECK_EQ(shmq_put_try(q, outs->out + 1, 2, &n), SHMQ_TOO_BIG);
    gets(q, 10);
    is_empty();
    free_outs(outs);
    done();
}

static void test_batch_is_taken_as_one_hand_up_to_the_first_big_one(void)
{
    struct shmq_in in[SHMQ_MAX_BATCH + 1];
    q = attach(5 * PAGE);
    start_at(5 * PAGE - 200);
    for (uint32_t id = 1; id <= 100; id++)
        puts_ok(q, id, id == 90 ? BIG : id % 40);
    CHECK_EQ(claim_batch(in, 5, 1), 5);
    shmq_release(q, in[0].hand);
    CHECK_EQ(claim_batch(in, 1000, 6), SHMQ_MAX_BATCH);
    shmq_release(q, in[0].hand);
    CHECK_EQ(claim_batch(in, 64, 70), 20);
    shmq_release(q, in[0].hand);
    uint32_t n = 10;
    CHECK_EQ(shmq_get_batch_try(q, in, &n), SHMQ_EMPTY); /* the big one is next */
    CHECK_EQ(n, 0);
    gets(q, 90);
    CHECK_EQ(claim_batch(in, 64, 91), 10);
    shmq_release(q, in[0].hand);
    n = 10;
    CHECK_EQ(shmq_get_batch_try(q, in, &n), SHMQ_EMPTY);
    is_empty();
    done();
}

static void test_rest_of_a_batch_given_back_comes_first_again(void)
{
    struct shmq_in in[5];
    for (uint32_t from = 0; from < 5; from++) {
        q = attach(PAGE);
        for (uint32_t id = 0; id < 7; id++)
            puts_ok(q, id, 20);
        claim_batch(in, 5, 0);
        shmq_give_back_from(q, in[0].hand, in[from].pos);
        CHECK_EQ(info().qsize, 7 - from);
        uint32_t n = 3;
        CHECK_EQ(shmq_get_batch_try(q, in, &n), SHMQ_EMPTY); /* those come one by one */
        for (uint32_t id = from; id < 7; id++)
            gets(q, id);
        is_empty();
        done();
    }
}

/* Between the two steps of giving back, the entry is somebody else's. */
static struct shmq_in taken_between;

static void take_when_advanced(const char *name)
{
    if (strcmp(name, "hands:advanced") != 0)
        return;
    disarm();
    taken_between = claim(9);
}

static void test_giving_back_nothing_is_a_release(void)
{
    struct shmq_in in[3];
    q = attach(5 * PAGE);
    for (uint32_t id = 1; id <= 3; id++)
        puts_ok(q, id, 20);
    puts_ok(q, 9, BIG);
    claim_batch(in, 3, 1);
    check->plan.on_hit = take_when_advanced;
    arm();
    shmq_give_back_from(q, in[0].hand, in[2].pos + 28); /* where the last one ends */
    disarm();
    if (taken_between.payload == NULL)
        taken_between = claim(9);
    CHECK_EQ(shmq_hand_owner(&q->claims.entry[taken_between.hand]), q->self);
    uint32_t id;
    CHECK_EQ(item_get(q, &id, 0), SHMQ_EMPTY);
    CHECK_EQ(item_accept(q, &taken_between), 9);
    is_empty();
    done();
}

/* ---- claims */

static void test_room_is_free_from_the_oldest_claim_on(void)
{
    struct shmq_in in[3];
    q = attach(8 * PAGE);
    for (uint32_t id = 0; id < 3; id++)
        puts_ok(q, id, BIG);
    for (uint32_t id = 0; id < 3; id++)
        in[id] = claim(id);
    item_accept(q, &in[1]);
    CHECK_EQ(in_use(), 3 * (BIG + 8));
    item_accept(q, &in[0]);
    CHECK_EQ(in_use(), BIG + 8);
    item_accept(q, &in[2]);
    is_empty();
    done();
}

static void test_claim_given_back_is_delivered_before_newer_ones(void)
{
    q = attach(8 * PAGE);
    for (uint32_t id = 0; id < 3; id++)
        puts_ok(q, id, BIG);
    struct shmq_in a = claim(0), b = claim(1);
    shmq_give_back_from(q, b.hand, b.pos);
    shmq_give_back_from(q, a.hand, a.pos);
    CHECK_EQ(info().qsize, 3);
    a = claim(0);
    CHECK_EQ(q->claims.entry[a.hand].deliveries, 2);
    gets(q, 1);
    gets(q, 2);
    item_accept(q, &a);
    is_empty();
    done();
}

static void test_claims_beyond_the_table_are_copied(void)
{
    static struct shmq_in in[SHMQ_H_CLAIMS + 3];
    uint8_t scratch[SHMQ_SMALL];
    q = attach((SHMQ_H_CLAIMS + 10) * 2 * PAGE);
    for (uint32_t id = 0; id < SHMQ_H_CLAIMS + 3; id++)
        puts_ok(q, id, BIG);
    puts_ok(q, SHMQ_H_CLAIMS + 3, 10);
    for (uint32_t id = 0; id < SHMQ_H_CLAIMS + 3; id++) {
        CHECK_EQ(shmq_get_try(q, scratch, &in[id]), SHMQ_OK);
        CHECK((in[id].hand >= 0) == (id < SHMQ_H_CLAIMS) && (in[id].heap == NULL) == (id < SHMQ_H_CLAIMS));
    }
    struct shmq_in batch[2];
    uint32_t n = 2;
    CHECK_EQ(shmq_get_batch_try(q, batch, &n), SHMQ_EMPTY); /* no hand is left for one */
    gets(q, SHMQ_H_CLAIMS + 3);
    shmq_give_back_from(q, in[7].hand, in[7].pos); /* and is claimed again */
    in[7] = claim(7);
    for (uint32_t id = 0; id < SHMQ_H_CLAIMS + 3; id++)
        CHECK_EQ(item_accept(q, &in[id]), id);
    is_empty();
    done();
}

/* ---- leases: claims of any record, for as long as one likes */

static int lease(struct shmq_in *in) { return shmq_get_try(q, NULL, in); }

static void leases(struct shmq_in *in, uint32_t id, uint32_t deliveries)
{
    CHECK_EQ(lease(in), SHMQ_OK);
    CHECK(in->hand >= 0 && in->heap == NULL);
    item_check(in->payload, in->method, in->len);
    CHECK_EQ(in->method, id);
    CHECK_EQ(in->deliveries, deliveries);
}

static void give_back(const struct shmq_in *in) { shmq_give_back_from(q, in->hand, in->pos); }

static void test_leased_item_stays_until_released_and_holds_nobody_up(void)
{
    struct shmq_in in[4];
    struct shmq_info info;
    q = attach(4 * PAGE);
    for (uint32_t id = 1; id <= 6; id++)
        puts_ok(q, id, id == 2 ? BIG : 10 * (id - 1));
    for (uint32_t i = 0; i < 4; i++)
        leases(&in[i], 1 + i, 1);
    gets(q, 5);
    CHECK_EQ(shmq_info(q, &info), SHMQ_OK);
    CHECK_EQ(info.qsize, 1);
    CHECK_EQ(info.free_pos, in[0].pos);
    shmq_release(q, in[2].hand); /* in any order */
    shmq_release(q, in[0].hand);
    CHECK_EQ(shmq_info(q, &info), SHMQ_OK);
    CHECK_EQ(info.free_pos, in[1].pos);
    give_back(&in[3]);
    give_back(&in[1]);
    leases(&in[1], 2, 2);
    gets(q, 4); /* before 6, which is newer */
    give_back(&in[1]);
    leases(&in[1], 2, 3);
    gets(q, 6);
    shmq_release(q, in[1].hand);
    CHECK_EQ(lease(&in[0]), SHMQ_EMPTY);
    is_empty();
    done();
}

static void test_lease_of_a_run_given_back_takes_one_record_of_it(void)
{
    struct shmq_in batch[SHMQ_MAX_BATCH], in[4];
    struct shmq_info info;
    q = attach(4 * PAGE);
    for (uint32_t id = 1; id <= 6; id++)
        puts_ok(q, id, 10 * (id - 1));
    CHECK_EQ(claim_batch(batch, 5, 1), 5);
    shmq_give_back_from(q, batch[0].hand, batch[1].pos); /* 1 is done with */
    leases(&in[0], 2, 2);
    leases(&in[1], 3, 2);
    CHECK_EQ(shmq_info(q, &info), SHMQ_OK);
    CHECK_EQ(info.qsize, 3);
    CHECK_EQ(broken_invariants(q), 0);
    gets(q, 4);
    leases(&in[2], 5, 2); /* the last one of the run */
    leases(&in[3], 6, 1);
    give_back(&in[1]);
    leases(&in[1], 3, 3);
    for (uint32_t i = 0; i < 4; i++)
        shmq_release(q, in[i].hand);
    is_empty();
    done();
}

static void *waits_for_a_lease(void *in)
{
    int rc;
    while ((rc = shmq_get_wait(q, NULL, in, in_ms(STATE_MS))) == SHMQ_INTR)
        ;
    CHECK_EQ(rc, SHMQ_OK);
    return NULL;
}

static void test_leases_beyond_the_table_wait_for_one_that_ends(void)
{
    static struct shmq_in in[SHMQ_H_CLAIMS + 1];
    pthread_t thread;
    int rc;
    q = attach(64 * PAGE);
    for (uint32_t id = 0; id <= SHMQ_H_CLAIMS; id++)
        puts_ok(q, id, 20);
    for (uint32_t id = 0; id < SHMQ_H_CLAIMS; id++)
        leases(&in[id], id, 1);
    CHECK_EQ(lease(&in[SHMQ_H_CLAIMS]), SHMQ_CLAIMED);
    uint64_t start = shmq_now_ns();
    while ((rc = shmq_get_wait(q, NULL, &in[SHMQ_H_CLAIMS], start + 50000000u)) == SHMQ_INTR)
        ;
    CHECK_EQ(rc, SHMQ_CLAIMED);
    CHECK(shmq_now_ns() - start >= 50000000u);
    CHECK_EQ(pthread_create(&thread, NULL, waits_for_a_lease, &in[SHMQ_H_CLAIMS]), 0);
    pause_ms(5);
    shmq_release(q, in[500].hand);
    pthread_join(thread, NULL);
    CHECK_EQ(in[SHMQ_H_CLAIMS].method, SHMQ_H_CLAIMS);
    for (uint32_t id = 0; id <= SHMQ_H_CLAIMS; id++)
        if (id != 500)
            shmq_release(q, in[id].hand);
    is_empty();
    done();
}

/* ---- reservations that take long */

static void test_items_behind_a_reservation_are_not_held_up_and_it_comes_when_committed(void)
{
    q = attach(8 * PAGE);
    puts_ok(q, 1, 10);
    struct shmq_in room = reserve(2, BIG);
    puts_ok(q, 3, 10);
    puts_ok(q, 4, BIG);
    gets(q, 1);
    gets(q, 3);
    commit(2, &room);
    gets(q, 2); /* before newer ones */
    gets(q, 4);
    is_empty();
    done();
}

static void test_full_tables_hold_everything_up_to_the_last_entry(void)
{
    static struct shmq_in in[SHMQ_H_CLAIMS];
    static struct shmq_in room[SHMQ_R_ENTRIES];
    q = attach((SHMQ_H_CLAIMS + SHMQ_R_ENTRIES + 9) * 3 * PAGE);
    for (uint32_t id = 0; id < SHMQ_H_CLAIMS; id++) {
        puts_ok(q, id, BIG);
        in[id] = claim(id);
    }
    for (uint32_t i = 0; i < SHMQ_R_ENTRIES; i++)
        room[i] = reserve(2000 + i, BIG);
    puts_ok(q, 4000, BIG); /* no reservation is left for it: copied under the lock */
    puts_ok(q, 4001, 10);
    gets(q, 4000); /* passes all reservations */
    CHECK_EQ(shmq_hands_top(&q->claims), SHMQ_H_ENTRIES - SHMQ_H_SPLITS);
    CHECK_EQ(broken_invariants(q), 0);
    gets(q, 4001);
    for (uint32_t i = 0; i < SHMQ_R_ENTRIES; i++)
        commit(2000 + i, &room[i]);
    for (uint32_t i = 0; i < SHMQ_R_ENTRIES; i++)
        gets(q, 2000 + i);
    for (uint32_t id = 0; id < SHMQ_H_CLAIMS; id++)
        item_accept(q, &in[id]);
    is_empty();
    shmq_sweep(q); /* tidies up */
    CHECK(!shmq_is_in_hand(q));
    done();
}

/* A get that has seen the end of the ring at a reservation doesn't believe that this still is the end. */
static void test_item_put_behind_a_passed_reservation_comes_at_the_first_try(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    q = attach(16 * PAGE);
    puts_ok(q, 1, 10);
    struct shmq_in room = reserve(2, BIG);
    gets(q, 1);
    puts_ok(q, 3, 10);
    CHECK_EQ(shmq_get_try(q, scratch, &in), SHMQ_OK);
    CHECK_EQ(item_accept(q, &in), 3);
    commit(2, &room);
    gets(q, 2);
    is_empty();
    done();
}

static void test_abandoned_reservation_among_items_is_none_of_them(void)
{
    struct shmq_info info;
    q = attach(8 * PAGE);
    puts_ok(q, 1, 10);
    struct shmq_in room = reserve(2, 100), more = reserve(3, 5);
    puts_ok(q, 4, 10);
    shmq_abandon(q, &room);
    CHECK_EQ(shmq_info(q, &info), SHMQ_OK);
    CHECK_EQ(info.qsize, 2);
    shmq_abandon(q, &more);
    gets(q, 1);
    CHECK_EQ(shmq_info(q, &info), SHMQ_OK);
    CHECK_EQ(info.qsize, 1);
    CHECK_EQ(broken_invariants(q), 0);
    gets(q, 4);
    is_empty();
    shmq_sweep(q);
    CHECK(!shmq_is_in_hand(q));
    done();
}

static void test_abandoned_reservation_never_comes_and_its_bytes_are_free_at_once(void)
{
    for (int is_passed = 0; is_passed < 2; is_passed++) {
        q = attach(8 * PAGE);
        struct shmq_in room = reserve(1, 100);
        puts_ok(q, 2, 10);
        if (is_passed)
            gets(q, 2);
        shmq_abandon(q, &room);
        CHECK_EQ(in_use(), is_passed ? 0 : shmq_record_size(10));
        if (!is_passed)
            gets(q, 2);
        is_empty();
        CHECK_EQ(broken_invariants(q), 0);
        done();
    }
}

static void test_reservations_beyond_the_table_wait_for_one_that_ends(void)
{
    static struct shmq_in room[SHMQ_R_ENTRIES];
    struct shmq_in more;
    q = attach(8 * PAGE);
    for (uint32_t i = 0; i < SHMQ_R_ENTRIES; i++)
        room[i] = reserve(i, 8);
    CHECK_EQ(shmq_reserve(q, 8, 500, &more, 0), SHMQ_CLAIMED);
    uint64_t start = shmq_now_ns();
    int rc;
    while ((rc = shmq_reserve(q, 8, 500, &more, start + 30000000)) == SHMQ_INTR)
        ;
    CHECK_EQ(rc, SHMQ_CLAIMED);
    CHECK(shmq_now_ns() - start >= 30000000);
    commit(7, &room[7]);
    more = reserve(500, 8);
    gets(q, 7);
    commit(500, &more);
    gets(q, 500);
    for (uint32_t i = 0; i < SHMQ_R_ENTRIES; i++)
        if (i != 7)
            shmq_abandon(q, &room[i]);
    is_empty();
    CHECK_EQ(in_use(), 0);
    CHECK_EQ(shmq_reserve(q, 8 * PAGE, 1, &more, 0), SHMQ_TOO_BIG);
    CHECK_EQ(shmq_reserve(q, UINT64_MAX, 1, &more, 0), SHMQ_TOO_BIG);
    puts_ok(q, 1, 10);
    CHECK_EQ(shmq_reserve(q, 8 * PAGE - 9, 1, &more, 0), SHMQ_FULL);
    gets(q, 1);
    done();
}

/* ---- clear */

static void test_clear_drops_items_and_leaves_what_is_in_hand(void)
{
    struct shmq_in batch[4];
    q = attach(16 * PAGE);
    start_at(16 * PAGE - 5000);
    puts_ok(q, 1, BIG);
    struct shmq_in claimed = claim(1);
    struct shmq_in passed = reserve(2, BIG);
    for (uint32_t id = 3; id <= 7; id++)
        puts_ok(q, id, 10);
    gets(q, 3);
    claim_batch(batch, 2, 4);
    shmq_give_back_from(q, batch[0].hand, batch[1].pos);
    struct shmq_in ahead = reserve(8, BIG);
    puts_ok(q, 9, 10);
    struct shmq_info before = info();
    CHECK_EQ(before.qsize, 4); /* 5, 6, 7, 9 */
    CHECK_EQ(shmq_clear(q, in_ms(STATE_MS)), SHMQ_OK);
    CHECK_EQ(broken_invariants(q), 0);
    CHECK_EQ(info().qsize, 0);
    CHECK(info().get_pos == before.put_pos && info().free_pos == before.free_pos);
    puts_ok(q, 10, 10);
    commit(8, &ahead);
    gets(q, 8);
    commit(2, &passed);
    gets(q, 2);
    gets(q, 10);
    CHECK_EQ(item_accept(q, &claimed), 1);
    is_empty();
    CHECK_EQ(shmq_clear(q, 0), SHMQ_OK); /* of nothing */
    done();
}

/* ---- deadlines and waiting */

static void test_call_without_time_returns_at_once(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    q = attach(PAGE);
    uint64_t start = shmq_now_ns();
    CHECK_EQ(shmq_get_wait(q, scratch, &in, 0), SHMQ_EMPTY);
    puts_ok(q, 1, PAGE - 8);
    CHECK_EQ(item_put(q, 2, 0, 0), SHMQ_FULL);
    CHECK(shmq_now_ns() - start < UINT64_C(1000000000));
    done();
}

static void test_deadline_is_kept(void)
{
    uint32_t id;
    q = attach(PAGE);
    uint64_t start = shmq_now_ns();
    CHECK_EQ(item_get(q, &id, 150), SHMQ_EMPTY);
    CHECK(shmq_now_ns() - start >= 150 * UINT64_C(1000000));
    puts_ok(q, 1, PAGE - 8);
    CHECK_EQ(item_put(q, 2, 0, 150), SHMQ_FULL);
    uint64_t ms = (shmq_now_ns() - start) / 1000000;
    CHECK(ms >= 300 && ms < 3000);
    done();
}

static void test_waiting_without_end_returns_now_and_then_for_signals(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    q = attach(PAGE);
    uint64_t start = shmq_now_ns();
    CHECK_EQ(shmq_get_wait(q, scratch, &in, SHMQ_FOREVER), SHMQ_INTR);
    CHECK(shmq_now_ns() - start < UINT64_C(2000000000));
    done();
}

/* A thread that puts or gets some items, as its number says. */
struct worker {
    pthread_t thread;
    struct shmq *q;
    uint32_t id, n;
    size_t len;
    _Atomic bool has_ended;
};

static void *puts_items(void *arg)
{
    struct worker *w = arg;
    for (uint32_t i = 0; i < w->n; i++)
        puts_ok(w->q, w->id + i, w->len);
    w->has_ended = true;
    return NULL;
}

static void *gets_items(void *arg)
{
    struct worker *w = arg;
    for (uint32_t i = 0; i < w->n; i++)
        gets(w->q, w->id + i);
    w->has_ended = true;
    return NULL;
}

static void start_worker(struct worker *w, void *(*run)(void *))
{
    w->q = q;
    CHECK_EQ(pthread_create(&w->thread, NULL, run, w), 0);
}

static void test_get_waits_until_an_item_comes(void)
{
    struct worker w = {.id = 5, .n = 1};
    q = attach(PAGE);
    start_worker(&w, gets_items);
    WAIT_FOR(shmq_items_asleep(&q->seg->waiters));
    CHECK(!w.has_ended);
    puts_ok(q, 5, 10);
    pthread_join(w.thread, NULL);
    is_empty();
    done();
}

static void test_put_waits_until_a_consumer_frees_room(void)
{
    struct worker w = {.id = 5, .n = 1, .len = 100};
    q = attach(PAGE);
    puts_ok(q, 1, PAGE / 2);
    puts_ok(q, 2, PAGE / 2 - 16);
    start_worker(&w, puts_items);
    WAIT_FOR(shmq_room_wanted(&q->seg->waiters) == 108);
    CHECK(!w.has_ended);
    gets(q, 1);
    pthread_join(w.thread, NULL);
    gets(q, 2);
    gets(q, 5);
    is_empty();
    done();
}

static void test_put_waits_until_a_claim_is_let_go(void)
{
    struct worker w = {.id = 5, .n = 1, .len = 6 * 1024};
    q = attach(2 * PAGE);
    puts_ok(q, 1, BIG);
    struct shmq_in in = claim(1);
    start_worker(&w, puts_items);
    WAIT_FOR(shmq_room_wanted(&q->seg->waiters) != 0);
    CHECK(!w.has_ended);
    item_accept(q, &in);
    pthread_join(w.thread, NULL);
    gets(q, 5);
    is_empty();
    done();
}

static void test_sleeper_gets_what_another_gives_back(void)
{
    struct worker w = {.id = 1, .n = 1};
    q = attach(4 * PAGE);
    puts_ok(q, 1, BIG);
    struct shmq_in in = claim(1);
    start_worker(&w, gets_items);
    WAIT_FOR(shmq_items_asleep(&q->seg->waiters));
    shmq_give_back_from(q, in.hand, in.pos);
    pthread_join(w.thread, NULL);
    is_empty();
    done();
}

/* ---- woken, and not just looking again after a while */

#define WAKES 30

static _Atomic uint32_t progress;

static void *gets_and_counts(void *arg)
{
    for (uint32_t i = 0; i < WAKES; i++, progress++)
        gets(q, i);
    return arg;
}

static void *puts_and_counts(void *len)
{
    for (uint32_t i = 0; i < WAKES; i++, progress++)
        puts_ok(q, i, (uintptr_t)len);
    return NULL;
}

static bool is_getter_asleep(void) { return shmq_items_asleep(&q->seg->waiters); }
static bool is_putter_asleep(void) { return shmq_room_wanted(&q->seg->waiters) != 0; }

/* Let a thread fall asleep and wake it by `wake`, again and again. A sleeper that nobody wakes looks by itself after 20
 * to 250 ms, so that it would take more than half a second in all. */
static void wakes_soon(void *(*run)(void *), uintptr_t arg, bool (*is_asleep)(void), void (*wake)(uint32_t i))
{
    pthread_t thread;
    uint64_t ns = 0;
    progress = 0;
    CHECK_EQ(pthread_create(&thread, NULL, run, (void *)arg), 0);
    for (uint32_t i = 0; i < WAKES; i++) {
        WAIT_FOR(progress == i && is_asleep());
        usleep(500); /* asleep, too, not only about to */
        uint64_t start = shmq_now_ns();
        wake(i);
        WAIT_FOR(progress == i + 1);
        ns += shmq_now_ns() - start;
    }
    pthread_join(thread, NULL);
    context("%d wakes took %" PRIu64 " ms", WAKES, ns / 1000000);
    CHECK(ns < 450 * UINT64_C(1000000));
}

static void wake_by_put(uint32_t i) { CHECK_EQ(item_put(q, i, 10, 0), SHMQ_OK); }

static void test_put_wakes_a_getter(void)
{
    q = attach(PAGE);
    wakes_soon(gets_and_counts, 0, is_getter_asleep, wake_by_put);
    is_empty();
    done();
}

/* One who has waited for a second looks less often by itself; it is woken all the same, and then looks often again. */
static void test_put_wakes_a_getter_at_rest(void)
{
    uint32_t id;
    q = attach(PAGE);
    CHECK_EQ(item_get(q, &id, 1600), SHMQ_EMPTY);
    CHECK(q->unbroken_sleeps >= 10);
    wakes_soon(gets_and_counts, 0, is_getter_asleep, wake_by_put);
    CHECK_EQ(q->unbroken_sleeps, 0);
    CHECK_EQ(item_get(q, &id, 2150), SHMQ_EMPTY); /* ten times 0.1 s, then 0.25 s */
    CHECK(q->unbroken_sleeps >= 10 && q->unbroken_sleeps <= 16); /* 22 without */
    done();
}

/* What the getter wants is in our hands first. */
static void wake_by_giving_back(uint32_t i)
{
    struct shmq_in in;
    uint32_t n = 1;
    q->seg->waiters.items_asleep = 0; /* our own put must not wake it */
    CHECK_EQ(item_put(q, i, 10, 0), SHMQ_OK);
    CHECK_EQ(shmq_get_batch_try(q, &in, &n), SHMQ_OK);
    q->seg->waiters.items_asleep = 1;
    usleep(300);
    shmq_give_back_from(q, in.hand, in.pos);
}

static void test_giving_back_wakes_a_getter(void)
{
    q = attach(PAGE);
    wakes_soon(gets_and_counts, 0, is_getter_asleep, wake_by_giving_back);
    is_empty();
    done();
}

static void wake_by_get(uint32_t i) { gets(q, i == 0 ? 1000 : i - 1); }

static void test_get_wakes_a_putter(void)
{
    q = attach(PAGE);
    puts_ok(q, 1000, PAGE - 8);
    wakes_soon(puts_and_counts, PAGE - 8, is_putter_asleep, wake_by_get);
    gets(q, WAKES - 1);
    is_empty();
    done();
}

static struct shmq_in held;

static void wake_by_release(uint32_t i)
{
    item_accept(q, &held);
    WAIT_FOR(progress == i + 1);
    held = claim(i);
}

static void test_release_wakes_a_putter(void)
{
    q = attach(2 * PAGE);
    puts_ok(q, 1000, BIG);
    held = claim(1000);
    wakes_soon(puts_and_counts, BIG, is_putter_asleep, wake_by_release);
    item_accept(q, &held);
    is_empty();
    done();
}

static void wake_by_clear(uint32_t i)
{
    (void)i;
    CHECK_EQ(shmq_clear(q, in_ms(STATE_MS)), SHMQ_OK);
}

static void test_clear_wakes_a_putter(void)
{
    q = attach(PAGE);
    puts_ok(q, 1000, PAGE - 8);
    wakes_soon(puts_and_counts, PAGE - 8, is_putter_asleep, wake_by_clear);
    gets(q, WAKES - 1);
    done();
}

/* ---- what comes between looking and falling asleep */

static struct shmq *other;

/* Right after the lock was let go of, the queue having been found empty or full. */
static void change_after_looking(const char *name)
{
    if (strcmp(name, "lock:unlocked") != 0)
        return;
    disarm();
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    struct shmq_info now;
    CHECK_EQ(shmq_info(other, &now), SHMQ_OK);
    if (now.qsize == 0)
        CHECK_EQ(item_put(other, 5, 10, 0), SHMQ_OK);
    else
        CHECK_EQ(shmq_get_try(other, scratch, &in), SHMQ_OK);
}

static void look_with_a_change(int side)
{
    shmq_side(q, side)->lock = shmq_owner_of(1, 300); /* a dead one's: who takes it over wakes others at its end */
    check->plan.on_hit = change_after_looking;
    q->may_spin = false;
    arm();
}

static void test_change_right_before_falling_asleep_is_seen(void)
{
    uint8_t scratch[SHMQ_SMALL] = {0};
    struct shmq_in in;
    struct shmq_part part = {scratch, 100};
    struct shmq_out out = shmq_out(&part, 1, 7, false);
    uint32_t n;
    q = attach(PAGE);
    other = attach(PAGE);
    look_with_a_change(SHMQ_CONSUMING);
    CHECK_EQ(shmq_get_wait(q, scratch, &in, SHMQ_FOREVER), SHMQ_OK); /* INTR: it has slept, and nobody woke it */
    CHECK_EQ(in.method, 5);
    puts_ok(q, 6, SHMQ_SMALL - 8);
    look_with_a_change(SHMQ_PRODUCING);
    CHECK_EQ(shmq_put_wait(q, &out, 1, &n, SHMQ_FOREVER), SHMQ_OK);
    CHECK_EQ(shmq_get_try(q, scratch, &in), SHMQ_OK);
    CHECK_EQ(in.method, 7);
    shmq_free(other);
    is_empty();
    done();
}

/* The same on all distances between a sleeper that looks and a producer that puts, without sleeping. */
static _Atomic uint32_t turn, answered;

static void *put_at_each_turn(void *n)
{
    struct shmq_part part = {"x", 1};
    struct shmq_out out = shmq_out(&part, 1, 0, false);
    uint32_t done;
    for (uint32_t i = 1; i <= *(uint32_t *)n; i++) {
        await_turn(&turn, i);
        CHECK_EQ(shmq_put_try(q, &out, 1, &done), SHMQ_OK);
        atomic_store_explicit(&answered, i, memory_order_release);
    }
    return n;
}

static void meet(uint32_t n)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    struct shmq_mark mark;
    pthread_t thread;
    struct shmq_waiters_hdr *w = &q->seg->waiters;
    uint64_t seq, before = shmq_side_mark(shmq_side(q, SHMQ_PRODUCING)).count;
    turn = answered = 0;
    CHECK_EQ(pthread_create(&thread, NULL, put_at_each_turn, &n), 0);
    for (uint32_t i = 1; i <= n; i++) {
        w->items_asleep = 0;
        uint32_t wakes = w->items;
        atomic_store_explicit(&turn, i, memory_order_release);
        for (uint32_t k = i % 12; k > 0; k--)
            port_pause();
        uint32_t key = shmq_items_begin(w);
        CHECK(shmq_side_read(shmq_side(q, SHMQ_PRODUCING), &mark, &seq));
        await_turn(&answered, i);
        CHECK(mark.count == before + i || w->items != key || key != wakes);
        CHECK_EQ(shmq_get_try(q, scratch, &in), SHMQ_OK);
    }
    pthread_join(thread, NULL);
}

static void test_who_looks_before_sleeping_and_who_puts_never_miss_each_other(void)
{
    q = attach(PAGE);
    for (uint64_t until = in_ms(500); shmq_now_ns() < until;)
        meet(2000);
    is_empty();
    done();
}

/* ---- room is used again at once */

/* Fill all room there is, at every step of another's get. */
static void use_all_room(const char *name)
{
    static uint8_t bytes[16];
    struct shmq_part part = {bytes, sizeof bytes};
    struct shmq_out out = shmq_out(&part, 1, 0, false);
    uint32_t n;
    (void)name;
    disarm();
    memset(bytes, 0xee, sizeof bytes);
    while (shmq_put_try(other, &out, 1, &n) == SHMQ_OK)
        ;
    arm();
}

static void test_what_was_taken_stays_whole_while_its_room_is_used_again(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in[3];
    uint32_t n = 3;
    q = attach(4 * PAGE);
    other = attach(PAGE);
    for (uint32_t id = 1; id <= 4; id++)
        puts_ok(q, id, 200);
    puts_ok(q, 5, BIG);
    CHECK_EQ(claim_batch(in, n, 1), 3);
    shmq_give_back_from(q, in[0].hand, in[0].pos);
    check->plan.on_hit = use_all_room;
    arm();
    for (uint32_t id = 1; id <= 5; id++) { /* out of H, out of the ring, and in hand */
        CHECK_EQ(shmq_get_try(q, scratch, in), SHMQ_OK);
        CHECK_EQ(in->method, id);
        item_check(in->payload, id, id == 5 ? BIG : 200);
    }
    disarm();
    shmq_release(q, in->hand);
    CHECK_EQ(broken_invariants(q), 0);
    shmq_free(other);
    shmq_free(q);
}

/* ---- closing */

static void *waits_until_closed(void *arg)
{
    struct worker *w = arg;
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    struct shmq_part part = {scratch, w->len};
    struct shmq_out out = shmq_out(&part, 1, 0, false);
    uint32_t n;
    int rc;
    memset(scratch, 0, sizeof scratch);
    do
        rc = w->id == 0 ? shmq_get_wait(w->q, scratch, &in, SHMQ_FOREVER)
                        : shmq_put_wait(w->q, &out, 1, &n, SHMQ_FOREVER);
    while (rc == SHMQ_INTR || rc == SHMQ_OK);
    CHECK_EQ(rc, SHMQ_CLOSED);
    return NULL;
}

static void test_close_ends_the_calls_of_other_threads(void)
{
    other = attach(PAGE);
    struct worker w[4] = {{.id = 0}, {.id = 0}, {.id = 1, .len = 4000}, {.id = 1, .len = 3000}};
    for (int round = 0; round < 2; round++) { /* an empty queue, then a full one */
        q = attach(PAGE);
        if (round == 1)
            puts_ok(q, 1, PAGE - 8);
        for (int i = 0; i < 2; i++)
            start_worker(&w[2 * round + i], waits_until_closed);
        WAIT_FOR(round == 0 ? shmq_items_asleep(&q->seg->waiters) : shmq_room_wanted(&q->seg->waiters) != 0);
        CHECK_EQ(shmq_close(q, false), SHMQ_OK);
        for (int i = 0; i < 2; i++)
            pthread_join(w[2 * round + i].thread, NULL);
        CHECK_EQ(shmq_refs(other), 1);
        shmq_free(q);
    }
    gets(other, 1);
    shmq_free(other);
}

static void test_close_wakes_who_waits(void)
{
    other = attach(PAGE);
    uint64_t ns = 0;
    for (uint32_t round = 0; round < 12; round++) {
        struct worker w = {.id = round % 2, .len = 3000};
        q = attach(PAGE);
        start_worker(&w, waits_until_closed);
        WAIT_FOR(round % 2 ? is_putter_asleep() : is_getter_asleep());
        usleep(500);
        uint64_t start = shmq_now_ns();
        CHECK_EQ(shmq_close(q, false), SHMQ_OK);
        pthread_join(w.thread, NULL);
        ns += shmq_now_ns() - start;
        shmq_free(q);
        CHECK_EQ(shmq_clear(other, in_ms(STATE_MS)), SHMQ_OK);
    }
    context("%" PRIu64 " ms for all", ns / 1000000);
    CHECK(ns < 250 * UINT64_C(1000000));
    shmq_free(other);
}

static void *gets_for_moments(void *arg)
{
    struct worker *w = arg;
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    int rc;
    do
        rc = shmq_get_wait(w->q, scratch, &in, shmq_now_ns() + w->len);
    while (rc == SHMQ_INTR || rc == SHMQ_EMPTY);
    CHECK_EQ(rc, SHMQ_CLOSED);
    return NULL;
}

static void test_close_and_calls_that_come_and_go_never_meet_an_unmapped_segment(void)
{
    other = attach(PAGE);
    for (uint32_t round = 0; round < 400; round++) {
        struct worker w[3];
        q = attach(PAGE);
        for (uint32_t i = 0; i < 3; i++) {
            w[i] = (struct worker){.len = i * 20000};
            start_worker(&w[i], gets_for_moments);
        }
        if (round % 2)
            usleep(round % 50 * 10);
        CHECK_EQ(shmq_close(q, round % 3 == 0), SHMQ_OK);
        for (uint32_t i = 0; i < 3; i++)
            pthread_join(w[i].thread, NULL);
        CHECK_EQ(shmq_refs(other), 1);
        shmq_free(q);
    }
    shmq_free(other);
}

static void test_who_holds_the_handle_keeps_its_slot_and_memory(void)
{
    other = attach(4 * PAGE);
    q = attach(4 * PAGE);
    puts_ok(other, 1, BIG);
    CHECK_EQ(shmq_hold(q), SHMQ_OK);
    struct shmq_in in = claim(1);
    CHECK_EQ(shmq_close(q, false), SHMQ_OK);
    CHECK_EQ(shmq_hold(q), SHMQ_CLOSED);
    CHECK_EQ(shmq_refs(other), 2);
    CHECK(!shmq_is_dead(other, q->self));
    CHECK_EQ(item_accept(q, &in), 1);
    shmq_let_go(q);
    CHECK_EQ(shmq_refs(other), 1);
    shmq_free(q);
    q = other;
    is_empty();
    done();
}

static void test_leaving_now_unlinks_though_calls_are_inside(void)
{
    q = attach(PAGE);
    CHECK_EQ(shmq_hold(q), SHMQ_OK);
    CHECK_EQ(shmq_close(q, true), SHMQ_OK);
    CHECK_EQ(access(check_path, F_OK), -1);
    shmq_let_go(q);
    shmq_free(q);
}

/* ---- many threads, one handle or several */

#define PRODUCERS 3u
#define CONSUMERS 3u
#define EACH 12000u

static _Atomic uint8_t seen[PRODUCERS * EACH];
static _Atomic uint32_t n_seen;

static size_t len_of(uint32_t id) { return id % 17 == 0 ? BIG + id % 900 : id * 7 % 300; }

static void accept_one(uint32_t id)
{
    CHECK(id < PRODUCERS * EACH);
    CHECK_EQ(atomic_fetch_add(&seen[id], 1), 0);
    n_seen++;
}

/* By ones and by batches. */
static void *puts_mixed(void *arg)
{
    struct worker *w = arg;
    for (uint32_t i = 0; i < w->n;) {
        if (i % 5 != 0 || i + 6 > w->n) {
            puts_ok(w->q, w->id + i, len_of(w->id + i));
            i++;
            continue;
        }
        size_t len[6];
        for (uint32_t k = 0; k < 6; k++)
            len[k] = len_of(w->id + i + k);
        struct outs *outs = make_outs(6, w->id + i, len);
        for (uint32_t sent = 0, n; sent < 6; sent += n) {
            int rc = shmq_put_wait(w->q, outs->out + sent, 6 - sent, &n, SHMQ_FOREVER);
            CHECK(rc == SHMQ_OK || rc == SHMQ_INTR);
        }
        free_outs(outs);
        i += 6;
    }
    return NULL;
}

/* By batches, of which some are given back from the middle, and by ones, of which some are given back. */
static void *gets_mixed(void *arg)
{
    struct worker *w = arg;
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in[8];
    for (uint32_t round = 0; n_seen < PRODUCERS * EACH; round++) {
        uint32_t n = 1 + round % 8;
        if (round % 2 && shmq_get_batch_try(w->q, in, &n) == SHMQ_OK) {
            uint32_t keep = round % 5 == 0 ? n / 2 : n;
            for (uint32_t i = 0; i < keep; i++) {
                item_check(in[i].payload, in[i].method, in[i].len);
                accept_one(in[i].method);
            }
            if (keep < n)
                shmq_give_back_from(w->q, in[0].hand, in[keep].pos);
            else
                shmq_release(w->q, in[0].hand);
        } else if (shmq_get_wait(w->q, scratch, in, in_ms(2)) == SHMQ_OK) {
            if (in->hand >= 0 && round % 7 == 0)
                shmq_give_back_from(w->q, in->hand, in->pos);
            else
                accept_one(item_accept(w->q, in));
        }
    }
    return NULL;
}

static void mix(bool has_one_handle)
{
    struct worker w[PRODUCERS + CONSUMERS];
    struct shmq *all[PRODUCERS + CONSUMERS];
    struct shmq *first = attach(8 * PAGE);
    memset((void *)seen, 0, sizeof seen);
    n_seen = 0;
    for (uint32_t i = 0; i < PRODUCERS + CONSUMERS; i++) {
        q = all[i] = has_one_handle ? first : attach(PAGE);
        w[i] = (struct worker){.id = i * EACH, .n = EACH};
        start_worker(&w[i], i < PRODUCERS ? puts_mixed : gets_mixed);
    }
    for (uint32_t i = 0; i < PRODUCERS + CONSUMERS; i++)
        pthread_join(w[i].thread, NULL);
    for (uint32_t i = 0; i < PRODUCERS + CONSUMERS && !has_one_handle; i++)
        shmq_free(all[i]);
    q = first;
    is_empty();
    done();
}

static void test_threads_of_one_handle_get_every_item_once(void) { mix(true); }
static void test_threads_with_handles_of_their_own_get_every_item_once(void) { mix(false); }

/* ---- order */

#define ORDERED 6000u

static void puts_in_order(void *arg)
{
    uint32_t first = (uint32_t)(uintptr_t)arg;
    struct shmq *mine = attach(PAGE);
    for (uint32_t i = 0; i < ORDERED; i++)
        puts_ok(mine, first + i, i % 3 == 0 ? 20000 + i : i % 200);
    shmq_free(mine);
}

static void test_items_of_each_producer_keep_their_order_past_reservations(void)
{
    uint32_t next[3], id;
    pid_t pids[3];
    q = attach(64 * PAGE);
    for (uint32_t i = 0; i < 3; i++) {
        next[i] = i * ORDERED;
        pids[i] = start_child(puts_in_order, (void *)(uintptr_t)(i * ORDERED));
    }
    for (uint32_t n = 0; n < 3 * ORDERED; n++) {
        CHECK_EQ(item_get(q, &id, STATE_MS), SHMQ_OK);
        CHECK_EQ(id, next[id / ORDERED]++);
    }
    for (int i = 0; i < 3; i++)
        child_ends_well(pids[i]);
    is_empty();
    done();
}

/* The consumer is stopped at any instruction, again and again, and finds more changed than it could in running. Claims
 * above those of passed reservations make the look at H long, so that it is often stopped in the middle of that. */
static void gets_in_order(void *arg)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    uint32_t next[2] = {0, ORDERED}, n = 0;
    (void)arg;
    struct shmq *mine = attach(PAGE);
    while (n < 2 * ORDERED) {
        if (shmq_get_try(mine, scratch, &in) != SHMQ_OK)
            continue; /* awake, so that it's stopped in the middle */
        uint32_t id = item_accept(mine, &in);
        CHECK_EQ(id, next[id / ORDERED]++);
        n++;
    }
    shmq_free(mine);
}

static void puts_mostly_big(void *arg)
{
    uint32_t first = (uint32_t)(uintptr_t)arg;
    struct shmq *mine = attach(PAGE);
    for (uint32_t i = 0; i < ORDERED; i++)
        puts_ok(mine, first + i, i % 2 == 0 ? SHMQ_SMALL + 1 : 0);
    shmq_free(mine);
}

static void stop_a_consumer_now_and_then(void)
{
    static struct shmq_in in[500];
    pid_t producers[2], consumer;
    int status;
    q = attach(ORDERED * 2 * PAGE); /* holds all of it */
    for (uint32_t i = 0; i < 500; i++) {
        puts_ok(q, i, 0);
        claim_batch(&in[i], 1, i);
    }
    for (uint32_t i = 0; i < 16; i++)
        shmq_release(q, in[i].hand);
    consumer = start_child(gets_in_order, NULL);
    for (uint32_t i = 0; i < 2; i++)
        producers[i] = start_child(puts_mostly_big, (void *)(uintptr_t)(i * ORDERED));
    while (waitpid(consumer, &status, WNOHANG) == 0) {
        kill(consumer, SIGSTOP);
        usleep(30);
        kill(consumer, SIGCONT);
        usleep(30);
    }
    CHECK_EQ(status, 0);
    for (int i = 0; i < 2; i++)
        child_ends_well(producers[i]);
    for (uint32_t i = 16; i < 500; i++)
        shmq_release(q, in[i].hand);
    is_empty();
    done();
}

static void test_order_is_kept_though_the_consumer_is_stopped_now_and_then(void)
{
    for (int round = 0; round < 5; round++)
        stop_a_consumer_now_and_then();
}

static const struct test tests[] = {
    TEST(test_items_of_all_sizes_come_whole_and_in_order_through_every_wrap),
    TEST(test_big_items_wrap_too),
    TEST(test_queue_is_filled_to_the_byte),
    TEST(test_item_that_can_never_fit_changes_nothing),
    TEST(test_ring_full_of_empty_items),
    TEST(test_aligned_parts_arrive_aligned),
    TEST(test_small_item_is_off_the_queue_and_a_big_one_in_hand),
    TEST(test_batch_goes_in_as_far_as_it_fits),
    TEST(test_big_record_goes_by_itself),
    TEST(test_batch_with_one_that_can_never_fit_goes_in_up_to_there),
    TEST(test_batch_is_taken_as_one_hand_up_to_the_first_big_one),
    TEST(test_rest_of_a_batch_given_back_comes_first_again),
    TEST(test_giving_back_nothing_is_a_release),
    TEST(test_room_is_free_from_the_oldest_claim_on),
    TEST(test_claim_given_back_is_delivered_before_newer_ones),
    TEST(test_claims_beyond_the_table_are_copied),
    TEST(test_leased_item_stays_until_released_and_holds_nobody_up),
    TEST(test_lease_of_a_run_given_back_takes_one_record_of_it),
    TEST(test_leases_beyond_the_table_wait_for_one_that_ends),
    TEST(test_items_behind_a_reservation_are_not_held_up_and_it_comes_when_committed),
    TEST(test_item_put_behind_a_passed_reservation_comes_at_the_first_try),
    TEST(test_abandoned_reservation_among_items_is_none_of_them),
    TEST(test_abandoned_reservation_never_comes_and_its_bytes_are_free_at_once),
    TEST(test_reservations_beyond_the_table_wait_for_one_that_ends),
    TEST(test_full_tables_hold_everything_up_to_the_last_entry),
    TEST(test_clear_drops_items_and_leaves_what_is_in_hand),
    TEST(test_call_without_time_returns_at_once),
    TEST(test_deadline_is_kept),
    TEST(test_waiting_without_end_returns_now_and_then_for_signals),
    TEST(test_get_waits_until_an_item_comes),
    TEST(test_put_waits_until_a_consumer_frees_room),
    TEST(test_put_waits_until_a_claim_is_let_go),
    TEST(test_sleeper_gets_what_another_gives_back),
    TEST(test_put_wakes_a_getter),
    TEST(test_put_wakes_a_getter_at_rest),
    TEST(test_giving_back_wakes_a_getter),
    TEST(test_get_wakes_a_putter),
    TEST(test_release_wakes_a_putter),
    TEST(test_clear_wakes_a_putter),
    TEST(test_change_right_before_falling_asleep_is_seen),
    TEST(test_who_looks_before_sleeping_and_who_puts_never_miss_each_other),
    TEST(test_what_was_taken_stays_whole_while_its_room_is_used_again),
    TEST(test_close_ends_the_calls_of_other_threads),
    TEST(test_close_wakes_who_waits),
    TEST(test_close_and_calls_that_come_and_go_never_meet_an_unmapped_segment),
    TEST(test_who_holds_the_handle_keeps_its_slot_and_memory),
    TEST(test_leaving_now_unlinks_though_calls_are_inside),
    TEST(test_threads_of_one_handle_get_every_item_once),
    TEST(test_threads_with_handles_of_their_own_get_every_item_once),
    TEST(test_items_of_each_producer_keep_their_order_past_reservations),
    TEST(test_order_is_kept_though_the_consumer_is_stopped_now_and_then),
};
RUN_TESTS(tests)
