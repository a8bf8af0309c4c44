/* test_ring.c - records in a circle of bytes (ring.c, ring.h), and the marks that publish them (side.h). */
#include "check.h"

/* A ring mapped twice, as in a segment; `capacity` in pages. */
static struct shmq_ring make_ring(uint64_t pages)
{
    uint64_t page = port_page_size(), capacity = pages * page;
    void *base;
    int fd = memfd_create("ring", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)(page + capacity)) == 0);
    CHECK_EQ(port_map(fd, page, capacity, &base), 0);
    port_close(fd);
    return (struct shmq_ring){(uint8_t *)base + page, capacity, (capacity & (capacity - 1)) == 0 ? capacity - 1 : 0};
}

static void drop_ring(const struct shmq_ring *ring)
{
    port_unmap(ring->base - port_page_size(), port_page_size(), ring->capacity);
}

/* Write a committed record of one part. */
static void write_item(const struct shmq_ring *ring, uint64_t pos, uint32_t id, size_t len)
{
    uint8_t *payload = malloc(len + 1);
    item_fill(payload, id, len);
    struct shmq_part part = {payload, len};
    struct shmq_out out = shmq_out(&part, 1, id, false);
    struct shmq_record record = {pos, (uint32_t)len, id};
    CHECK_EQ(out.size, len + 8);
    shmq_ring_begin(ring, &record, SHMQ_COMMITTED);
    shmq_ring_fill(ring, pos, &out);
    free(payload);
}

/* Read it back, its bytes also one by one at their offsets in the first copy of the ring. */
static void read_item(const struct shmq_ring *ring, uint64_t pos, uint32_t id, size_t len)
{
    struct shmq_record r;
    CHECK_EQ(shmq_ring_state(ring, pos), SHMQ_COMMITTED);
    CHECK(shmq_ring_read(ring, pos, pos + 8 + len, &r));
    CHECK(r.pos == pos && r.len == len && r.method == id);
    const uint8_t *payload = shmq_ring_payload(ring, pos);
    item_check(payload, id, len);
    for (size_t i = 0; i < len; i++)
        CHECK_EQ(ring->base[(pos + 8 + i) % ring->capacity], payload[i]);
}

static void test_header_is_one_little_endian_word(void)
{
    struct shmq_ring ring = make_ring(1);
    struct shmq_record record = {24, 0x04030201, 0xabcdef}, r;
    static const uint8_t expected[8] = {SHMQ_RESERVED, 0xef, 0xcd, 0xab, 1, 2, 3, 4};
    shmq_ring_begin(&ring, &record, SHMQ_RESERVED);
    CHECK(memcmp(ring.base + 24, expected, 8) == 0);
    CHECK(!shmq_ring_read(&ring, 24, 24 + ring.capacity, &r));
    CHECK(r.len == 0x04030201 && r.method == 0xabcdef);
    drop_ring(&ring);
}

static void test_record_wraps_into_the_mirror_at_any_offset(void)
{
    for (uint64_t pages = 1; pages <= 3; pages++) {
        struct shmq_ring ring = make_ring(pages);
        for (uint64_t pos = ring.capacity - 64; pos < ring.capacity + 8; pos++) {
            context("capacity %" PRIu64 ", position %" PRIu64, ring.capacity, pos);
            write_item(&ring, pos, (uint32_t)pos, 40);
            read_item(&ring, pos, (uint32_t)pos, 40);
        }
        drop_ring(&ring);
    }
}

static void test_same_offset_in_every_lap(void)
{
    for (uint64_t pages = 1; pages <= 3; pages++) {
        struct shmq_ring ring = make_ring(pages);
        for (uint64_t lap = 1; lap < UINT64_C(1) << 50; lap = lap * 3 + 1)
            CHECK(shmq_ring_at(&ring, lap * ring.capacity + 77) == ring.base + 77);
        drop_ring(&ring);
    }
}

static void test_large_parts_around_the_caches(void)
{
    struct shmq_ring ring = make_ring(5000);
    CHECK(ring.capacity > 16 << 20);
    for (uint64_t pos = 0; pos < 70; pos += 23)
        for (size_t len = (256 << 10) - 1; len <= (256 << 10) + 130; len += 13) {
            context("position %" PRIu64 ", length %zu", pos, len);
            write_item(&ring, pos, (uint32_t)len, len);
            read_item(&ring, pos, (uint32_t)len, len);
        }
    write_item(&ring, ring.capacity - 1000, 5, 300000);
    read_item(&ring, ring.capacity - 1000, 5, 300000);
    drop_ring(&ring);
}

static void test_exact_fit_takes_every_byte(void)
{
    struct shmq_ring ring = make_ring(3);
    for (uint64_t pos = 5; pos < 2 * ring.capacity; pos += ring.capacity / 7) {
        write_item(&ring, pos, 9, ring.capacity - 8);
        read_item(&ring, pos, 9, ring.capacity - 8);
    }
    drop_ring(&ring);
}

