/* test_queue_corrupt.c - segments in which a peer's bug has written: whatever stands there, a call ends soon, with a
 * status, and touches nothing but the segment. CHECK_SEED repeats a run. */
#include "check.h"

#define PAGE port_page_size()
#define CAPACITY (5 * PAGE)
#define BIG (SHMQ_SMALL + 500)
#define ROUNDS 1000

static struct shmq *q;
static uint64_t seed;

static uint32_t random_below(uint32_t n)
{
    seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % n;
}

static void begin_seed(void)
{
    const char *given = getenv("CHECK_SEED");
    if (given != NULL)
        seed = strtoull(given, NULL, 0);
    else
        CHECK_EQ(port_random(&seed, sizeof seed), 0);
}

/* ---- a queue in the middle of its life: items, a claim, a batch given back, a reservation that was passed and one
 * ahead */

static void reserve(uint32_t len)
{
    struct shmq_side_hdr *side = shmq_side(q, SHMQ_PRODUCING);
    CHECK_EQ(shmq_enter_side(q, SHMQ_PRODUCING, in_ms(STATE_MS)), SHMQ_OK);
    struct shmq_mark mark = shmq_side_mark(side);
    struct shmq_record record = {mark.pos, len, 7};
    CHECK(shmq_hands_take(&q->reservations, mark.pos, mark.pos + 8 + len, q->self) >= 0);
    shmq_ring_begin(&q->ring, &record, SHMQ_RESERVED);
    shmq_side_publish(side, (struct shmq_mark){mark.pos + 8 + len, mark.count + 1});
    shmq_leave_side(q, SHMQ_PRODUCING);
}

static void make_queue(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in[3];
    uint32_t n = 3;
    q = attach(CAPACITY);
    for (int side = 0; side < 2; side++)
        shmq_side_publish(shmq_side(q, side), (struct shmq_mark){9 * CAPACITY - 5000, 1000});
    reserve(100);
    puts_ok(q, 1, BIG);
    CHECK(shmq_get_try(q, scratch, in) == SHMQ_OK && in->hand >= 0);
    for (uint32_t id = 2; id <= 6; id++)
        puts_ok(q, id, id * 10);
    CHECK_EQ(shmq_get_batch_try(q, in, &n), SHMQ_OK);
    shmq_give_back_from(q, in[0].hand, in[1].pos);
    reserve(200);
    puts_ok(q, 7, 0);
    puts_ok(q, 8, BIG);
}

/* ---- what a bug may write */

/* Pieces of the segment worth breaking; `size` of a field in it. */
static const struct {
    const char *name;
    size_t offset, len;
} regions[] = {
    {"producing side", offsetof(struct shmq_segment, side), 60},
    {"consuming side", offsetof(struct shmq_segment, side) + sizeof(struct shmq_side_hdr), 60},
    {"waiters", offsetof(struct shmq_segment, waiters), 24},
    {"slots", offsetof(struct shmq_segment, slot), 4 * sizeof(struct shmq_slot_hdr)},
    {"reservations", offsetof(struct shmq_segment, reservations), 6 * sizeof(struct shmq_hand_hdr)},
    {"claims", offsetof(struct shmq_segment, claims), 8 * sizeof(struct shmq_hand_hdr)},
    {"all of the tables", offsetof(struct shmq_segment, slot),
     sizeof(struct shmq_segment) - offsetof(struct shmq_segment, slot)},
    {"ring", sizeof(struct shmq_segment), 0}, /* resolved below */
};
#define N_REGIONS (sizeof regions / sizeof *regions)

/* A value such as bugs write: bits, small numbers, positions a bit off, all ones. */
static uint64_t bad_value(uint64_t was)
{
    switch (random_below(7)) {
    case 0:
        return (uint64_t)random_below(UINT32_MAX) << 32 | random_below(UINT32_MAX);
    case 1:
        return was ^ UINT64_C(1) << random_below(64);
    case 2:
        return random_below(4);
    case 3:
        return UINT64_MAX - random_below(3);
    case 4:
        return was + random_below(64) - 32;
    case 5:
        return was + random_below(4 * (uint32_t)CAPACITY) - 2 * CAPACITY;
    default:
        return 9 * CAPACITY - 5000 + random_below((uint32_t)CAPACITY);
    }
}

static void break_word(uint8_t *base, size_t offset)
{
    uint64_t word;
    memcpy(&word, base + offset, 8);
    word = bad_value(word);
    memcpy(base + offset, &word, 8);
}

