/* test_lock.c - the lock that names its owner (lock.c). Owners here are plain numbers; who is dead, a test says. */
#include "check.h"

/* In memory that children share: the word, and what it guards. */
struct guarded {
    _Atomic uint64_t word;
    _Atomic uint64_t dead; /* the owner that is */
    _Atomic int probes, taken_over, waits;
    uint64_t a, b; /* equal whenever nobody is inside */
};

static bool is_dead(void *arg, uint64_t owner)
{
    struct guarded *g = arg;
    g->probes++;
    return owner == g->dead;
}

static struct guarded *make_guarded(void) { return shared_bytes(sizeof(struct guarded)); }

static enum shmq_lock_result lock(struct guarded *g, uint64_t self, uint64_t until_ns)
{
    struct shmq_lock_user user = {self, is_dead, g, true};
    return shmq_lock(&g->word, &user, until_ns);
}

static void change(struct guarded *g)
{
    CHECK_EQ(g->a, g->b);
    g->a++;
    g->b++;
}

static void test_free_lock_is_taken_once(void)
{
    struct guarded *g = make_guarded();
    CHECK(shmq_lock_try(&g->word, 10));
    CHECK_EQ(g->word, 10);
    CHECK(!shmq_lock_try(&g->word, 12));
    CHECK(!shmq_lock_try(&g->word, 10));
    shmq_unlock(&g->word);
    CHECK_EQ(g->word, 0);
    CHECK_EQ(lock(g, 12, SHMQ_FOREVER), SHMQ_LOCK_TAKEN);
    CHECK_EQ(g->word, 12);
    CHECK_EQ(g->probes, 0);
}

static void test_waiter_leaves_its_mark(void)
{
    struct guarded *g = make_guarded();
    CHECK(shmq_lock_try(&g->word, 10));
    CHECK_EQ(lock(g, 12, in_ms(2)), SHMQ_LOCK_TIMEOUT);
    CHECK_EQ(g->word, 10 | SHMQ_CONTENDED);
    shmq_unlock(&g->word);
    CHECK_EQ(g->word, 0);
}

static void test_who_has_waited_leaves_the_mark_for_others_that_may_still_sleep(void)
{
    struct guarded *g = make_guarded();
    struct shmq_lock_user user = {12, is_dead, g, false};
    CHECK_EQ(shmq_lock(&g->word, &user, SHMQ_FOREVER), SHMQ_LOCK_TAKEN);
    CHECK_EQ(g->word, 12 | SHMQ_CONTENDED);
}

/* ---- threads */

#define THREADS 4
#define ROUNDS 50000

static struct guarded *among_threads;

static void *lock_and_change(void *self)
{
    for (int i = 0; i < ROUNDS; i++) {
        if (!shmq_lock_try(&among_threads->word, (uintptr_t)self)) {
            among_threads->waits++;
            CHECK_EQ(lock(among_threads, (uintptr_t)self, SHMQ_FOREVER), SHMQ_LOCK_TAKEN);
        }
        change(among_threads);
        if (i % 16 == 0)
            sched_yield(); /* so that others come upon a lock that is held */
        shmq_unlock(&among_threads->word);
    }
    return NULL;
}

static void run_threads(void *(*run)(void *), int n, uintptr_t first_self)
{
    pthread_t threads[16];
    for (int i = 0; i < n; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, run, (void *)(first_self + 2 * (uintptr_t)i)), 0);
    for (int i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
}

static void test_one_of_many_threads_is_inside(void)
{
    among_threads = make_guarded();
    run_threads(lock_and_change, THREADS, 10);
    CHECK_EQ(among_threads->a, THREADS * ROUNDS);
    CHECK_EQ(among_threads->word, 0);
    CHECK(among_threads->waits > 0);
}

static void change_often(void *arg)
{
    among_threads = arg;
    lock_and_change((void *)(uintptr_t)(2 * getpid()));
}

static void test_one_of_many_processes_is_inside(void)
{
    struct guarded *g = make_guarded();
    pid_t pids[THREADS];
    for (int i = 0; i < THREADS; i++)
        pids[i] = start_child(change_often, g);
    for (int i = 0; i < THREADS; i++)
        child_ends_well(pids[i]);
    CHECK_EQ(g->a, THREADS * ROUNDS);
    CHECK(g->waits > 0);
}

