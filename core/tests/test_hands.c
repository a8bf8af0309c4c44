/* test_hands.c - the tables of records in hand (hands.c). Owners here are plain numbers; who is dead, a test says. */
#include "check.h"

#define N 6

static struct shmq_hand_hdr entries[N];
static _Atomic uint32_t top;
static const struct shmq_hands hands = {entries, N, &top};

static uint64_t dead[3];
static int probes;

static bool is_dead(void *arg, uint64_t owner)
{
    (void)arg;
    probes++;
    return owner == dead[0] || owner == dead[1] || owner == dead[2];
}

static void holds(int i, uint64_t pos, uint64_t end, uint64_t owner)
{
    CHECK_EQ(entries[i].pos1, pos + 1);
    CHECK_EQ(entries[i].end, end);
    CHECK_EQ(entries[i].owner, owner);
}

static void is_free(int i) { CHECK_EQ(entries[i].pos1, 0); }

static void take(int i, uint64_t pos, uint64_t end, uint64_t owner)
{
    CHECK_EQ(shmq_hands_take(&hands, pos, end, owner), i);
    holds(i, pos, end, owner);
}

static void test_take_uses_the_first_free_entry(void)
{
    take(0, 0, 10, 7);
    take(1, 10, 20, 8);
    take(2, 20, 30, 7);
    CHECK_EQ(top, 3);
    shmq_hands_free(&hands, 1);
    is_free(1);
    take(1, 30, 40, 9);
    CHECK_EQ(top, 3);
    holds(0, 0, 10, 7);
    holds(2, 20, 30, 7);
}

static void test_take_is_refused_by_a_full_table(void)
{
    for (int i = 0; i < N; i++)
        take(i, (uint64_t)i, (uint64_t)i + 1, 7);
    CHECK_EQ(shmq_hands_take(&hands, 99, 100, 7), -1);
    CHECK_EQ(top, N);
    shmq_hands_free(&hands, N - 1);
    take(N - 1, 99, 100, 7);
}

static void test_every_claim_is_counted(void)
{
    take(0, 0, 10, 7);
    take(1, 10, 20, 0); /* passed, in nobody's hands */
    CHECK_EQ(entries[0].deliveries, 1);
    CHECK_EQ(entries[1].deliveries, 0);
    shmq_hands_give_back(&hands, 0);
    holds(0, 0, 10, 0);
    shmq_hands_claim(&hands, 0, 8);
    holds(0, 0, 10, 8);
    CHECK_EQ(entries[0].deliveries, 2);
    shmq_hands_free(&hands, 0);
    take(0, 20, 30, 9);
    CHECK_EQ(entries[0].deliveries, 1); /* another record */
}

static void test_run_shrinks_from_its_front_and_ends_free(void)
{
    take(0, 100, 130, 7);
    shmq_hands_advance(&hands, 0, 110);
    holds(0, 110, 130, 7);
    shmq_hands_advance(&hands, 0, 129);
    holds(0, 129, 130, 7);
    shmq_hands_advance(&hands, 0, 130);
    is_free(0);
}

static void test_trim_lowers_top_to_the_last_one_in_use(void)
{
    for (int i = 0; i < 4; i++)
        take(i, (uint64_t)i, (uint64_t)i + 1, 7);
    shmq_hands_free(&hands, 1);
    shmq_hands_free(&hands, 3);
    shmq_hands_trim(&hands);
    CHECK_EQ(top, 3);
    shmq_hands_free(&hands, 2);
    shmq_hands_free(&hands, 0);
    shmq_hands_trim(&hands);
    CHECK_EQ(top, 0);
}

static void test_top_that_cannot_be_is_read_as_the_tables_end(void)
{
    top = 4000000000u;
    CHECK_EQ(shmq_hands_top(&hands), N);
    CHECK_EQ(shmq_hands_lowest(&hands, 5), 5);
    take(0, 0, 10, 7);
    shmq_hands_trim(&hands);
    CHECK_EQ(top, 1);
}