static void test_records_of_all_lengths_lie_one_after_the_other(void)
{
    struct shmq_ring ring = make_ring(1);
    uint64_t start = ring.capacity - 100, end = start;
    for (uint32_t len = 0; len < 70; end += 8 + len++)
        write_item(&ring, end, len, len);
    CHECK(end - start <= ring.capacity);
    for (uint32_t len = 0; len < 70; start += 8 + len++)
        read_item(&ring, start, len, len);
    CHECK_EQ(start, end);
    drop_ring(&ring);
}

static void test_length_beyond_the_limit_is_refused(void)
{
    struct shmq_ring ring = make_ring(1);
    struct shmq_record r;
    write_item(&ring, 4000, 1, 200);
    CHECK(shmq_ring_read(&ring, 4000, 4208, &r));
    CHECK(!shmq_ring_read(&ring, 4000, 4207, &r));
    CHECK(!shmq_ring_read(&ring, 4000, 4000, &r));
    CHECK(!shmq_ring_read(&ring, 4000, 3999, &r)); /* a limit before it */
    CHECK(!shmq_ring_read(&ring, 4000, 4000 + ring.capacity + 1, &r));
    CHECK(shmq_ring_read(&ring, 4000, 4000 + ring.capacity, &r));
    memset(shmq_ring_at(&ring, 4000) + 4, 0xff, 4); /* 4 GiB */
    CHECK(!shmq_ring_read(&ring, 4000, 4000 + ring.capacity, &r));
    CHECK_EQ(r.len, UINT32_MAX);
    drop_ring(&ring);
}

static void test_state_is_a_byte_of_its_own(void)
{
    struct shmq_ring ring = make_ring(1);
    uint64_t pos = ring.capacity - 1; /* of which only this byte lies before the end */
    struct shmq_record record = {pos, 3, 0x112233}, r;
    shmq_ring_begin(&ring, &record, SHMQ_RESERVED);
    for (enum shmq_state state = SHMQ_RESERVED; state <= SHMQ_ABANDONED; state++) {
        shmq_ring_set_state(&ring, pos, state);
        CHECK_EQ(shmq_ring_state(&ring, pos), state);
        CHECK(shmq_ring_read(&ring, pos, pos + 11, &r) && r.len == 3 && r.method == 0x112233);
    }
    drop_ring(&ring);
}

static void test_parts_follow_each_other(void)
{
    struct shmq_ring ring = make_ring(1);
    uint8_t payload[100];
    item_fill(payload, 5, sizeof payload);
    struct shmq_part parts[] = {{payload, 1}, {payload + 1, 0}, {payload + 1, 30}, {payload + 31, 69}, {payload, 0}};
    struct shmq_out out = shmq_out(parts, 5, 5, false);
    CHECK_EQ(out.size, 108);
    shmq_ring_fill(&ring, ring.capacity - 50, &out);
    item_check(shmq_ring_payload(&ring, ring.capacity - 50), 5, sizeof payload);
    drop_ring(&ring);
}

static void test_aligned_parts_begin_at_multiples_and_stay_inside(void)
{
    struct shmq_ring ring = make_ring(1);
    uint8_t payload[300];
    item_fill(payload, 6, sizeof payload);
    struct shmq_part parts[] = {{payload, 13}, {payload, 64}, {payload, 0}, {payload, 100}};
    struct shmq_out out = shmq_out(parts, 4, 6, true);
    CHECK_EQ(out.size, 8 + 13 + 64 + 100 + 3 * 63);
    for (uint64_t pos = ring.capacity - 300; pos < ring.capacity + 64; pos++) {
        context("position %" PRIu64, pos);
        memset(ring.base, 0xee, ring.capacity);
        shmq_ring_fill(&ring, pos, &out);
        const uint8_t *at = shmq_ring_payload(&ring, pos);
        for (int i = 0; i < 4; at += parts[i++].len) {
            at += i > 0 ? -(uintptr_t)at % SHMQ_ALIGN : 0;
            CHECK(memcmp(at, payload, parts[i].len) == 0);
        }
        CHECK(at <= shmq_ring_at(&ring, pos) + out.size);
        CHECK_EQ(ring.base[(pos + out.size) % ring.capacity], 0xee);
        CHECK_EQ(ring.base[(pos + 7) % ring.capacity], 0xee); /* the header is the caller's */
    }
    drop_ring(&ring);
}

