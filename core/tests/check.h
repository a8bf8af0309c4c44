/* check.h - what the C tests share: CHECK, waiting for a state, children that die or stop at a failpoint, items in
 * which a tear shows, and a runner that gives each test a process of its own, so that a crash or a hang fails one test
 * and leaves nothing behind. Include it first. A test program's arguments choose tests by parts of their names. */
#ifndef SHMQ_CHECK_H
#define SHMQ_CHECK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "failpoint.h"
#include "handle.h"

#define KILLED_AT 256
#define LIMIT_S 200    /* for one test: a hang is a failure */
#define STATE_MS 20000 /* for a state to come about: it takes milliseconds, the rest is for busy machines */

/* Shared with all children of a test. */
struct check {
    char context[240]; /* where the test is, for messages */
    struct plan {
        int signal;       /* raised in who has called arm() ... */
        uint32_t at;      /* ... at this failpoint, counted from 1 ... */
        const char *name; /* ... or at the first one of this name */
        bool is_named_only; /* stores without a name don't count */
        void (*on_hit)(const char *name);
        const char *decides; /* the failpoint after which what the test is about has happened */
        bool is_decided;
        uint32_t hits;
        char last[32]; /* the failpoint passed last */
    } plan;
    struct {
        char name[32];
        bool is_named;
    } spots[KILLED_AT];            /* all failpoints seen: is it a store with a name of its own after it? */
    char killed_at[KILLED_AT][32]; /* failpoints that some child of this program was killed at */
    uint32_t kills;                /* at failpoints, in all */
};
static struct check *check;
static char check_path[64]; /* of this test's segment; more names may follow it */
static pid_t check_main;

/* ---- checks */

static inline void context(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(check->context, sizeof check->context, format, args);
    va_end(args);
}

_Noreturn static inline void check_failed(const char *file, int line, const char *what, intmax_t a, intmax_t b)
{
    fprintf(stderr, "%s:%d: %s (%jd, %jd) %s\n", file, line, what, a, b, check->context);
    _exit(1);
}