static void break_something(size_t region)
{
    uint8_t *base = (uint8_t *)q->seg;
    if (regions[region].len == 0) { /* a header in the ring, mostly the one at get_pos */
        uint64_t pos = shmq_side_mark(shmq_side(q, SHMQ_CONSUMING)).pos;
        for (int i = 0; i < 4; i++)
            break_word(shmq_ring_at(&q->ring, i == 0 ? pos : pos + random_below((uint32_t)CAPACITY)), 0);
        return;
    }
    size_t start = regions[region].offset, len = regions[region].len;
    uint32_t n = 1 + random_below(4);
    if (random_below(8) == 0)
        memset(base + start, random_below(2) ? 0xff : (int)random_below(256), len);
    else
        for (uint32_t i = 0; i < n; i++)
            break_word(base, start + random_below((uint32_t)(len / 8)) * 8);
}

/* ---- what must hold */

static uint64_t began_ns;

/* The status is one that may be, and the call took no longer than waiting for a lock may. */
static int ends(const char *call, int rc)
{
    static const int allowed[] = {SHMQ_OK,   SHMQ_FULL, SHMQ_EMPTY,   SHMQ_TOO_BIG,
                                  SHMQ_BUSY, SHMQ_INTR, SHMQ_CORRUPT, SHMQ_SYSTEM};
    bool is_allowed = false;
    uint64_t now = shmq_now_ns();
    for (size_t i = 0; i < sizeof allowed / sizeof *allowed; i++)
        is_allowed = is_allowed || rc == allowed[i];
    if (!is_allowed || now - began_ns > UINT64_C(2000000000))
        check_failed(__FILE__, __LINE__, call, rc, (intmax_t)(now - began_ns));
    began_ns = now;
    return rc;
}

static uint64_t sum; /* of every byte that a call said to be a payload */

static void read_all(const struct shmq_in *in)
{
    CHECK(in->len <= CAPACITY);
    for (uint32_t i = 0; i < in->len; i++)
        sum += in->payload[i];
}

static void try_gets(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in[SHMQ_MAX_BATCH];
    uint32_t n = SHMQ_MAX_BATCH;
    if (ends("get_batch_try", shmq_get_batch_try(q, in, &n)) == SHMQ_OK) {
        CHECK(n >= 1 && n <= SHMQ_MAX_BATCH);
        for (uint32_t i = 0; i < n; i++)
            read_all(&in[i]);
        if (random_below(2))
            shmq_release(q, in[0].hand);
        else
            shmq_give_back_from(q, in[0].hand, in[n / 2].pos);
        ends("release", SHMQ_OK);
    }
    for (int i = 0; i < 3; i++) {
        int rc = i == 0 ? shmq_get_try(q, scratch, in) : shmq_get_wait(q, scratch, in, in_ms(i));
        if (ends("get", rc) != SHMQ_OK)
            continue;
        read_all(in);
        if (in->hand >= 0 && random_below(2))
            shmq_release(q, in->hand);
        free(in->heap);
    }
}

static void try_puts(void)
{
    static const size_t len[] = {0, 50, BIG, 4 * 4096};
    static uint8_t payload[4 * 4096];
    uint32_t n;
    for (int i = 0; i < 4; i++) {
        struct shmq_part part = {payload, len[i]};
        struct shmq_out out = shmq_out(&part, 1, 0, false);
        if (i == 0)
            ends("put_try", shmq_put_try(q, &out, 1, &n));
        else
            ends("put_wait", shmq_put_wait(q, &out, 1, &n, i == 3 ? in_ms(1) : 0));
    }
}

static void ignore(void *arg, const char *line)
{
    (void)arg;
    CHECK(strlen(line) < 200);
}

static void try_everything(void)
{
    struct shmq_info info;
    struct shmq_fault fault;
    struct shmq *other;
    began_ns = shmq_now_ns();
    ends("info", shmq_info(q, &info));
    ends("check", look_at_all(q, ignore, NULL));
    for (int round = 0; round < 2; round++) {
        try_puts();
        try_gets();
    }
    shmq_refs(q);
    shmq_ref_drop(q);
    shmq_lock_pid(q, SHMQ_PRODUCING);
    shmq_lock_pid(q, SHMQ_CONSUMING);
    ends("looking", SHMQ_OK);
    if (random_below(32) == 0) { /* a call without a deadline comes back all the same, to look for signals */
        uint8_t scratch[SHMQ_SMALL];
        struct shmq_in in = {0};
        struct shmq_part part = {scratch, 8};
        struct shmq_out out = shmq_out(&part, 1, 0, false);
        uint32_t n;
        ends("get_wait", shmq_get_wait(q, scratch, &in, SHMQ_FOREVER));
        free(in.heap);
        ends("put_wait", shmq_put_wait(q, &out, 1, &n, SHMQ_FOREVER));
    }
    ends("clear", shmq_clear(q, in_ms(1)));
    try_puts();
    ends("info", shmq_info(q, &info));
    if (random_below(8) == 0 && ends("open", open_queue(&other, check_path, PAGE, 0600, &fault)) == SHMQ_OK)
        shmq_free(other);
    ends("open", SHMQ_OK);
}