static void test_lowest_position_in_hand(void)
{
    CHECK_EQ(shmq_hands_lowest(&hands, 77), 77);
    take(0, 50, 60, 7);
    take(1, 30, 50, 0); /* in nobody's hands, but not delivered either */
    take(2, 60, 70, 8);
    CHECK_EQ(shmq_hands_lowest(&hands, 77), 30);
    CHECK_EQ(shmq_hands_lowest(&hands, 20), 20);
    shmq_hands_free(&hands, 1);
    CHECK_EQ(shmq_hands_lowest(&hands, 77), 50);
    take(1, 0, 1, 7); /* position 0 is in hand too */
    CHECK_EQ(shmq_hands_lowest(&hands, 77), 0);
}

static void test_split_gives_the_rest_an_entry_of_its_own(void)
{
    take(0, 0, 10, 0);
    take(1, 10, 90, 0);
    shmq_hands_claim(&hands, 1, 8);
    shmq_hands_give_back(&hands, 1);
    CHECK(shmq_hands_split(&hands, 1, 30, 7));
    holds(1, 10, 30, 0);
    holds(2, 30, 90, 0);
    CHECK_EQ(entries[2].deliveries, entries[1].deliveries);
    for (int i = 3; i < N; i++)
        take(i, 100 + (uint64_t)i, 101 + (uint64_t)i, 7);
    CHECK(!shmq_hands_split(&hands, 2, 40, 7)); /* no entry is left */
    holds(2, 30, 90, 0);
}

static void test_take_over_voids_what_the_dead_had_begun(void)
{
    take(0, 90, 100, 7);
    take(1, 100, 120, 7); /* at the published position */
    take(2, 0, 90, 0);
    take(3, 5000, 5100, 0);
    shmq_hands_void(&hands, 100);
    holds(0, 90, 100, 7);
    is_free(1);
    holds(2, 0, 90, 0);
    is_free(3);
}

static void test_take_over_voids_the_rest_of_a_split_that_was_not_finished(void)
{
    take(0, 20, 60, 7);
    take(1, 0, 20, 0);
    take(2, 60, 90, 0);
    take(3, 30, 60, 7); /* the same end: begun, while entry 0 still has all of it */
    shmq_hands_void(&hands, 100);
    holds(0, 20, 60, 7);
    holds(1, 0, 20, 0);
    holds(2, 60, 90, 0);
    is_free(3);
}

static void test_sweep_gives_back_the_claims_of_the_dead(void)
{
    dead[0] = 8;
    take(0, 0, 10, 7);
    take(1, 10, 20, 8);
    take(2, 20, 30, 0);
    take(3, 30, 60, 8);
    take(4, 60, 70, 8);
    shmq_hands_free(&hands, 4);
    CHECK(shmq_hands_sweep_claims(&hands, is_dead, NULL));
    holds(0, 0, 10, 7);
    holds(1, 10, 20, 0);
    holds(2, 20, 30, 0);
    holds(3, 30, 60, 0);
    is_free(4);
    CHECK(!shmq_hands_sweep_claims(&hands, is_dead, NULL));
}

static void test_sweep_asks_once_about_claims_of_one_owner(void)
{
    dead[0] = 8;
    for (int i = 0; i < N; i++)
        take(i, (uint64_t)i, (uint64_t)i + 1, 8);
    shmq_hands_sweep_claims(&hands, is_dead, NULL);
    CHECK_EQ(probes, 1);
    for (int i = 0; i < N; i++)
        shmq_hands_claim(&hands, i, 7);
    shmq_hands_sweep_claims(&hands, is_dead, NULL);
    CHECK_EQ(probes, 2);
}

/* A ring of which only states matter. */
static uint8_t bytes[256];
static const struct shmq_ring ring = {bytes, 128, 127};