#define CHECK(fact) ((fact) ? (void)0 : check_failed(__FILE__, __LINE__, #fact, 0, 0))
#define CHECK_EQ(a, b)                                                                                                 \
    do {                                                                                                               \
        intmax_t a_ = (intmax_t)(a), b_ = (intmax_t)(b);                                                               \
        if (a_ != b_)                                                                                                  \
            check_failed(__FILE__, __LINE__, #a " == " #b, a_, b_);                                                    \
    } while (0)

static inline uint64_t in_ms(uint64_t ms) { return shmq_now_ns() + ms * 1000000u; }
static inline void pause_ms(unsigned ms) { usleep(ms * 1000); }

/* Wait until a fact holds. */
#define WAIT_FOR(fact)                                                                                                 \
    for (uint64_t until_ = in_ms(STATE_MS); !(fact); usleep(100))                                                      \
        if (shmq_now_ns() > until_)                                                                                    \
    check_failed(__FILE__, __LINE__, "never came about: " #fact, 0, 0)

/* Wait for a number awake, unless who is to store it has no processor. */
static inline void await_turn(_Atomic uint32_t *word, uint32_t i)
{
    for (uint32_t k = 0; atomic_load_explicit(word, memory_order_acquire) != i; k++)
        if (k % 1024 == 1023)
            sched_yield();
        else
            port_pause();
}

/* ---- children */

static inline void *shared_bytes(size_t n)
{
    void *bytes = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(bytes != MAP_FAILED);
    return bytes;
}

static inline void enter_child(pid_t parent)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
}

static inline pid_t start_child(void (*run)(void *arg), void *arg)
{
    pid_t parent = getpid(), pid = fork();
    CHECK(pid >= 0);
    if (pid > 0)
        return pid;
    enter_child(parent);
    run(arg);
    _exit(0);
}

static inline int wait_child(pid_t pid, int options)
{
    int status;
    pid_t got;
    while ((got = waitpid(pid, &status, options)) < 0 && errno == EINTR)
        ;
    CHECK_EQ(got, pid);
    return status;
}

static inline void child_ends_well(pid_t pid) { CHECK_EQ(wait_child(pid, 0), 0); }

static inline void child_was_killed(pid_t pid)
{
    int status = wait_child(pid, 0);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static inline void child_has_stopped(pid_t pid)
{
    int status = wait_child(pid, WUNTRACED);
    CHECK(WIFSTOPPED(status));
}

static inline void kill_child(pid_t pid)
{
    CHECK_EQ(kill(pid, SIGKILL), 0);
    child_was_killed(pid);
}

static inline void let_child_end(pid_t pid)
{
    CHECK_EQ(kill(pid, SIGCONT), 0);
    child_ends_well(pid);
}

/* ---- failpoints */

/* A store right before a named spot, or (in ring.h) in a function before whose callers' spots it stands, is that spot;
 * this line and the next two of its source tell. */
static inline bool reads_named_spot(const char *name)
{
    char path[64], line[400];
    int at = 0, n = 0;
    bool is_named = false;
    if (sscanf(name, "%59[^:]:%d", path, &at) != 2)
        return false;
    if (strcmp(path, "ring.h") == 0)
        return true;
    snprintf(line, sizeof line, "core/%s", path);
    FILE *file = fopen(line, "r");
    if (file == NULL)
        return true; /* a test's own store */
    while (!is_named && n < at + 2 && fgets(line, sizeof line, file) != NULL)
        is_named = ++n >= at && strstr(line, "SHMQ_FAILPOINT(\"") != NULL;
    fclose(file);
    return is_named;
}

static inline bool is_at_named_spot(const char *name)
{
    int i = 0;
    while (i < KILLED_AT - 1 && check->spots[i].name[0] != 0 && strcmp(check->spots[i].name, name) != 0)
        i++;
    if (check->spots[i].name[0] == 0) {
        check->spots[i].is_named = reads_named_spot(name);
        snprintf(check->spots[i].name, sizeof check->spots[i].name, "%s", name);
    }
    return check->spots[i].is_named;
}

static inline void at_failpoint(const char *name)
{
    struct plan *plan = &check->plan;
    if (is_at_named_spot(name) || (plan->is_named_only && strchr(name, '.') != NULL))
        return;
    plan->hits++;
    snprintf(plan->last, sizeof plan->last, "%s", name);
    plan->is_decided = plan->is_decided || (plan->decides != NULL && strcmp(name, plan->decides) == 0);
    if (plan->on_hit != NULL)
        plan->on_hit(name);
    if (plan->hits == plan->at || (plan->name != NULL && strcmp(name, plan->name) == 0)) {
        shmq_failpoint = NULL; /* who is let go on later goes on undisturbed */
        raise(plan->signal);
    }
}

/* In a child: from here on the plan holds. */
static inline void arm(void) { shmq_failpoint = at_failpoint; }
static inline void disarm(void) { shmq_failpoint = NULL; }

/* In its parent, before it is started. */
static inline void plan(int signal, uint32_t at, const char *name)
{
    memset(&check->plan, 0, sizeof check->plan);
    check->plan.signal = signal;
    check->plan.at = at;
    check->plan.name = name;
}

static inline bool was_killed_at(const char *name)
{
    for (int i = 0; i < KILLED_AT && check->killed_at[i][0] != 0; i++)
        if (strcmp(check->killed_at[i], name) == 0)
            return true;
    return false;
}

/* Start `run` again and again, killed at its first failpoint, its second and so on, until it survives. `before` sets
 * the stage and `after` looks at what was left; the last time, nobody died. */
static inline void kill_at_every_failpoint(const char *what, void (*before)(void *arg), void (*run)(void *arg),
                                           void (*after)(void *arg), void *arg)
{
    for (uint32_t at = 1;; at++) {
        context("%s, about to be killed at failpoint %u", what, at);
        CHECK(at < 200);
        before(arg);
        plan(SIGKILL, at, NULL);
        int status = wait_child(start_child(run, arg), 0);
        context("%s, killed at failpoint %u of %u, %s", what, at, check->plan.hits, check->plan.last);
        CHECK(status == 0 || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
        check->kills += status != 0;
        if (status != 0 && !was_killed_at(check->plan.last))
            for (int i = 0; i < KILLED_AT; i++)
                if (check->killed_at[i][0] == 0) {
                    memcpy(check->killed_at[i], check->plan.last, sizeof check->plan.last);
                    break;
                }
        after(arg);
        if (status == 0)
            return;
    }
}

static inline bool is_store(const char *line)
{
    static const char *const not_shared[] = {"#define", "#undef", "calls", "_seen", "next_look_ns", "has_caught_up",
                                             "spin->", "lag->", "is_detached", "is_cut", "unbroken_sleeps", "cookie", "/*", "never"};
    if (strstr(line, "atomic_store") == NULL && strstr(line, "atomic_exchange") == NULL &&
        strstr(line, "atomic_fetch") == NULL && strstr(line, "atomic_compare") == NULL)
        return false;
    const char *comment = strstr(line, "/*");
    for (size_t i = 0; i < sizeof not_shared / sizeof *not_shared; i++) {
        const char *found = strstr(line, not_shared[i]);
        if (found != NULL && (comment == NULL || found < comment))
            return false;
    }
    return true;
}

/* Was somebody killed at each failpoint of this source: at each named spot and after each store? How many it has. */
static inline int died_everywhere_in(const char *folder, const char *source)
{
    char path[300], line[400], name[32] = "";
    int n = 0, at = 0;
    snprintf(path, sizeof path, "%s/%s", folder, source);
    FILE *file = fopen(path, "r");
    CHECK(file != NULL);
    while (fgets(line, sizeof line, file) != NULL) {
        const char *spot = strstr(line, "SHMQ_FAILPOINT(\"");
        bool died = true;
        at++;
        if (spot != NULL && sscanf(spot, "SHMQ_FAILPOINT(\"%23[^\"]", name) == 1) {
            n++;
            died = was_killed_at(name);
        } else if (is_store(line)) {
            snprintf(name, sizeof name, "%.20s:%d", source, at);
            n++;
            died = reads_named_spot(name) || was_killed_at(name);
        }
        context("nobody was killed at \"%s\" of %s (when all tests are run)", name, source);
        CHECK(died);
    }
    fclose(file);
    return n;
}

static inline void tell_deaths(int failpoints, const char *sources)
{
    CHECK(failpoints > 0);
    printf("%u kills, at each of the %d failpoints of %s\n", check->kills, failpoints, sources);
    fflush(stdout);
}

/* ---- items: the method is the item's number, and every byte depends on it and on its place */

static inline uint64_t item_word(uint64_t id, uint64_t i)
{
    uint64_t x = (id + 1) * UINT64_C(0x9e3779b97f4a7c15) + i * UINT64_C(0xd1342543de82ef95);
    return x ^ x >> 29;
}

static inline void item_fill(uint8_t *to, uint64_t id, size_t len)
{
    for (size_t i = 0; i < len; i += 8) {
        uint64_t word = item_word(id, i);
        memcpy(to + i, &word, len - i < 8 ? len - i : 8);
    }
}

static inline void item_check(const uint8_t *from, uint64_t id, size_t len)
{
    for (size_t i = 0; i < len; i += 8) {
        uint64_t word = item_word(id, i);
        if (memcmp(from + i, &word, len - i < 8 ? len - i : 8) != 0)
            check_failed(__FILE__, __LINE__, "a torn item and the offset", (intmax_t)id, (intmax_t)i);
    }
}

static inline int item_put(struct shmq *q, uint32_t id, size_t len, unsigned ms)
{
    uint8_t *payload = malloc(len + 1);
    CHECK(payload != NULL);
    item_fill(payload, id, len);
    struct shmq_part part = {payload, len};
    struct shmq_out out = shmq_out(&part, 1, id, false);
    uint64_t deadline = in_ms(ms);
    uint32_t done;
    int rc;
    while ((rc = shmq_put_wait(q, &out, 1, &done, deadline)) == SHMQ_INTR)
        ;
    free(payload);
    CHECK_EQ(done, rc == SHMQ_OK);
    return rc;
}

/* What came, checked and done with. */
static inline uint32_t item_accept(struct shmq *q, struct shmq_in *in)
{
    uint32_t id = in->method;
    item_check(in->payload, id, in->len);
    if (in->hand >= 0)
        shmq_release(q, in->hand);
    free(in->heap);
    return id;
}

static inline int item_get(struct shmq *q, uint32_t *id, unsigned ms)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    uint64_t deadline = in_ms(ms);
    int rc;
    while ((rc = shmq_get_wait(q, scratch, &in, deadline)) == SHMQ_INTR)
        ;
    if (rc == SHMQ_OK)
        *id = item_accept(q, &in);
    return rc;
}

static inline void puts_ok(struct shmq *q, uint32_t id, size_t len)
{
    CHECK_EQ(item_put(q, id, len, STATE_MS), SHMQ_OK);
}

static inline void gets(struct shmq *q, uint32_t id)
{
    uint32_t got = 0;
    CHECK_EQ(item_get(q, &got, STATE_MS), SHMQ_OK);
    CHECK_EQ(got, id);
}

/* As a program does that nobody interrupts, for 5 s. */
static inline int open_queue(struct shmq **q, const char *path, uint64_t capacity, uint32_t mode,
                             struct shmq_fault *fault)
{
    uint64_t deadline = in_ms(5000);
    int rc;
    while ((rc = shmq_open(q, path, capacity, mode, deadline, fault)) == SHMQ_INTR)
        ;
    return rc;
}

static inline struct shmq *attach_to(const char *path, uint64_t capacity)
{
    struct shmq *q;
    struct shmq_fault fault = {0};
    int rc = open_queue(&q, path, capacity, 0600, &fault);
    if (rc != SHMQ_OK)
        check_failed(__FILE__, __LINE__, fault.what, rc, fault.error);
    return q;
}

static inline struct shmq *attach(uint64_t capacity) { return attach_to(check_path, capacity); }

static inline void complain(void *arg, const char *line)
{
    fprintf(stderr, "check: %s; %s\n", line, check->context);
    ++*(int *)arg;
}

/* shmq_check() as its callers use it: again and again until a deadline, 1 s from now. */
static inline int look_at_all(struct shmq *q, void (*report)(void *arg, const char *line), void *arg)
{
    uint64_t deadline = shmq_now_ns() + UINT64_C(1000000000);
    int rc;
    while ((rc = shmq_check(q, report, arg, deadline)) == SHMQ_INTR)
        ;
    return rc;
}

static inline int broken_invariants(struct shmq *q)
{
    int n = 0;
    CHECK_EQ(look_at_all(q, complain, &n), SHMQ_OK);
    return n;
}

/* ---- the runner */

struct test {
    const char *name;
    void (*run)(void);
};
#define TEST(name) {#name, name}

/* Remove this program's segments; how many there were. */
static inline int remove_segments(void)
{
    char prefix[64], path[300];
    int n = 0;
    snprintf(prefix, sizeof prefix, "shmqueue.ctest-%d-", (int)check_main);
    DIR *folder = opendir("/dev/shm");
    for (struct dirent *e; folder != NULL && (e = readdir(folder)) != NULL;) {
        if (strncmp(e->d_name, prefix, strlen(prefix)) != 0)
            continue;
        snprintf(path, sizeof path, "/dev/shm/%s", e->d_name);
        n += remove(path) == 0;
    }
    if (folder != NULL)
        closedir(folder);
    return n;
}

static volatile pid_t check_running;

static inline void end_children(void)
{
    if (check_running > 0)
        kill(-check_running, SIGKILL);
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR) /* orphans too: we are their reaper */
        ;
}

static inline void end_early(int signal)
{
    end_children();
    remove_segments();
    _exit(128 + signal);
}

static inline bool run_test(const struct test *test, int number)
{
    int status = 0;
    check->context[0] = 0;
    plan(0, 0, NULL);
    snprintf(check_path, sizeof check_path, "/dev/shm/shmqueue.ctest-%d-%d", (int)check_main, number);
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        setpgid(0, 0);
        signal(SIGTERM, SIG_DFL);
        signal(SIGINT, SIG_DFL);
        enter_child(check_main);
        alarm(LIMIT_S);
        test->run();
        exit(0);
    }
    setpgid(pid, pid);
    check_running = pid;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    end_children();
    check_running = 0;
    int left = remove_segments();
    if (WIFSIGNALED(status))
        fprintf(stderr, "%s: %s; %s\n", test->name, strsignal(WTERMSIG(status)), check->context);
    if (status == 0 && left > 0)
        fprintf(stderr, "%s: left a segment behind\n", test->name);
    return status == 0 && left == 0;
}

static inline int run_tests(const struct test *tests, int n, int argc, char **argv)
{
    int passed = 0, failed = 0;
    check_main = getpid();
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    signal(SIGTERM, end_early);
    signal(SIGINT, end_early);
    check = mmap(NULL, sizeof *check, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < n && check != MAP_FAILED; i++) {
        bool is_chosen = argc < 2;
        for (int k = 1; k < argc; k++)
            is_chosen = is_chosen || strstr(tests[i].name, argv[k]) != NULL;
        if (!is_chosen)
            continue;
        uint64_t start = shmq_now_ns();
        bool is_ok = run_test(&tests[i], i);
        passed += is_ok;
        failed += !is_ok;
        if (!is_ok || getenv("CHECK_VERBOSE") != NULL)
            printf("%-7s %s, %" PRIu64 " ms\n", is_ok ? "passed" : "FAILED", tests[i].name,
                   (shmq_now_ns() - start) / 1000000u);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0 || passed == 0;
}

#define RUN_TESTS(tests)                                                                                               \
    int main(int argc, char **argv) { return run_tests(tests, (int)(sizeof tests / sizeof *tests), argc, argv); }

#endif