static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void test_waiting_sleeps_and_asks_now_and_then_whether_the_owner_lives(void)
{
    struct guarded *g = make_guarded();
    CHECK(shmq_lock_try(&g->word, 10));
    uint64_t start = cpu_ns();
    CHECK_EQ(lock(g, 12, in_ms(300)), SHMQ_LOCK_TIMEOUT);
    CHECK(cpu_ns() - start < 150 * 1000000u);
    CHECK(g->probes >= 2 && g->probes < 60);
}

static _Atomic bool has_ended;

static void nothing(int signal) { (void)signal; }

static void *lock_until_interrupted(void *self)
{
    CHECK_EQ(lock(among_threads, (uintptr_t)self, SHMQ_FOREVER), SHMQ_LOCK_INTR);
    has_ended = true;
    return NULL;
}

static void test_signal_ends_the_waiting(void)
{
    pthread_t thread;
    struct sigaction action = {.sa_handler = nothing};
    sigaction(SIGUSR1, &action, NULL);
    among_threads = make_guarded();
    CHECK(shmq_lock_try(&among_threads->word, 10));
    CHECK_EQ(pthread_create(&thread, NULL, lock_until_interrupted, (void *)12), 0);
    WAIT_FOR(has_ended || (pthread_kill(thread, SIGUSR1), false));
    pthread_join(thread, NULL);
    CHECK_EQ(among_threads->word, 10 | SHMQ_CONTENDED);
}

/* ---- owners that don't go on */

static void lock_and_stop(void *arg)
{
    struct guarded *g = arg;
    CHECK_EQ(lock(g, 20, SHMQ_FOREVER), SHMQ_LOCK_TAKEN);
    raise(SIGSTOP);
    change(g);
    shmq_unlock(&g->word);
}

static void test_frozen_owner_is_waited_for_until_the_timeout_and_never_robbed(void)
{
    struct guarded *g = make_guarded();
    pid_t pid = start_child(lock_and_stop, g);
    child_has_stopped(pid);
    for (int i = 0; i < 3; i++) {
        uint64_t start = shmq_now_ns();
        CHECK_EQ(lock(g, 12, in_ms(40)), SHMQ_LOCK_TIMEOUT);
        CHECK(shmq_now_ns() - start >= 40 * 1000000u && shmq_now_ns() < start + 2000 * UINT64_C(1000000));
    }
    CHECK_EQ(g->word, 20 | SHMQ_CONTENDED);
    CHECK_EQ(kill(pid, SIGCONT), 0);
    CHECK_EQ(lock(g, 12, in_ms(STATE_MS)), SHMQ_LOCK_TAKEN);
    CHECK_EQ(g->a, 1);
    child_ends_well(pid);
}

static struct guarded *held_by_the_dead(void)
{
    struct guarded *g = make_guarded();
    pid_t pid = start_child(lock_and_stop, g);
    child_has_stopped(pid);
    kill_child(pid);
    g->dead = 20;
    return g;
}

static void test_lock_of_a_killed_owner_is_taken_over(void)
{
    struct guarded *g = held_by_the_dead();
    uint64_t start = shmq_now_ns();
    CHECK_EQ(lock(g, 12, SHMQ_FOREVER), SHMQ_LOCK_TAKEN_OVER);
    CHECK(shmq_now_ns() - start < 1000 * UINT64_C(1000000));
    CHECK_EQ(g->word, 12 | SHMQ_CONTENDED); /* others may sleep there */
    shmq_unlock(&g->word);
    CHECK_EQ(g->word, 0);
}

static void test_call_without_time_takes_over_too(void)
{
    struct guarded *g = held_by_the_dead();
    CHECK_EQ(lock(g, 12, 0), SHMQ_LOCK_TAKEN_OVER);
}

static bool is_dead_after_all_have_asked(void *arg, uint64_t owner)
{
    bool is = is_dead(arg, owner);
    usleep(500);
    return is;
}