static void test_sweep_abandons_the_reservations_of_the_dead(void)
{
    dead[0] = 8;
    static const uint8_t states[N] = {SHMQ_RESERVED,  SHMQ_RESERVED, SHMQ_COMMITTED,
                                      SHMQ_ABANDONED, 0x55,          SHMQ_RESERVED};
    for (int i = 0; i < N; i++) {
        take(i, 128 + (uint64_t)i * 16, 144 + (uint64_t)i * 16, i == 0 ? 7 : 8);
        bytes[i * 16] = states[i];
    }
    CHECK(shmq_hands_sweep_reservations(&hands, &ring, 128, is_dead, NULL));
    holds(0, 128, 144, 7); /* its owner lives */
    CHECK_EQ(bytes[0], SHMQ_RESERVED);
    holds(1, 144, 160, 0);
    CHECK_EQ(bytes[16], SHMQ_ABANDONED);
    is_free(2); /* it died after its commit, before it freed the entry */
    CHECK_EQ(bytes[32], SHMQ_COMMITTED);
    holds(3, 176, 192, 0); /* an earlier sweep died half-way */
    CHECK_EQ(bytes[48], SHMQ_ABANDONED);
    holds(4, 192, 208, 0);
    CHECK_EQ(bytes[64], SHMQ_ABANDONED);
    holds(5, 208, 224, 0);
    CHECK(!shmq_hands_sweep_reservations(&hands, &ring, 128, is_dead, NULL));
}

static void test_sweep_leaves_the_bytes_of_records_already_gone_alone(void)
{
    dead[0] = 8;
    take(0, 128, 144, 8); /* delivered, and its room may be another's */
    take(1, 144, 160, 8);
    bytes[0] = bytes[16] = SHMQ_RESERVED;
    CHECK(shmq_hands_sweep_reservations(&hands, &ring, 144, is_dead, NULL));
    is_free(0);
    CHECK_EQ(bytes[0], SHMQ_RESERVED);
    holds(1, 144, 160, 0);
    CHECK_EQ(bytes[16], SHMQ_ABANDONED);
}

static void test_abandoned_reservations_settle_once_get_pos_has_passed(void)
{
    take(0, 0, 10, 0);
    take(1, 10, 20, 7);
    take(2, 20, 30, 0);
    shmq_hands_settle_reservations(&hands, 20);
    is_free(0);
    holds(1, 10, 20, 7);
    holds(2, 20, 30, 0);
    shmq_hands_settle_reservations(&hands, 21);
    is_free(2);
}

static void take_and_die(void *arg)
{
    arm();
    shmq_hands_take(arg, 100, 110, 7);
}

static void test_beginning_that_died_is_free_or_void(void)
{
    static const char *const spots[] = {"hands:prepared", "hands:taken"};
    for (int i = 0; i < 2; i++) {
        struct shmq_hand_hdr *table = shared_bytes(N * sizeof *table + 4);
        struct shmq_hands shared = {table, N, (_Atomic uint32_t *)(table + N)};
        plan(SIGKILL, 0, spots[i]);
        child_was_killed(start_child(take_and_die, &shared));
        CHECK_EQ(table[0].pos1, i == 0 ? 0 : 101);
        shmq_hands_void(&shared, 100);
        CHECK_EQ(table[0].pos1, 0);
        CHECK_EQ(shmq_hands_take(&shared, 100, 120, 9), 0);
        shmq_hands_trim(&shared);
        CHECK_EQ(*shared.top, 1);
    }
}

/* ---- threads: what free_pos says is free, nobody reads any more */

#define ROUNDS 60000u
#define CELLS 16u

static struct shmq_side_hdr put_side, get_side;
static pthread_mutex_t consuming = PTHREAD_MUTEX_INITIALIZER;
static uint64_t cells[CELLS];

