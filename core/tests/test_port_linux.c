/* test_port_linux.c - what the core asks of the system (port.h), on Linux. Several of these are facts about the kernel
 * that the design rests on; they are checked where the library runs. */
#include "check.h"

#include <sys/syscall.h>

static void *pages(size_t n) { return shared_bytes(n * port_page_size()); }

/* ---- sleeping */

static void test_sleep_ends_at_once_when_the_word_is_another(void)
{
    _Atomic uint32_t word = 5;
    uint64_t start = shmq_now_ns();
    CHECK_EQ(port_sleep(&word, 4, UINT64_C(10000000000)), 0);
    CHECK(shmq_now_ns() - start < UINT64_C(5000000000));
    CHECK_EQ(port_sleep(&word, 5, 3000000), ETIMEDOUT);
}

static void sleep_until_woken(void *word) { CHECK_EQ(port_sleep(word, 0, UINT64_C(10000000000)), 0); }

static char state_of(pid_t pid)
{
    char path[64], line[256] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "r");
    if (file != NULL) {
        CHECK(fgets(line, sizeof line, file) != NULL);
        fclose(file);
    }
    char *end = strrchr(line, ')');
    return end == NULL ? '?' : end[2];
}

static void test_wake_reaches_another_process(void)
{
    _Atomic uint32_t *word = pages(1);
    pid_t pid = start_child(sleep_until_woken, word);
    WAIT_FOR(state_of(pid) == 'S');
    *word = 1;
    port_wake(word, 1);
    child_ends_well(pid);
}

static void nothing(int signal) { (void)signal; }

static void sleep_until_interrupted(void *word)
{
    struct sigaction action = {.sa_handler = nothing};
    sigaction(SIGUSR1, &action, NULL);
    *(_Atomic uint32_t *)word = 1;
    CHECK_EQ(port_sleep(word, 1, UINT64_C(100000000000)), EINTR);
}

static void test_signal_ends_a_sleep(void)
{
    _Atomic uint32_t *word = pages(1);
    pid_t pid = start_child(sleep_until_interrupted, word);
    WAIT_FOR(*word == 1 && state_of(pid) == 'S');
    CHECK_EQ(kill(pid, SIGUSR1), 0);
    child_ends_well(pid);
}

/* ---- forks */

static void *ask_for_cookie(void *arg)
{
    *(uint64_t *)arg = port_cookie();
    return NULL;
}

static void test_cookie_is_one_per_process(void)
{
    uint64_t cookies[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, ask_for_cookie, &cookies[i]), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 4; i++)
        CHECK(cookies[i] == port_cookie() && cookies[i] != 0);
    CHECK_EQ(*port_cookie_page, port_cookie());
}

static uint64_t parents_cookie;

static void has_another_cookie(void *arg)
{
    (void)arg;
    CHECK_EQ(*port_cookie_page, 0);
    CHECK(port_cookie() != parents_cookie && port_cookie() != 0);
    CHECK_EQ(port_cookie(), port_cookie());
}

static void test_forked_child_has_another_cookie(void)
{
    parents_cookie = port_cookie();
    child_ends_well(start_child(has_another_cookie, NULL));
    CHECK_EQ(port_cookie(), parents_cookie);
}

static void test_raw_clone_has_another_cookie(void)
{
    parents_cookie = port_cookie();
    pid_t pid = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
    if (pid == 0) {
        has_another_cookie(NULL);
        _exit(0);
    }
    child_ends_well(pid);
}

static _Atomic int in_guard;

static void *guard_and_wait(void *arg)
{
    port_fork_guard();
    in_guard = 1;
    pause_ms(50);
    in_guard = 2;
    port_fork_unguard();
    return arg;
}

static void sees_guard_over(void *arg)
{
    (void)arg;
    CHECK_EQ(in_guard, 2);
    port_fork_guard(); /* the child's is free */
    port_fork_unguard();
}