static void *lock_of_the_dead(void *self)
{
    struct shmq_lock_user user = {(uintptr_t)self, is_dead_after_all_have_asked, among_threads, true};
    enum shmq_lock_result result = shmq_lock(&among_threads->word, &user, SHMQ_FOREVER);
    CHECK(result == SHMQ_LOCK_TAKEN || result == SHMQ_LOCK_TAKEN_OVER);
    among_threads->taken_over += result == SHMQ_LOCK_TAKEN_OVER;
    change(among_threads);
    shmq_unlock(&among_threads->word);
    return NULL;
}

static void test_only_one_of_many_waiters_takes_over(void)
{
    for (int round = 0; round < 40; round++) {
        among_threads = make_guarded();
        among_threads->word = 20;
        among_threads->dead = 20;
        run_threads(lock_of_the_dead, 8, 30);
        CHECK_EQ(among_threads->taken_over, 1);
        CHECK_EQ(among_threads->a, 8);
        CHECK_EQ(among_threads->word, 0);
    }
}

static void take_over_and_die(void *arg)
{
    arm();
    lock(arg, 30, SHMQ_FOREVER);
}

static void test_taker_over_that_dies_is_taken_over_itself(void)
{
    struct guarded *g = held_by_the_dead();
    plan(SIGKILL, 0, "lock:taken over");
    child_was_killed(start_child(take_over_and_die, g));
    CHECK_EQ(g->word, 30 | SHMQ_CONTENDED);
    CHECK_EQ(lock(g, 12, in_ms(20)), SHMQ_LOCK_TIMEOUT); /* not known to be dead yet */
    g->dead = 30;
    CHECK_EQ(lock(g, 12, SHMQ_FOREVER), SHMQ_LOCK_TAKEN_OVER);
}

static void unlock_and_die(void *arg)
{
    struct guarded *g = arg;
    CHECK_EQ(lock(g, 20, SHMQ_FOREVER), SHMQ_LOCK_TAKEN);
    WAIT_FOR(g->word & SHMQ_CONTENDED);
    arm();
    shmq_unlock(&g->word);
}

static void test_sleeper_looks_again_when_the_one_to_wake_it_died(void)
{
    struct guarded *g = make_guarded();
    plan(SIGKILL, 0, "lock:unlocked");
    pid_t pid = start_child(unlock_and_die, g);
    WAIT_FOR(g->word == 20);
    uint64_t start = shmq_now_ns();
    CHECK_EQ(lock(g, 12, in_ms(STATE_MS)), SHMQ_LOCK_TAKEN);
    CHECK(shmq_now_ns() - start < 2000 * UINT64_C(1000000));
    child_was_killed(pid);
}

static bool is_garbage(void *arg, uint64_t owner)
{
    (void)arg;
    return owner != 12;
}

static void test_garbage_word_is_a_dead_owner(void)
{
    static const uint64_t garbage[] = {SHMQ_CONTENDED,    UINT64_MAX, UINT64_MAX - 1,
                                       UINT64_C(1) << 63, 0xffffffff, 0x7ff};
    for (size_t i = 0; i < sizeof garbage / sizeof *garbage; i++) {
        _Atomic uint64_t word = garbage[i];
        struct shmq_lock_user user = {12, is_garbage, NULL, true};
        CHECK_EQ(shmq_lock(&word, &user, in_ms(STATE_MS)), SHMQ_LOCK_TAKEN_OVER);
        shmq_unlock(&word);
        CHECK_EQ(word, 0);
    }
}

static const struct test tests[] = {
    TEST(test_free_lock_is_taken_once),
    TEST(test_waiter_leaves_its_mark),
    TEST(test_who_has_waited_leaves_the_mark_for_others_that_may_still_sleep),
    TEST(test_one_of_many_threads_is_inside),
    TEST(test_one_of_many_processes_is_inside),
    TEST(test_waiting_sleeps_and_asks_now_and_then_whether_the_owner_lives),
    TEST(test_signal_ends_the_waiting),
    TEST(test_frozen_owner_is_waited_for_until_the_timeout_and_never_robbed),
    TEST(test_lock_of_a_killed_owner_is_taken_over),
    TEST(test_call_without_time_takes_over_too),
    TEST(test_only_one_of_many_waiters_takes_over),
    TEST(test_taker_over_that_dies_is_taken_over_itself),
    TEST(test_sleeper_looks_again_when_the_one_to_wake_it_died),
    TEST(test_garbage_word_is_a_dead_owner),
};
RUN_TESTS(tests)
