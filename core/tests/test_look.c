/* test_look.c - looking at a segment: positions and counts of one instant, and every invariant (look.c). */
#include "check.h"

#define CAPACITY (16 * port_page_size())
#define BIG (SHMQ_SMALL + 1000)

static struct shmq *q;

/* What shmq_info() says: items, bytes put and not yet taken, bytes in use. */
static void looks(uint64_t qsize, uint64_t ahead, uint64_t in_use)
{
    struct shmq_info info;
    CHECK_EQ(shmq_info(q, &info), SHMQ_OK);
    CHECK_EQ(info.qsize, qsize);
    CHECK_EQ(info.put_pos - info.get_pos, ahead);
    CHECK_EQ(info.put_pos - info.free_pos, in_use);
}

/* Both sides stand at `pos`, as after a long life. */
static void start_at(uint64_t pos)
{
    for (int side = 0; side < 2; side++)
        shmq_side_publish(shmq_side(q, side), (struct shmq_mark){pos, 1000});
}

static struct shmq_in claim(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    CHECK_EQ(shmq_get_try(q, scratch, &in), SHMQ_OK);
    CHECK(in.hand >= 0);
    return in;
}

static void done(void)
{
    CHECK_EQ(broken_invariants(q), 0);
    shmq_free(q);
}

/* ---- one instant */

static void test_items_and_bytes_are_counted_through_the_wrap(void)
{
    q = attach(CAPACITY);
    start_at(3 * CAPACITY - 50);
    looks(0, 0, 0);
    puts_ok(q, 1, 100);
    puts_ok(q, 2, 0);
    looks(2, 116, 116);
    gets(q, 1);
    looks(1, 8, 8);
    puts_ok(q, 3, CAPACITY - 16);
    looks(2, CAPACITY, CAPACITY); /* to the byte */
    gets(q, 2);
    gets(q, 3);
    looks(0, 0, 0);
    done();
}

static void test_claims_in_hand_are_bytes_but_no_items(void)
{
    q = attach(CAPACITY);
    puts_ok(q, 1, BIG);
    puts_ok(q, 2, 10);
    struct shmq_in in = claim();
    CHECK(shmq_is_in_hand(q));
    looks(1, 18, BIG + 8 + 18);
    gets(q, 2);
    looks(0, 0, BIG + 8 + 18); /* room is free from the oldest on */
    CHECK_EQ(item_accept(q, &in), 1);
    looks(0, 0, 0);
    done();
}

static void test_records_given_back_are_items_again(void)
{
    struct shmq_in in[4];
    uint32_t n = 4;
    q = attach(CAPACITY);
    for (uint32_t id = 1; id <= 4; id++)
        puts_ok(q, id, 10);
    CHECK(shmq_get_batch_try(q, in, &n) == SHMQ_OK && n == 4);
    looks(0, 0, 72);
    shmq_give_back_from(q, in[0].hand, in[1].pos);
    looks(3, 0, 54);
    for (uint32_t id = 2; id <= 4; id++) {
        gets(q, id);
        looks(4 - id, 0, 18 * (4 - id));
    }
    done();
}

static void put_big(void *arg)
{
    struct shmq *mine = attach(CAPACITY);
    arm();
    puts_ok(mine, (uint32_t)(uintptr_t)arg, BIG);
}

/* A child that is frozen between its reservation of item `id` and its commit. */
static pid_t reserve_and_freeze(uintptr_t id)
{
    plan(SIGSTOP, 0, "put:unlocked");
    pid_t pid = start_child(put_big, (void *)id);
    child_has_stopped(pid);
    return pid;
}

static void test_reservations_are_bytes_but_no_items(void)
{
    q = attach(CAPACITY);
    pid_t pid = reserve_and_freeze(1);
    looks(0, BIG + 8, BIG + 8);
    puts_ok(q, 2, 10);
    looks(1, BIG + 26, BIG + 26);
    gets(q, 2); /* passes it */
    looks(0, 0, BIG + 26);
    let_child_end(pid);
    looks(1, 0, BIG + 26);
    gets(q, 1);
    looks(0, 0, 0);
    done();
}

