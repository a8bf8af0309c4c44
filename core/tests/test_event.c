/* test_event.c - eventcounts (event.c): a sleeper whom nobody wakes would show as a timeout of ten seconds here. */
#include "check.h"

#define LONG_NS UINT64_C(10000000000)

static struct shmq_waiters_hdr w;

static void test_waker_does_nothing_when_nobody_sleeps(void)
{
    CHECK_EQ(shmq_items_asleep(&w), 0);
    shmq_items_wake(&w, 1);
    CHECK_EQ(w.items, 0);
    CHECK_EQ(shmq_room_wanted(&w), 0);
    shmq_room_wake(&w);
    CHECK_EQ(w.room, 0);
}

static void test_wake_before_the_sleep_is_not_lost(void)
{
    uint32_t key = shmq_items_begin(&w);
    CHECK_EQ(shmq_items_asleep(&w), 1);
    shmq_items_wake(&w, 1);
    CHECK_EQ(shmq_items_asleep(&w), 0);
    CHECK_EQ(shmq_sleep(&w.items, key, LONG_NS), 0);
    key = shmq_room_begin(&w, 100);
    shmq_room_wake(&w);
    CHECK_EQ(shmq_room_wanted(&w), 0);
    CHECK_EQ(shmq_sleep(&w.room, key, LONG_NS), 0);
}

static void test_sleep_ends_at_its_timeout(void)
{
    uint64_t start = shmq_now_ns();
    CHECK_EQ(shmq_sleep(&w.items, shmq_items_begin(&w), 20000000), ETIMEDOUT);
    CHECK(shmq_now_ns() - start >= 20000000);
}

static void test_room_wanted_is_what_the_least_demanding_wants(void)
{
    shmq_room_begin(&w, 500);
    CHECK_EQ(shmq_room_wanted(&w), 500);
    shmq_room_begin(&w, 700);
    CHECK_EQ(shmq_room_wanted(&w), 500);
    shmq_room_begin(&w, 8);
    CHECK_EQ(shmq_room_wanted(&w), 8);
}

/* ---- one number to and fro: what a waker publishes before the fence, a sleeper sees, or is woken */

#define ROUNDS 40000u

static _Atomic uint32_t ping, pong;

static void say(_Atomic uint32_t *word, uint32_t n, bool are_items)
{
    atomic_store_explicit(word, n, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    if (are_items && shmq_items_asleep(&w))
        shmq_items_wake(&w, 1);
    if (!are_items && shmq_room_wanted(&w))
        shmq_room_wake(&w);
}

static void await(_Atomic uint32_t *word, uint32_t n, bool are_items)
{
    while (atomic_load_explicit(word, memory_order_acquire) != n) {
        uint32_t key = are_items ? shmq_items_begin(&w) : shmq_room_begin(&w, 8);
        if (atomic_load_explicit(word, memory_order_acquire) != n)
            CHECK_EQ(shmq_sleep(are_items ? &w.items : &w.room, key, LONG_NS), 0);
    }
}

static void *answer(void *arg)
{
    for (uint32_t i = 1; i <= ROUNDS; i++) {
        await(&ping, i, true);
        say(&pong, i, false);
    }
    return arg;
}

static void test_no_wake_up_is_lost_in_a_long_ping_pong(void)
{
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, answer, NULL), 0);
    for (uint32_t i = 1; i <= ROUNDS; i++) {
        say(&ping, i, true);
        await(&pong, i, false);
    }
    pthread_join(thread, NULL);
}

/* ---- the same without sleeping: at one instant here, either the flag is seen or what was published */

static _Atomic uint32_t turn, published, answered;
static uint32_t seen_flag;

static void *publish_and_look(void *n)
{
    for (uint32_t i = 1; i <= *(uint32_t *)n; i++) {
        await_turn(&turn, i);
        atomic_store_explicit(&published, i, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst);
        seen_flag = shmq_items_asleep(&w);
        atomic_store_explicit(&answered, i, memory_order_release);
    }
    return n;
}