static void test_no_fork_begins_while_the_guard_is_held(void)
{
    pthread_t thread;
    port_cookie();
    CHECK_EQ(pthread_create(&thread, NULL, guard_and_wait, NULL), 0);
    WAIT_FOR(in_guard == 1);
    child_ends_well(start_child(sees_guard_over, NULL));
    pthread_join(thread, NULL);
}

/* ---- files */

static void test_created_file_is_complete_nameless_and_private(void)
{
    int fd;
    struct port_file file;
    struct stat st;
    umask(0077);
    CHECK_EQ(port_create(check_path, 100000, 0640, &fd), 0);
    CHECK_EQ(access(check_path, F_OK), -1);
    CHECK_EQ(port_stat(fd, &file), 0);
    CHECK(file.links == 0 && file.size == 100000 && file.is_regular);
    CHECK(fstat(fd, &st) == 0 && (st.st_mode & 07777) == 0640 && st.st_blocks * 512 >= 100000);
    CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    CHECK_EQ(port_link(fd, check_path), 0);
    CHECK_EQ(port_link(fd, check_path), EEXIST);
    CHECK_EQ(port_stat(fd, &file), 0);
    CHECK_EQ(file.links, 1);
    CHECK_EQ(port_unlink(check_path), 0);
    CHECK_EQ(port_unlink(check_path), ENOENT);
    port_close(fd);
}

static void test_file_too_big_for_its_folder_takes_nothing(void)
{
    int fd;
    uint64_t before = port_free_bytes(check_path);
    CHECK(before > 0);
    CHECK_EQ(port_create(check_path, before + (UINT64_C(1) << 40), 0600, &fd), ENOSPC);
    CHECK_EQ(port_create("/nowhere/at-all", 4096, 0600, &fd), ENOENT);
    CHECK_EQ(port_free_bytes("/nowhere/at-all"), 0);
    CHECK(port_free_bytes("no-slash") > 0 && port_free_bytes("/in-root") > 0);
}

static void test_open_follows_no_link_and_waits_for_nobody(void)
{
    int fd;
    struct port_file file;
    CHECK_EQ(port_open(check_path, &fd), ENOENT);
    CHECK_EQ(symlink("/dev/null", check_path), 0);
    CHECK_EQ(port_open(check_path, &fd), ELOOP);
    CHECK(port_stat_path(check_path, &file) == 0 && !file.is_regular);
    CHECK_EQ(unlink(check_path), 0);
    CHECK_EQ(mkfifo(check_path, 0600), 0);
    CHECK_EQ(port_open(check_path, &fd), 0);
    CHECK(port_stat(fd, &file) == 0 && !file.is_regular);
    port_close(fd);
    CHECK_EQ(port_stat(fd, &file), EBADF);
    CHECK_EQ(port_stat(-1, &file), EBADF);
    CHECK_EQ(unlink(check_path), 0);
}

static void test_read_and_write_are_all_or_an_error(void)
{
    int fd;
    char got[6];
    CHECK_EQ(port_create(check_path, 10, 0600, &fd), 0);
    CHECK_EQ(port_write(fd, "hello", 6), 0);
    CHECK_EQ(port_read(fd, got, 6), 0);
    CHECK(memcmp(got, "hello", 6) == 0);
    char more[11];
    CHECK_EQ(port_read(fd, more, sizeof more), ENODATA);
    port_close(fd);
}

static void test_random_bytes_differ(void)
{
    uint64_t a = 0, b = 0;
    CHECK(port_random(&a, 8) == 0 && port_random(&b, 8) == 0 && a != b);
}

/* ---- locks on bytes */

/* A named file and two descriptions of it. */
static void open_twice(int *one, int *two)
{
    int fd;
    CHECK_EQ(port_create(check_path, 3 * port_page_size(), 0600, &fd), 0);
    CHECK_EQ(port_link(fd, check_path), 0);
    CHECK_EQ(port_open(check_path, one), 0);
    CHECK_EQ(port_open(check_path, two), 0);
    port_close(fd);
}

static uint64_t first_locked(int fd, uint64_t from, uint64_t to)
{
    uint64_t byte;
    CHECK_EQ(port_first_locked(fd, from, to, &byte), 0);
    return byte;
}