static void test_abandoned_reservations_are_no_items_and_go_away(void)
{
    q = attach(CAPACITY);
    pid_t pid = reserve_and_freeze(1);
    puts_ok(q, 2, 10);
    kill_child(pid);
    looks(1, BIG + 26, BIG + 26);
    uint32_t id;
    gets(q, 2);
    CHECK_EQ(item_get(q, &id, 0), SHMQ_EMPTY); /* sweeps */
    looks(0, 0, 0);
    done();
}

static void get_and_die(void *arg)
{
    uint32_t id;
    (void)arg;
    struct shmq *mine = attach(CAPACITY);
    arm();
    item_get(mine, &id, STATE_MS);
}

static void test_passing_that_was_never_published_counts_nothing_twice(void)
{
    q = attach(CAPACITY);
    pid_t pid = reserve_and_freeze(1);
    puts_ok(q, 2, 10);
    plan(SIGKILL, 0, "hands:taken"); /* of the reservation it passes; the entry is void */
    child_was_killed(start_child(get_and_die, NULL));
    looks(1, BIG + 26, BIG + 26);
    let_child_end(pid);
    looks(2, BIG + 26, BIG + 26);
    gets(q, 1);
    gets(q, 2);
    looks(0, 0, 0);
    done();
}

/* ---- while others work */

#define ROUNDS 60000u
#define ITEM_BYTES 40u

static _Atomic uint32_t workers;

static void *put_items(void *arg)
{
    for (uint32_t i = 0; i < ROUNDS; i++)
        puts_ok(q, i, ITEM_BYTES - 8);
    workers--;
    return arg;
}

static void *get_items(void *arg)
{
    for (uint32_t i = 0; i < ROUNDS; i++)
        gets(q, i);
    workers--;
    return arg;
}

static void test_numbers_fit_together_at_every_instant(void)
{
    pthread_t threads[2];
    struct shmq_info info, before = {0, 0, 0, 0};
    uint64_t looked = 0;
    q = attach(port_page_size());
    workers = 2;
    CHECK_EQ(pthread_create(&threads[0], NULL, put_items, NULL), 0);
    CHECK_EQ(pthread_create(&threads[1], NULL, get_items, NULL), 0);
    for (; workers > 0; looked++, before = info) {
        CHECK_EQ(shmq_info(q, &info), SHMQ_OK);
        CHECK_EQ(info.qsize * ITEM_BYTES, info.put_pos - info.get_pos);
        CHECK(info.free_pos == info.get_pos && info.put_pos - info.free_pos <= shmq_capacity(q));
        CHECK(info.put_pos >= before.put_pos && info.get_pos >= before.get_pos);
    }
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    CHECK(looked > 0);
    done();
}

static _Atomic bool is_over;

/* Takes big items and batches, and gives some back. */
static void *take_all_ways(void *arg)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in[8];
    for (uint32_t round = 0; !is_over; round++) {
        uint32_t n = 1 + round % 8;
        if (shmq_get_batch_try(q, in, &n) == SHMQ_OK) {
            for (uint32_t i = 0; i < n; i++)
                item_check(in[i].payload, in[i].method, in[i].len);
            if (round % 3 == 0)
                shmq_give_back_from(q, in[0].hand, in[n / 2].pos);
            else
                shmq_release(q, in[0].hand);
        } else if (shmq_get_try(q, scratch, in) == SHMQ_OK) {
            item_check(in->payload, in->method, in->len);
            if (in->hand >= 0 && round % 3 == 0)
                shmq_give_back_from(q, in->hand, in->pos);
            else if (in->hand >= 0)
                shmq_release(q, in->hand);
            free(in->heap);
        }
    }
    return arg;
}