static void meet(uint32_t n)
{
    pthread_t thread;
    turn = answered = published = 0;
    CHECK_EQ(pthread_create(&thread, NULL, publish_and_look, &n), 0);
    for (uint32_t i = 1; i <= n; i++) {
        atomic_store_explicit(&w.items_asleep, 0, memory_order_relaxed);
        atomic_store_explicit(&turn, i, memory_order_release);
        for (uint32_t k = i % 64; k > 0; k--)
            port_pause(); /* so that they meet at all distances */
        shmq_items_begin(&w);
        uint32_t seen = atomic_load_explicit(&published, memory_order_relaxed);
        await_turn(&answered, i);
        CHECK(seen == i || seen_flag == 1);
    }
    pthread_join(thread, NULL);
}

static void test_sleeper_and_waker_never_miss_each_other(void)
{
    for (uint64_t until = in_ms(500); shmq_now_ns() < until;)
        meet(2000);
}

/* ---- one is woken, and wakes the next when something is left */

#define CONSUMERS 5

static _Atomic int stock, asleep;

static bool take_one(void)
{
    int n = atomic_load(&stock);
    while (n > 0)
        if (atomic_compare_exchange_weak(&stock, &n, n - 1))
            return true;
    return false;
}

static void wake_if_any(void)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (shmq_items_asleep(&w) && atomic_load(&stock) > 0)
        shmq_items_wake(&w, 1);
}

static void *consume_one(void *arg)
{
    while (!take_one()) {
        uint32_t key = shmq_items_begin(&w);
        if (atomic_load(&stock) > 0)
            continue;
        atomic_fetch_add(&asleep, 1);
        CHECK_EQ(shmq_sleep(&w.items, key, LONG_NS), 0);
        shmq_items_begin(&w); /* who woke us has lowered the flag */
    }
    wake_if_any();
    return arg;
}

static void test_who_is_woken_wakes_the_next_while_something_is_left(void)
{
    for (int round = 0; round < 100; round++) {
        pthread_t threads[CONSUMERS];
        asleep = 0;
        for (int i = 0; i < CONSUMERS; i++)
            CHECK_EQ(pthread_create(&threads[i], NULL, consume_one, NULL), 0);
        WAIT_FOR(asleep >= CONSUMERS);
        atomic_fetch_add(&stock, CONSUMERS); /* so many items, one wake */
        wake_if_any();
        for (int i = 0; i < CONSUMERS; i++)
            pthread_join(threads[i], NULL);
        CHECK_EQ(stock, 0);
    }
}

/* ---- deaths */

static void sleep_long(void *arg)
{
    struct shmq_waiters_hdr *shared = arg;
    shmq_sleep(&shared->items, shmq_items_begin(shared), LONG_NS);
}

static void test_killed_sleeper_leaves_nothing_but_a_needless_wake(void)
{
    struct shmq_waiters_hdr *shared = shared_bytes(sizeof *shared);
    for (int i = 0; i < 3; i++) {
        pid_t pid = start_child(sleep_long, shared);
        WAIT_FOR(shmq_items_asleep(shared));
        kill_child(pid);
        shmq_items_wake(shared, 1);
        CHECK_EQ(shmq_items_asleep(shared), 0);
        CHECK_EQ(shared->items, i + 1);
    }
}

static void wake_and_die(void *arg)
{
    arm();
    shmq_items_wake(arg, 1);
}

static void test_waker_that_dies_half_way_costs_one_timeout(void)
{
    struct shmq_waiters_hdr *shared = shared_bytes(sizeof *shared);
    uint32_t key = shmq_items_begin(shared);
    plan(SIGKILL, 0, "wake:lowered");
    child_was_killed(start_child(wake_and_die, shared));
    CHECK_EQ(shmq_sleep(&shared->items, key, 5000000), ETIMEDOUT);
    key = shmq_items_begin(shared);
    shmq_items_wake(shared, 1); /* the next one works */
    CHECK_EQ(shmq_sleep(&shared->items, key, LONG_NS), 0);
}