static void test_byte_is_locked_by_one_description(void)
{
    int one, two;
    open_twice(&one, &two);
    CHECK_EQ(port_lock_byte(one, 7), 0);
    CHECK_EQ(port_lock_byte(two, 7), EAGAIN);
    CHECK_EQ(port_lock_byte(two, 8), 0);
    CHECK_EQ(first_locked(two, 7, 7), 7);
    CHECK_EQ(first_locked(one, 7, 7), UINT64_MAX); /* its own: so never ask through a holder */
    CHECK_EQ(port_unlock_byte(one, 7), 0);
    CHECK_EQ(first_locked(two, 7, 7), UINT64_MAX);
    CHECK_EQ(port_lock_byte(two, 7), 0);
    unlink(check_path);
}

static void test_lowest_locked_byte_is_found(void)
{
    int one, two;
    open_twice(&one, &two);
    static const uint64_t order[] = {300, 12, 200, 11, 512};
    for (int i = 0; i < 5; i++)
        CHECK_EQ(port_lock_byte(one, order[i]), 0);
    CHECK_EQ(first_locked(two, 1, 512), 11);
    CHECK_EQ(first_locked(two, 12, 512), 12);
    CHECK_EQ(first_locked(two, 13, 512), 200);
    CHECK_EQ(first_locked(two, 201, 299), UINT64_MAX);
    CHECK_EQ(first_locked(two, 301, 512), 512);
    CHECK_EQ(first_locked(two, 1, 10), UINT64_MAX);
    uint64_t byte;
    CHECK_EQ(port_first_locked(-1, 1, 2, &byte), EBADF);
    unlink(check_path);
}

static void test_pin_keeps_a_lock_that_its_descriptor_would_lose(void)
{
    int one, two;
    void *pin;
    open_twice(&one, &two);
    CHECK_EQ(port_lock_byte(one, 7), 0);
    CHECK_EQ(port_pin(one, &pin), 0);
    port_close(one);
    CHECK_EQ(first_locked(two, 7, 7), 7);
    port_unpin(pin);
    CHECK_EQ(first_locked(two, 7, 7), UINT64_MAX);
    unlink(check_path);
}

static void pin_and_stop(void *grandchild)
{
    int fd;
    void *pin;
    CHECK(port_open(check_path, &fd) == 0 && port_lock_byte(fd, 7) == 0 && port_pin(fd, &pin) == 0);
    port_close(fd);
    pid_t pid = fork(); /* has the mappings of its parent, but not the pin */
    while (pid == 0)
        pause();
    *(_Atomic pid_t *)grandchild = pid;
    raise(SIGSTOP);
}

static void test_pin_ends_with_its_process_though_a_forked_child_lives(void)
{
    int one, two;
    _Atomic pid_t *grandchild = pages(1);
    open_twice(&one, &two);
    pid_t pid = start_child(pin_and_stop, grandchild);
    child_has_stopped(pid);
    CHECK_EQ(first_locked(two, 7, 7), 7);
    uint64_t start = shmq_now_ns();
    kill_child(pid);
    WAIT_FOR(first_locked(two, 7, 7) == UINT64_MAX);
    CHECK(shmq_now_ns() - start < 1000 * UINT64_C(1000000));
    WAIT_FOR(state_of(*grandchild) == 'S'); /* alive, and back to sleep if it was moved to another parent */
    unlink(check_path);
}

/* ---- mappings */

static void test_ring_is_mapped_twice_back_to_back(void)
{
    int one, two;
    uint8_t *base, got[2] = {0, 0};
    uint64_t page = port_page_size();
    open_twice(&one, &two);
    CHECK_EQ(port_map(one, page, 2 * page, (void **)&base), 0);
    base[0] = 9;
    base[page] = 1;
    base[5 * page - 1] = 2; /* the last byte of the mirror */
    CHECK_EQ(base[3 * page], 1);
    CHECK_EQ(base[3 * page - 1], 2);
    CHECK_EQ(port_read(two, got, 2), 0);
    CHECK_EQ(got[0], 9);
    port_unmap(base, page, 2 * page);
    CHECK_EQ(msync(base, page, MS_ASYNC), -1); /* nothing is left there */
    unlink(check_path);
}