static void test_sizes_never_wrap(void)
{
    struct shmq_part parts[] = {{"", UINT32_MAX}, {"", UINT32_MAX}, {"", SIZE_MAX}, {"", SIZE_MAX - 8}};
    CHECK_EQ(shmq_out(parts, 0, 0, true).size, 8);
    CHECK_EQ(shmq_out(parts, 1, 0, true).size, UINT64_C(8) + UINT32_MAX);
    for (uint32_t n = 2; n <= 4; n++)
        CHECK(shmq_out(parts, n, 0, false).size > UINT64_C(1) << 46);
    CHECK(shmq_out(parts + 2, 2, 0, true).size > UINT64_C(1) << 46);
    struct shmq_part two[] = {{"", UINT32_MAX - 62}, {"", 0}};
    CHECK(shmq_out(two, 2, 0, true).size > UINT64_C(1) << 46); /* the pads count */
}

/* ---- marks */

#define ROUNDS 1000000u

static struct shmq_side_hdr side;

static void *publish_marks(void *arg)
{
    for (uint64_t i = 1; i <= ROUNDS; i++)
        shmq_side_publish(&side, (struct shmq_mark){i, i * 3});
    return arg;
}

static void *read_marks(void *arg)
{
    struct shmq_mark mark = {0, 0};
    uint64_t seq, before = 0;
    while (mark.pos < ROUNDS) {
        CHECK(shmq_side_read(&side, &mark, &seq));
        CHECK_EQ(mark.count, mark.pos * 3);
        CHECK_EQ(mark.pos, seq);
        CHECK(mark.pos >= before);
        before = mark.pos;
    }
    return arg;
}

static void test_mark_is_read_whole_while_it_is_published(void)
{
    pthread_t writer, readers[2];
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pthread_create(&readers[i], NULL, read_marks, NULL), 0);
    CHECK_EQ(pthread_create(&writer, NULL, publish_marks, NULL), 0);
    pthread_join(writer, NULL);
    for (int i = 0; i < 2; i++)
        pthread_join(readers[i], NULL);
    CHECK_EQ(shmq_side_mark(&side).count, ROUNDS * 3);
}

/* What a mark publishes, without any lock: a one-way ring of numbers. */
static uint64_t published[64];
static _Atomic uint64_t taken;

static void *take_published(void *arg)
{
    struct shmq_mark mark = {0, 0};
    uint64_t seq, pos = 0;
    while (pos < ROUNDS) {
        CHECK(shmq_side_read(&side, &mark, &seq));
        if (mark.pos == pos)
            sched_yield();
        for (; pos < mark.pos; pos++)
            CHECK_EQ(published[pos % 64], pos * 7);
        atomic_store_explicit(&taken, pos, memory_order_release);
    }
    return arg;
}

static void test_who_sees_a_mark_sees_the_bytes_below_it(void)
{
    pthread_t reader;
    CHECK_EQ(pthread_create(&reader, NULL, take_published, NULL), 0);
    for (uint64_t i = 0; i < ROUNDS; i++) {
        while (i - atomic_load_explicit(&taken, memory_order_acquire) >= 64)
            sched_yield();
        published[i % 64] = i * 7;
        shmq_side_publish(&side, (struct shmq_mark){i + 1, i + 1});
    }
    pthread_join(reader, NULL);
}

static void publish_and_die(void *arg)
{
    arm();
    shmq_side_publish(arg, (struct shmq_mark){20, 2});
}

static void test_publication_has_happened_or_not_wherever_its_writer_dies(void)
{
    static const char *const spots[] = {"publish:prepared", "publish:done"};
    for (int i = 0; i < 2; i++) {
        struct shmq_side_hdr *s = shared_bytes(sizeof *s);
        struct shmq_mark mark;
        uint64_t seq;
        shmq_side_publish(s, (struct shmq_mark){10, 1});
        plan(SIGKILL, 0, spots[i]);
        child_was_killed(start_child(publish_and_die, s));
        CHECK(shmq_side_read(s, &mark, &seq));
        CHECK(mark.pos == (i == 0 ? 10 : 20) && mark.count == (i == 0 ? 1 : 2));
        shmq_side_publish(s, (struct shmq_mark){30, 3});
        CHECK(shmq_side_mark(s).pos == 30 && shmq_side_mark(s).count == 3);
    }
}

static const struct test tests[] = {
    TEST(test_header_is_one_little_endian_word),
    TEST(test_record_wraps_into_the_mirror_at_any_offset),
    TEST(test_same_offset_in_every_lap),
    TEST(test_large_parts_around_the_caches),
    TEST(test_exact_fit_takes_every_byte),
    TEST(test_records_of_all_lengths_lie_one_after_the_other),
    TEST(test_length_beyond_the_limit_is_refused),
    TEST(test_state_is_a_byte_of_its_own),
    TEST(test_parts_follow_each_other),
    TEST(test_aligned_parts_begin_at_multiples_and_stay_inside),
    TEST(test_sizes_never_wrap),
    TEST(test_mark_is_read_whole_while_it_is_published),
    TEST(test_who_sees_a_mark_sees_the_bytes_below_it),
    TEST(test_publication_has_happened_or_not_wherever_its_writer_dies),
};
RUN_TESTS(tests)