static void test_random_values_anywhere_cost_a_status_and_never_more(void)
{
    begin_seed();
    uint64_t first = seed;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        size_t region = round % N_REGIONS;
        context("CHECK_SEED=%" PRIu64 " round %u, %s", first, round, regions[region].name);
        make_queue();
        break_something(region);
        try_everything();
        shmq_free(q);
        unlink(check_path); /* where a broken slot seems alive to it */
    }
}

static void test_entry_of_all_ones_does_not_keep_a_getter_awake(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    q = attach(CAPACITY);
    memset(&q->seg->claims[0], 0xff, sizeof q->seg->claims[0]);
    q->seg->claims[0].owner = 0;
    shmq_side(q, SHMQ_CONSUMING)->top = 1;
    *shmq_ring_at(&q->ring, UINT64_MAX - 1) = SHMQ_COMMITTED;
    alarm(10);
    began_ns = shmq_now_ns();
    CHECK(ends("get_wait", shmq_get_wait(q, scratch, &in, SHMQ_FOREVER)) != SHMQ_OK);
    shmq_free(q);
}

/* ---- garbage in lock words, one by one */

static void test_lock_word_that_names_nobody_alive_is_taken_over(void)
{
    struct shmq *other = attach(CAPACITY);
    q = attach(CAPACITY);
    uint64_t gone = other->self;
    shmq_free(other);
    const uint64_t words[] = {SHMQ_CONTENDED,        UINT64_MAX, UINT64_MAX - 1,
                              UINT64_C(1) << 63,     gone,       gone | SHMQ_CONTENDED,
                              shmq_owner_of(5, 400), 0xfffff000};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        for (int side = 0; side < 2; side++) {
            context("word %zu", i);
            shmq_side(q, side)->lock = words[i];
            puts_ok(q, 1, 10);
            gets(q, 1);
            CHECK_EQ(shmq_side(q, side)->lock, 0);
        }
    shmq_free(q);
}

static void test_lock_word_that_names_somebody_alive_is_busy_and_no_more(void)
{
    struct shmq *other = attach(CAPACITY);
    uint32_t id;
    q = attach(CAPACITY);
    shmq_side(q, SHMQ_PRODUCING)->lock = other->self;
    CHECK_EQ(item_put(q, 1, 10, 60), SHMQ_BUSY);
    CHECK_EQ(item_get(q, &id, 0), SHMQ_EMPTY);
    shmq_free(other); /* and gone with it */
    puts_ok(q, 1, 10);
    gets(q, 1);
    shmq_free(q);
}

/* ---- positions and lengths, one by one */

static void reads(int rc)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    CHECK_EQ(shmq_get_try(q, scratch, &in), rc);
}

static void test_each_broken_value_is_named(void)
{
    struct shmq_part part = {"x", 1};
    struct shmq_out out = shmq_out(&part, 1, 0, false);
    uint32_t n;
    q = attach(CAPACITY);
    puts_ok(q, 1, 100);
    struct shmq_mark_hdr *put = &shmq_side(q, 0)->mark[shmq_side(q, 0)->seq % 2];
    struct shmq_mark_hdr *get = &shmq_side(q, 1)->mark[shmq_side(q, 1)->seq % 2];
    uint8_t *record = shmq_ring_at(&q->ring, 0);
    put->pos = CAPACITY + 1;
    reads(SHMQ_CORRUPT);
    CHECK(strcmp(shmq_fault(q)->what, "put_pos - get_pos") == 0 && shmq_fault(q)->found == CAPACITY + 1);
    CHECK_EQ(shmq_put_try(q, &out, 1, &n), SHMQ_CORRUPT);
    CHECK(strcmp(shmq_fault(q)->what, "put_pos - free_pos") == 0);
    put->pos = 108;
    q->put_seen = q->free_seen = 0;
    get->pos = 109;
    reads(SHMQ_CORRUPT);
    get->pos = 0;
    record[0] = 0;
    reads(SHMQ_CORRUPT);
    CHECK(strcmp(shmq_fault(q)->what, "state of a record") == 0);
    record[0] = SHMQ_COMMITTED;
    record[4] = 101;
    reads(SHMQ_CORRUPT);
    CHECK(strcmp(shmq_fault(q)->what, "length of a record") == 0 && shmq_fault(q)->found == 101 &&
          shmq_fault(q)->allowed == 108);
    record[4] = 100;
    gets(q, 1);
    shmq_free(q);
}