/* Claims a cell under the lock, reads it outside, and lets go without a lock. */
static void *consume_cells(void *arg)
{
    struct shmq_mark put;
    uint64_t seq;
    for (;;) {
        pthread_mutex_lock(&consuming);
        struct shmq_mark get = shmq_side_mark(&get_side);
        CHECK(shmq_side_read(&put_side, &put, &seq));
        int32_t hand = -1;
        shmq_hands_trim(&hands);
        if (get.pos < put.pos && (hand = shmq_hands_take(&hands, get.pos, get.pos + 1, 7)) >= 0)
            shmq_side_publish(&get_side, (struct shmq_mark){get.pos + 1, 0});
        pthread_mutex_unlock(&consuming);
        if (hand >= 0) {
            CHECK_EQ(cells[get.pos % CELLS], get.pos);
            shmq_hands_free(&hands, hand);
        } else if (get.pos == ROUNDS) {
            return arg;
        } else {
            sched_yield();
        }
    }
}

static void test_room_is_free_only_when_its_last_reader_has_let_go(void)
{
    pthread_t consumers[3];
    struct shmq_mark get;
    uint64_t seq;
    for (int i = 0; i < 3; i++)
        CHECK_EQ(pthread_create(&consumers[i], NULL, consume_cells, NULL), 0);
    for (uint64_t pos = 0; pos < ROUNDS;) {
        CHECK(shmq_side_read(&get_side, &get, &seq));
        uint64_t free_pos = shmq_hands_lowest(&hands, get.pos);
        CHECK(free_pos <= pos && pos - free_pos <= CELLS);
        if (pos - free_pos == CELLS)
            sched_yield();
        for (; pos - free_pos < CELLS && pos < ROUNDS; pos++)
            cells[pos % CELLS] = pos;
        shmq_side_publish(&put_side, (struct shmq_mark){pos, 0});
    }
    for (int i = 0; i < 3; i++)
        pthread_join(consumers[i], NULL);
    CHECK_EQ(shmq_hands_lowest(&hands, ROUNDS), ROUNDS);
}

/* While the sweeper asks, the owner comes to the end of its put and leaves. */
static bool is_dead_after_its_end(void *arg, uint64_t owner)
{
    (void)arg;
    (void)owner;
    shmq_hands_free(&hands, 0);
    return true;
}

static void test_sweep_leaves_the_ring_alone_when_a_put_ends_as_it_asks(void)
{
    uint8_t bytes[128], before[128];
    const struct shmq_ring ring = {bytes, 64, 63};
    memset(bytes, 0x55, sizeof bytes);
    memcpy(before, bytes, sizeof bytes);
    take(0, 0, 20, 8);
    shmq_hands_sweep_reservations(&hands, &ring, 0, is_dead_after_its_end, NULL);
    is_free(0);
    CHECK_EQ(memcmp(bytes, before, sizeof bytes), 0);
}

static const struct test tests[] = {
    TEST(test_take_uses_the_first_free_entry),
    TEST(test_take_is_refused_by_a_full_table),
    TEST(test_every_claim_is_counted),
    TEST(test_run_shrinks_from_its_front_and_ends_free),
    TEST(test_trim_lowers_top_to_the_last_one_in_use),
    TEST(test_top_that_cannot_be_is_read_as_the_tables_end),
    TEST(test_lowest_position_in_hand),
    TEST(test_split_gives_the_rest_an_entry_of_its_own),
    TEST(test_take_over_voids_what_the_dead_had_begun),
    TEST(test_take_over_voids_the_rest_of_a_split_that_was_not_finished),
    TEST(test_sweep_gives_back_the_claims_of_the_dead),
    TEST(test_sweep_asks_once_about_claims_of_one_owner),
    TEST(test_sweep_abandons_the_reservations_of_the_dead),
    TEST(test_sweep_leaves_the_bytes_of_records_already_gone_alone),
    TEST(test_abandoned_reservations_settle_once_get_pos_has_passed),
    TEST(test_beginning_that_died_is_free_or_void),
    TEST(test_room_is_free_only_when_its_last_reader_has_let_go),
    TEST(test_sweep_leaves_the_ring_alone_when_a_put_ends_as_it_asks),
};
RUN_TESTS(tests)