static uint64_t pages_at_hand(const void *at, uint64_t size)
{
    char line[200];
    uint64_t first, last, kib = 0, sum = 0;
    bool is_inside = false;
    FILE *maps = fopen("/proc/self/smaps", "r");
    CHECK(maps != NULL);
    while (fgets(line, sizeof line, maps) != NULL) {
        if (sscanf(line, "%lx-%lx ", &first, &last) == 2)
            is_inside = first >= (uintptr_t)at && last <= (uintptr_t)at + size;
        if (is_inside && sscanf(line, "Rss: %lu kB", &kib) == 1)
            sum += kib;
    }
    fclose(maps);
    return sum * 1024 / port_page_size();
}

static void test_big_ring_begins_at_a_huge_page_and_can_be_had_at_hand(void)
{
    int one, two;
    char *base;
    uint64_t page = port_page_size(), offset = 3 * page, capacity = 4 << 20, size = offset + 2 * capacity;
    open_twice(&one, &two);
    CHECK_EQ(ftruncate(one, (off_t)(offset + capacity)), 0);
    CHECK_EQ(port_map(one, offset, capacity, (void **)&base), 0);
    CHECK_EQ((uintptr_t)base % (2 << 20), 0);
    CHECK_EQ(pages_at_hand(base, size), 0);
    CHECK_EQ(port_prefault(base, size), 0);
    CHECK_EQ(pages_at_hand(base, size), size / page);
    base[offset] = 5;
    CHECK_EQ(base[offset + capacity], 5);
    port_unmap(base, offset, capacity);
    CHECK_EQ(msync(base + size - page, page, MS_ASYNC), -1);
    CHECK(port_prefault(base, page) != 0);
    unlink(check_path);
}

static void test_mapping_that_cannot_be_leaves_nothing(void)
{
    void *base;
    CHECK_EQ(port_map(-1, port_page_size(), port_page_size(), &base), EBADF);
    CHECK_EQ(port_pin(-1, &base), EBADF);
}

static void test_clock_never_goes_back(void)
{
    for (uint64_t i = 0, before = 0, now; i < 1000; i++, before = now)
        CHECK((now = shmq_now_ns()) >= before);
    CHECK(port_wall_ns() > UINT64_C(1600000000) * 1000000000u);
    CHECK(port_cpus() >= 1);
    CHECK_EQ(port_pid(), getpid());
}

static const struct test tests[] = {
    TEST(test_sleep_ends_at_once_when_the_word_is_another),
    TEST(test_wake_reaches_another_process),
    TEST(test_signal_ends_a_sleep),
    TEST(test_cookie_is_one_per_process),
    TEST(test_forked_child_has_another_cookie),
    TEST(test_raw_clone_has_another_cookie),
    TEST(test_no_fork_begins_while_the_guard_is_held),
    TEST(test_created_file_is_complete_nameless_and_private),
    TEST(test_file_too_big_for_its_folder_takes_nothing),
    TEST(test_open_follows_no_link_and_waits_for_nobody),
    TEST(test_read_and_write_are_all_or_an_error),
    TEST(test_random_bytes_differ),
    TEST(test_byte_is_locked_by_one_description),
    TEST(test_lowest_locked_byte_is_found),
    TEST(test_pin_keeps_a_lock_that_its_descriptor_would_lose),
    TEST(test_pin_ends_with_its_process_though_a_forked_child_lives),
    TEST(test_ring_is_mapped_twice_back_to_back),
    TEST(test_big_ring_begins_at_a_huge_page_and_can_be_had_at_hand),
    TEST(test_mapping_that_cannot_be_leaves_nothing),
    TEST(test_clock_never_goes_back),
};
RUN_TESTS(tests)