static void test_position_that_was_mended_is_forgotten(void)
{
    q = attach(CAPACITY);
    struct shmq_mark_hdr *put = &shmq_side(q, SHMQ_PRODUCING)->mark[0], *get = &shmq_side(q, SHMQ_CONSUMING)->mark[0];
    put->pos = UINT64_C(1) << 60;
    reads(SHMQ_CORRUPT);
    get->pos = put->pos - 100; /* the two fit together, so that the bound is kept */
    *shmq_ring_at(&q->ring, get->pos) = 0;
    reads(SHMQ_CORRUPT);
    put->pos = get->pos = 0;
    reads(SHMQ_EMPTY);
    puts_ok(q, 1, 100);
    gets(q, 1);
    shmq_free(q);
}

/* get_many() without a number asks for as many as there are: a count that no ring can hold is none. */
static void test_counts_that_no_ring_can_hold_are_named(void)
{
    struct shmq_info info;
    q = attach(CAPACITY);
    puts_ok(q, 1, 100);
    _Atomic uint64_t *count = &shmq_side(q, SHMQ_PRODUCING)->mark[1].count;
    const uint64_t counts[] = {UINT64_MAX, INT64_MAX, UINT64_C(1) << 40, 108 / 8 + 1};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        *count = counts[i];
        CHECK_EQ(shmq_info(q, &info), SHMQ_CORRUPT);
        CHECK(strcmp(shmq_fault(q)->what, "records between get_pos and put_pos") == 0);
        CHECK(shmq_fault(q)->found == counts[i] && shmq_fault(q)->allowed == 108 / 8);
    }
    *count = 0;
    reserve(10);
    shmq_side(q, SHMQ_PRODUCING)->mark[0].count = 0;
    CHECK_EQ(shmq_info(q, &info), SHMQ_CORRUPT);
    CHECK(strcmp(shmq_fault(q)->what, "reservations between get_pos and put_pos") == 0);
    shmq_free(q);
}

static _Atomic bool is_over;

static void *publish(void *arg)
{
    struct shmq_side_hdr *side = shmq_side(q, SHMQ_CONSUMING);
    while (!is_over)
        side->seq += 2;
    return arg;
}

static void test_status_of_a_full_table_that_never_holds_still_comes_soon(void)
{
    pthread_t thread;
    struct shmq_info info;
    q = attach(CAPACITY);
    for (int side = 0; side < 2; side++)
        shmq_side_publish(shmq_side(q, side), (struct shmq_mark){CAPACITY, 0});
    for (uint32_t i = 0; i < SHMQ_H_ENTRIES; i++)
        CHECK(shmq_hands_take(&q->claims, 0, CAPACITY, 0) >= 0);
    for (uint64_t pos = 0; pos < CAPACITY; pos += 8)
        *shmq_ring_at(&q->ring, pos) = SHMQ_COMMITTED;
    CHECK_EQ(pthread_create(&thread, NULL, publish, NULL), 0);
    while (shmq_side(q, SHMQ_CONSUMING)->seq < 1000)
        sched_yield();
    began_ns = shmq_now_ns();
    CHECK_EQ(ends("info", shmq_info(q, &info)), SHMQ_OK);
    is_over = true;
    pthread_join(thread, NULL);
    shmq_free(q);
}

static const struct test tests[] = {
    TEST(test_random_values_anywhere_cost_a_status_and_never_more),
    TEST(test_entry_of_all_ones_does_not_keep_a_getter_awake),
    TEST(test_lock_word_that_names_nobody_alive_is_taken_over),
    TEST(test_lock_word_that_names_somebody_alive_is_busy_and_no_more),
    TEST(test_each_broken_value_is_named),
    TEST(test_position_that_was_mended_is_forgotten),
    TEST(test_counts_that_no_ring_can_hold_are_named),
    TEST(test_status_of_a_full_table_that_never_holds_still_comes_soon),
};
RUN_TESTS(tests)