/* ---- spinning */

static uint64_t spin_once(struct shmq_spin *spin, bool will_change)
{
    _Atomic uint64_t word = 5;
    uint64_t start = shmq_now_ns();
    CHECK_EQ(shmq_spin(spin, &word, will_change ? 4 : 5), will_change);
    return shmq_now_ns() - start;
}

static void test_long_waits_are_not_spent_awake(void)
{
    struct shmq_spin spin = {0, 0};
    CHECK(spin_once(&spin, false) >= 50000);
    for (int i = 0; i < 10; i++)
        shmq_spin_slept(&spin, UINT64_C(1000000000));
    uint64_t least = UINT64_MAX;
    for (int i = 0; i < 500; i++) { /* others may have the processor meanwhile, but hardly each time */
        uint64_t ns = spin_once(&spin, false);
        least = ns < least ? ns : least;
    }
    CHECK(least < 20000);
    CHECK_EQ(spin.waits, 501);
}

static void test_waits_that_have_become_short_are_spent_awake(void)
{
    struct shmq_spin spin = {0, 0};
    for (int i = 0; i < 10; i++)
        shmq_spin_slept(&spin, UINT64_C(1000000000));
    for (int i = 0; i < 1000; i++)
        spin_once(&spin, true);
    CHECK(spin.typical_ns < 50000);
    CHECK(spin_once(&spin, false) >= 50000);
}

static void test_waits_of_a_wake_up_are_spent_awake_now_and_then(void)
{
    struct shmq_spin spin = {100000, 0};
    uint32_t trials = 0;
    for (int i = 0; i < 512; i++) {
        spin.typical_ns = 100000;
        trials += spin_once(&spin, false) >= 100000;
    }
    CHECK(trials >= 16 && trials < 100);
}

static void test_lag_that_does_not_pay_is_given_up(void)
{
    struct shmq_lag lag = {128, 0};
    uint32_t tries = 0;
    for (int i = 0; i < 2048 + 8; i++) {
        uint32_t pauses = shmq_lag(&lag);
        tries += pauses > 0;
        shmq_lag_learn(&lag, pauses, false);
    }
    CHECK_EQ(tries, 3 + 3); /* 128, 64, 32; then one in 1024 */
}

static void test_lag_that_pays_becomes_longer(void)
{
    struct shmq_lag lag = {0, 1};
    CHECK_EQ(shmq_lag(&lag), 0);
    for (uint32_t pauses = 32; pauses <= 128; pauses *= 2) {
        shmq_lag_learn(&lag, lag.pauses, true);
        CHECK_EQ(shmq_lag(&lag), pauses);
    }
    shmq_lag_learn(&lag, 128, true);
    CHECK_EQ(shmq_lag(&lag), 128);
}

static const struct test tests[] = {
    TEST(test_waker_does_nothing_when_nobody_sleeps),
    TEST(test_wake_before_the_sleep_is_not_lost),
    TEST(test_sleep_ends_at_its_timeout),
    TEST(test_room_wanted_is_what_the_least_demanding_wants),
    TEST(test_no_wake_up_is_lost_in_a_long_ping_pong),
    TEST(test_sleeper_and_waker_never_miss_each_other),
    TEST(test_who_is_woken_wakes_the_next_while_something_is_left),
    TEST(test_killed_sleeper_leaves_nothing_but_a_needless_wake),
    TEST(test_waker_that_dies_half_way_costs_one_timeout),
    TEST(test_long_waits_are_not_spent_awake),
    TEST(test_waits_that_have_become_short_are_spent_awake),
    TEST(test_waits_of_a_wake_up_are_spent_awake_now_and_then),
    TEST(test_lag_that_does_not_pay_is_given_up),
    TEST(test_lag_that_pays_becomes_longer),
};
RUN_TESTS(tests)