static void *put_all_sizes(void *arg)
{
    for (uint32_t id = 0; !is_over; id++)
        item_put(q, id, id % 5 == 0 ? BIG : id % 300, 1);
    return arg;
}

static void test_looking_is_right_while_records_are_in_many_hands(void)
{
    pthread_t threads[4];
    struct shmq_info info;
    q = attach(CAPACITY);
    for (int i = 0; i < 4; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, i < 2 ? put_all_sizes : take_all_ways, NULL), 0);
    for (uint64_t until = in_ms(700), looked = 0; shmq_now_ns() < until; looked++) {
        CHECK_EQ(shmq_info(q, &info), SHMQ_OK);
        CHECK(info.free_pos <= info.get_pos && info.get_pos <= info.put_pos);
        CHECK(info.put_pos - info.free_pos <= CAPACITY && info.qsize <= CAPACITY / 8);
        if (looked % 100 == 0)
            CHECK_EQ(broken_invariants(q), 0);
    }
    is_over = true;
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    uint32_t id;
    while (item_get(q, &id, 0) == SHMQ_OK)
        ;
    looks(0, 0, 0);
    done();
}

/* ---- who holds a lock */

static void lock_and_freeze(void *side)
{
    struct shmq *mine = attach(CAPACITY);
    CHECK_EQ(shmq_enter_side(mine, (int)(uintptr_t)side, in_ms(STATE_MS)), SHMQ_OK);
    raise(SIGSTOP);
    shmq_leave_side(mine, (int)(uintptr_t)side);
}

static void test_lock_holder_is_named_and_check_gives_up_on_it(void)
{
    q = attach(CAPACITY);
    for (int side = 0; side < 2; side++) {
        int n = 0;
        CHECK_EQ(shmq_lock_pid(q, side), 0);
        pid_t pid = start_child(lock_and_freeze, (void *)(uintptr_t)side);
        child_has_stopped(pid);
        CHECK_EQ(shmq_lock_pid(q, side), pid);
        looks(0, 0, 0);             /* takes no lock */
        if (side == SHMQ_CONSUMING) /* it comes to this one last */
            CHECK_EQ(look_at_all(q, complain, &n), SHMQ_BUSY);
        let_child_end(pid);
        CHECK_EQ(shmq_lock_pid(q, side), 0);
    }
    shmq_side(q, 0)->lock = UINT64_MAX;
    CHECK_EQ(shmq_lock_pid(q, 0), 0);
    shmq_side(q, 0)->lock = 0;
    done();
}

/* ---- every invariant */

static void find_line(void *arg, const char *line)
{
    const char **what = arg;
    if (*what != NULL && strncmp(line, *what, strlen(*what)) == 0)
        *what = NULL;
}

/* Break one thing, have it reported, and mend it. */
#define REPORTS(what, field, value)                                                                                    \
    do {                                                                                                               \
        uint64_t was_ = (field);                                                                                       \
        (field) = (value);                                                                                             \
        reports(what);                                                                                                 \
        (field) = was_;                                                                                                \
    } while (0)

static void reports(const char *what)
{
    size_t size = sizeof(struct shmq_segment) - offsetof(struct shmq_segment, slot);
    char *before = malloc(size);
    context("looking for a report on %s", what);
    memcpy(before, q->seg->slot, size);
    CHECK_EQ(look_at_all(q, find_line, &what), SHMQ_OK);
    CHECK(what == NULL);
    CHECK(memcmp(before, q->seg->slot, size) == 0); /* changes nothing */
    free(before);
}

static void test_check_reports_each_broken_invariant(void)
{
    q = attach(CAPACITY);
    puts_ok(q, 1, BIG);
    puts_ok(q, 2, 10);
    puts_ok(q, 3, 10);
    claim();
    CHECK_EQ(broken_invariants(q), 0);
    struct shmq_mark_hdr *put = &shmq_side(q, 0)->mark[shmq_side(q, 0)->seq % 2];
    struct shmq_mark_hdr *get = &shmq_side(q, 1)->mark[shmq_side(q, 1)->seq % 2];
    struct shmq_hand_hdr *hand = &q->seg->claims[0];
    uint8_t *record = shmq_ring_at(&q->ring, get->pos);
    REPORTS("bytes in use", put->pos, get->pos - 8);
    REPORTS("bytes in use", put->pos, CAPACITY + 1);
    REPORTS("length of a record", put->pos, get->pos + 5);
    REPORTS("records between get_pos and put_pos", put->count, 7);
    REPORTS("state of a record", record[0], 0);
    REPORTS("state of a record", record[0], SHMQ_ABANDONED + 1);
    REPORTS("length of a record", record[6], 1);
    REPORTS("position in hand", hand->pos1, get->pos + 1);
    REPORTS("end of what is in hand", hand->end, 0);
    REPORTS("end of what is in hand", hand->end, CAPACITY + 1);
    REPORTS("slot of an owner", hand->owner, UINT64_MAX - 1);
    REPORTS("entry above its table's top", shmq_side(q, 1)->top, 0);
    q->seg->claims[5] = *hand;
    shmq_side(q, 1)->top = 6;
    reports("position twice in hand");
    q->seg->claims[5].pos1 = 0;
    CHECK_EQ(broken_invariants(q), 0);
    shmq_free(q);
}

static void test_check_finds_nothing_wrong_with_full_hands(void)
{
    struct shmq_in in[3];
    uint32_t n = 3;
    q = attach(CAPACITY);
    start_at(5 * CAPACITY - 3000);
    pid_t passed = reserve_and_freeze(1);
    puts_ok(q, 2, BIG);
    CHECK_EQ(claim().method, 2);
    pid_t ahead = reserve_and_freeze(3);
    for (uint32_t id = 4; id <= 9; id++)
        puts_ok(q, id, 10);
    gets(q, 4);
    CHECK_EQ(shmq_get_batch_try(q, in, &n), SHMQ_OK);
    shmq_give_back_from(q, in[0].hand, in[1].pos);
    CHECK_EQ(broken_invariants(q), 0);
    kill_child(passed);
    kill_child(ahead);
    CHECK_EQ(broken_invariants(q), 0);
    shmq_free(q);
}

static void test_positions_that_cannot_be_are_named_soon(void)
{
    struct shmq_info info;
    q = attach(CAPACITY);
    puts_ok(q, 1, 10);
    shmq_side(q, 0)->mark[shmq_side(q, 0)->seq % 2].pos = 3 * CAPACITY;
    uint64_t start = shmq_now_ns();
    CHECK_EQ(shmq_info(q, &info), SHMQ_CORRUPT);
    CHECK(shmq_now_ns() - start < UINT64_C(2000000000));
    CHECK_EQ(shmq_fault(q)->found, 3 * CAPACITY);
    CHECK_EQ(shmq_fault(q)->allowed, CAPACITY);
    shmq_free(q);
}

static const struct test tests[] = {
    TEST(test_items_and_bytes_are_counted_through_the_wrap),
    TEST(test_claims_in_hand_are_bytes_but_no_items),
    TEST(test_records_given_back_are_items_again),
    TEST(test_reservations_are_bytes_but_no_items),
    TEST(test_abandoned_reservations_are_no_items_and_go_away),
    TEST(test_passing_that_was_never_published_counts_nothing_twice),
    TEST(test_numbers_fit_together_at_every_instant),
    TEST(test_looking_is_right_while_records_are_in_many_hands),
    TEST(test_lock_holder_is_named_and_check_gives_up_on_it),
    TEST(test_check_reports_each_broken_invariant),
    TEST(test_check_finds_nothing_wrong_with_full_hands),
    TEST(test_positions_that_cannot_be_are_named_soon),
};
RUN_TESTS(tests)
