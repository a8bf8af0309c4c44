/* test_attach.c - a segment's life and who is alive (attach.c): create, attach, fork, detach, unlink, and deaths in
 * between. */
#include "check.h"

#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#define PAGE port_page_size()

static bool exists(void) { return access(check_path, F_OK) == 0; }

static bool is_same_queue(const struct shmq *a, const struct shmq *b)
{
    return memcmp(shmq_uuid(a), shmq_uuid(b), 16) == 0;
}

static void closes(struct shmq *q)
{
    CHECK_EQ(shmq_close(q, false), SHMQ_OK);
    shmq_free(q);
}

/* What shmq_open() says when it isn't OK. */
static int refused(uint64_t capacity, struct shmq_fault *fault)
{
    struct shmq *q;
    int rc = open_queue(&q, check_path, capacity, 0600, fault);
    CHECK(rc != SHMQ_OK && q == NULL);
    return rc;
}

static int open_descriptors(void)
{
    int n = 0;
    for (int fd = 0; fd < 2048; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

/* ---- create, attach, detach, unlink */

static void test_first_creates_and_others_attach(void)
{
    struct shmq *a = attach(PAGE), *b = attach(5 * PAGE), *c = attach(PAGE);
    CHECK(shmq_was_created(a) && !shmq_was_created(b) && !shmq_was_created(c));
    CHECK(is_same_queue(a, b) && is_same_queue(a, c));
    CHECK_EQ(shmq_capacity(b), PAGE); /* the creator's wish counts */
    CHECK_EQ(shmq_refs(a), 3);
    puts_ok(a, 1, 100);
    gets(b, 1);
    closes(b);
    CHECK_EQ(shmq_refs(c), 2);
    closes(a);
    CHECK(exists());
    closes(c);
    CHECK(!exists());
}

static void test_segment_has_its_size_and_mode_whatever_the_umask(void)
{
    struct shmq *q;
    struct shmq_fault fault;
    struct stat st;
    umask(0777);
    CHECK_EQ(open_queue(&q, check_path, 3 * PAGE, 0640, &fault), SHMQ_OK);
    CHECK_EQ(stat(check_path, &st), 0);
    CHECK_EQ(st.st_mode & 07777, 0640);
    CHECK_EQ((uint64_t)st.st_size, q->seg->hdr.ring_offset + 3 * PAGE);
    CHECK((uint64_t)st.st_blocks * 512 >= (uint64_t)st.st_size);
    closes(q);
}

static void test_new_queue_of_the_name_is_another(void)
{
    uint8_t uuid[16];
    struct shmq *q = attach(PAGE);
    memcpy(uuid, shmq_uuid(q), 16);
    puts_ok(q, 1, 10);
    closes(q);
    q = attach(2 * PAGE);
    uint32_t id;
    CHECK(memcmp(uuid, shmq_uuid(q), 16) != 0);
    CHECK_EQ(item_get(q, &id, 0), SHMQ_EMPTY);
    closes(q);
}

static void test_everything_is_refused_once_closed(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in[1];
    struct shmq_part part = {"x", 1};
    struct shmq_out out = shmq_out(&part, 1, 0, false);
    uint32_t n = 1;
    struct shmq *q = attach(PAGE);
    CHECK_EQ(shmq_close(q, false), SHMQ_OK);
    CHECK_EQ(shmq_close(q, true), SHMQ_OK);
    CHECK_EQ(shmq_usable(q), SHMQ_CLOSED);
    CHECK_EQ(shmq_hold(q), SHMQ_CLOSED);
    CHECK_EQ(shmq_put_try(q, &out, 1, &n), SHMQ_CLOSED);
    CHECK_EQ(shmq_put_wait(q, &out, 1, &n, SHMQ_FOREVER), SHMQ_CLOSED);
    CHECK_EQ(shmq_get_try(q, scratch, in), SHMQ_CLOSED);
    CHECK_EQ(shmq_get_wait(q, scratch, in, SHMQ_FOREVER), SHMQ_CLOSED);
    CHECK_EQ(shmq_get_batch_try(q, in, &n), SHMQ_CLOSED);
    CHECK_EQ(shmq_clear(q, SHMQ_FOREVER), SHMQ_CLOSED);
    CHECK_EQ(look_at_all(q, complain, &n), SHMQ_CLOSED);
    CHECK_EQ(shmq_adopt(q), SHMQ_CLOSED);
    CHECK_EQ(shmq_fork_before(q), SHMQ_CLOSED);
    shmq_fork_parent(q);
    shmq_free(q);
}

static void test_nothing_is_left_open_or_mapped(void)
{
    struct shmq_fault fault;
    char line[512];
    attach(PAGE); /* so that what is made once is there */
    int before = open_descriptors();
    for (int i = 0; i < 20; i++)
        closes(attach(PAGE));
    CHECK_EQ(truncate(check_path, 5), 0); /* not ours any more */
    for (int i = 0; i < 20; i++)
        CHECK_EQ(refused(PAGE, &fault), SHMQ_CORRUPT);
    CHECK_EQ(open_descriptors(), before);
    FILE *maps = fopen("/proc/self/maps", "r");
    int n = 0;
    while (fgets(line, sizeof line, maps) != NULL)
        n += strstr(line, check_path) != NULL;
    fclose(maps);
    CHECK_EQ(n, 3); /* the first attachment's: segment, mirror, pin */
    CHECK_EQ(unlink(check_path), 0);
    _exit(0);
}

static void test_close_leaves_a_name_alone_that_leads_elsewhere(void)
{
    struct shmq *a = attach(PAGE);
    CHECK_EQ(unlink(check_path), 0);
    struct shmq *b = attach(PAGE);
    CHECK(!is_same_queue(a, b));
    puts_ok(a, 1, 10); /* it goes on, nameless */
    gets(a, 1);
    closes(a);
    CHECK(exists());
    closes(b);
    CHECK(!exists());
}

/* ---- many at once */

struct crowd {
    _Atomic int ready;
    _Atomic bool go, may_leave;
    _Atomic uint64_t uuid[8]; /* of who is attached now, half of it */
};

static void attach_together(void *arg)
{
    struct crowd *crowd = arg;
    crowd->ready++;
    WAIT_FOR(crowd->go);
    struct shmq *q = attach(PAGE);
    puts_ok(q, 1, 20);
    crowd->ready--;
    WAIT_FOR(crowd->may_leave);
    closes(q);
}

static void test_many_that_come_at_once_share_one_queue(void)
{
    for (int round = 0; round < 20; round++) {
        struct crowd *crowd = shared_bytes(sizeof *crowd);
        pid_t pids[6];
        for (int i = 0; i < 6; i++)
            pids[i] = start_child(attach_together, crowd);
        WAIT_FOR(crowd->ready == 6);
        struct shmq *q = round % 2 ? attach(PAGE) : NULL;
        crowd->go = true;
        if (q == NULL) {
            WAIT_FOR(crowd->ready < 6);
            q = attach(PAGE);
        }
        for (int i = 0; i < 6; i++)
            gets(q, 1);
        crowd->may_leave = true;
        for (int i = 0; i < 6; i++)
            child_ends_well(pids[i]);
        CHECK_EQ(shmq_refs(q), 1);
        closes(q);
        CHECK(!exists());
        munmap(crowd, sizeof *crowd);
    }
}

static void *come_and_go(void *arg)
{
    struct crowd *crowd = arg;
    int self = atomic_fetch_add(&crowd->ready, 1);
    for (int round = 0; round < 400; round++) {
        struct shmq *q = attach((1 + (uint64_t)round % 3) * PAGE);
        uint64_t uuid;
        memcpy(&uuid, shmq_uuid(q), 8);
        crowd->uuid[self] = uuid;
        for (int i = 0; i < 8; i++) {
            uint64_t other = crowd->uuid[i];
            CHECK(other == 0 || other == uuid); /* all who are attached at one time have one queue */
        }
        if (round % 7 == 0)
            puts_ok(q, 1, 8);
        crowd->uuid[self] = 0;
        closes(q);
    }
    return NULL;
}

static void process_comes_and_goes(void *arg) { come_and_go(arg); }

static void test_coming_and_going_never_makes_two_queues_of_one_name(void)
{
    struct crowd *crowd = shared_bytes(sizeof *crowd);
    pid_t pids[4];
    for (int i = 0; i < 4; i++)
        pids[i] = start_child(process_comes_and_goes, crowd);
    for (int i = 0; i < 4; i++)
        child_ends_well(pids[i]);
    CHECK(!exists());
}

static void test_threads_come_and_go(void)
{
    struct crowd *crowd = shared_bytes(sizeof *crowd);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, come_and_go, crowd), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    CHECK(!exists());
}

static void test_last_slot_is_the_512th(void)
{
    static struct shmq *all[SHMQ_SLOTS];
    struct shmq_fault fault;
    for (uint32_t i = 0; i < SHMQ_SLOTS; i++)
        all[i] = attach(PAGE);
    CHECK_EQ(shmq_refs(all[0]), SHMQ_SLOTS);
    CHECK_EQ(refused(PAGE, &fault), SHMQ_NO_SLOT);
    CHECK_EQ(fault.found, SHMQ_SLOTS);
    CHECK_EQ(shmq_fork_before(all[0]), SHMQ_GONE); /* no room for a child */
    closes(all[100]);
    all[100] = attach(PAGE);
    puts_ok(all[100], 3, 30);
    gets(all[SHMQ_SLOTS - 1], 3);
    for (uint32_t i = 0; i < SHMQ_SLOTS; i++)
        closes(all[i]);
    CHECK(!exists());
}

/* ---- orphans: everybody was killed */

static void put_three_and_stop(void *capacity)
{
    struct shmq *q = attach(*(uint64_t *)capacity);
    for (uint32_t id = 1; id <= 3; id++)
        puts_ok(q, id, id * 3000);
    raise(SIGSTOP);
}

static void claim_one_and_stop(void *capacity)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    struct shmq *q = attach(*(uint64_t *)capacity);
    puts_ok(q, 1, SHMQ_SMALL + 1);
    CHECK(shmq_get_try(q, scratch, &in) == SHMQ_OK && in.hand >= 0);
    raise(SIGSTOP);
}

static void stop_attached(void *capacity)
{
    attach(*(uint64_t *)capacity);
    raise(SIGSTOP);
}

static void make_orphan(void (*run)(void *arg), uint64_t capacity)
{
    pid_t pid = start_child(run, &capacity);
    child_has_stopped(pid);
    kill_child(pid);
    CHECK(exists());
}

static void test_orphan_with_items_is_adopted_with_all_of_them(void)
{
    make_orphan(put_three_and_stop, 8 * PAGE);
    struct shmq *q = attach(4 * PAGE);
    CHECK(!shmq_was_created(q));
    CHECK_EQ(shmq_capacity(q), 8 * PAGE);
    CHECK_EQ(shmq_refs(q), 1);
    for (uint32_t id = 1; id <= 3; id++)
        gets(q, id);
    CHECK_EQ(broken_invariants(q), 0);
    closes(q);
    CHECK(!exists());
}

static void test_item_in_dead_hands_keeps_an_orphan_too(void)
{
    make_orphan(claim_one_and_stop, 8 * PAGE);
    struct shmq *q = attach(4 * PAGE);
    CHECK(!shmq_was_created(q));
    gets(q, 1);
    closes(q);
}

static void test_empty_orphan_of_another_size_is_replaced(void)
{
    make_orphan(stop_attached, 8 * PAGE);
    struct shmq *q = attach(4 * PAGE);
    CHECK(shmq_was_created(q));
    CHECK_EQ(shmq_capacity(q), 4 * PAGE);
    closes(q);
    make_orphan(stop_attached, 8 * PAGE);
    q = attach(8 * PAGE);
    CHECK(!shmq_was_created(q));
    closes(q);
}

static void test_empty_queue_of_another_size_that_lives_is_not(void)
{
    uint64_t capacity = 8 * PAGE;
    pid_t pid = start_child(stop_attached, &capacity);
    child_has_stopped(pid);
    struct shmq *q = attach(4 * PAGE);
    CHECK(!shmq_was_created(q) && shmq_capacity(q) == 8 * PAGE);
    CHECK_EQ(shmq_refs(q), 2);
    kill_child(pid);
    CHECK_EQ(shmq_refs(q), 1);
    closes(q);
}

/* ---- files that are no segments */

static void write_file(const void *bytes, size_t n, uint64_t size)
{
    int fd = open(check_path, O_CREAT | O_EXCL | O_RDWR, 0600);
    CHECK(fd >= 0 && write(fd, bytes, n) == (ssize_t)n && ftruncate(fd, (off_t)size) == 0);
    close(fd);
}

/* The file is still there and still the same. */
static void refuses_and_leaves(int status, const char *what, ino_t inode)
{
    struct shmq_fault fault = {0};
    struct stat st;
    CHECK_EQ(refused(PAGE, &fault), status);
    CHECK(strcmp(fault.what, what) == 0);
    CHECK(lstat(check_path, &st) == 0 && (inode == 0 || st.st_ino == inode));
    CHECK_EQ(remove(check_path), 0);
}

static void test_foreign_files_are_refused_and_left_alone(void)
{
    static const char text[] = "This is no segment.\n";
    uint64_t offset = (sizeof(struct shmq_segment) + PAGE - 1) / PAGE * PAGE;
    write_file("", 0, 0);
    refuses_and_leaves(SHMQ_CORRUPT, "file size", 0);
    write_file(text, sizeof text, sizeof text);
    refuses_and_leaves(SHMQ_CORRUPT, "file size", 0);
    write_file("", 0, offset + PAGE);
    refuses_and_leaves(SHMQ_CORRUPT, "magic", 0);
    write_file(text, sizeof text, offset + PAGE);
    refuses_and_leaves(SHMQ_CORRUPT, "magic", 0);
}

static void test_segments_whose_header_cannot_be_are_refused(void)
{
    uint32_t offset = (uint32_t)((sizeof(struct shmq_segment) + PAGE - 1) / PAGE * PAGE);
    const struct {
        struct shmq_segment_hdr hdr;
        uint64_t size;
        int status;
        const char *what;
    } cases[] = {
        {{SHMQ_MAGIC + 1, SHMQ_FORMAT, offset, PAGE, {0}, 0, {0}}, offset + PAGE, SHMQ_CORRUPT, "magic"},
        {{SHMQ_MAGIC, SHMQ_FORMAT + 1, offset, PAGE, {0}, 0, {0}}, offset + PAGE, SHMQ_VERSION, "format"},
        {{SHMQ_MAGIC, 0, offset, PAGE, {0}, 0, {0}}, offset + PAGE, SHMQ_VERSION, "format"},
        {{SHMQ_MAGIC, SHMQ_FORMAT, 0, PAGE, {0}, 0, {0}}, offset + PAGE, SHMQ_CORRUPT, "ring_offset"},
        {{SHMQ_MAGIC, SHMQ_FORMAT, offset + 4096, PAGE, {0}, 0, {0}}, offset + PAGE, SHMQ_CORRUPT, "ring_offset"},
        {{SHMQ_MAGIC, SHMQ_FORMAT, offset, 0, {0}, 0, {0}}, offset, SHMQ_CORRUPT, "capacity"},
        {{SHMQ_MAGIC, SHMQ_FORMAT, offset, PAGE + 1, {0}, 0, {0}}, offset + PAGE + 1, SHMQ_CORRUPT, "capacity"},
        {{SHMQ_MAGIC, SHMQ_FORMAT, offset, -PAGE, {0}, 0, {0}}, offset + PAGE, SHMQ_CORRUPT, "capacity"},
        {{SHMQ_MAGIC, SHMQ_FORMAT, offset, 2 * PAGE, {0}, 0, {0}}, offset + PAGE, SHMQ_CORRUPT, "file size"},
        {{SHMQ_MAGIC, SHMQ_FORMAT, offset, PAGE, {0}, 0, {0}}, offset + 2 * PAGE, SHMQ_CORRUPT, "file size"},
        {{SHMQ_MAGIC, SHMQ_FORMAT, offset, PAGE, {0}, 0, {0}}, offset - 1, SHMQ_CORRUPT, "file size"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        context("case %zu", i);
        write_file(&cases[i].hdr, sizeof cases[i].hdr, cases[i].size);
        refuses_and_leaves(cases[i].status, cases[i].what, 0);
    }
}

static void test_truncated_segment_is_refused(void)
{
    make_orphan(put_three_and_stop, 8 * PAGE);
    struct stat st;
    CHECK_EQ(stat(check_path, &st), 0);
    CHECK_EQ(truncate(check_path, st.st_size - (off_t)PAGE), 0);
    refuses_and_leaves(SHMQ_CORRUPT, "file size", st.st_ino);
}

static void test_other_kinds_of_files_are_refused_at_once(void)
{
    struct shmq_fault fault;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char target[80];
    uint64_t start = shmq_now_ns();
    CHECK_EQ(mkfifo(check_path, 0600), 0);
    refuses_and_leaves(SHMQ_CORRUPT, "kind of file", 0);
    snprintf(target, sizeof target, "%s.target", check_path);
    struct shmq *q = attach_to(target, PAGE);
    CHECK_EQ(symlink(target, check_path), 0);
    refuses_and_leaves(SHMQ_CORRUPT, "kind of file", 0);
    closes(q);
    CHECK_EQ(mkdir(check_path, 0700), 0);
    CHECK_EQ(refused(PAGE, &fault), SHMQ_CORRUPT);
    CHECK(strcmp(fault.what, "kind of file") == 0);
    CHECK_EQ(rmdir(check_path), 0);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", check_path);
    CHECK_EQ(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    CHECK_EQ(refused(PAGE, &fault), SHMQ_CORRUPT);
    CHECK(strcmp(fault.what, "kind of file") == 0);
    CHECK_EQ(unlink(check_path), 0);
    CHECK(shmq_now_ns() - start < UINT64_C(5000000000));
}

static void test_impossible_wishes_leave_nothing_behind(void)
{
    struct shmq_fault fault;
    struct shmq *q;
    CHECK_EQ(refused(UINT64_C(1) << 45, &fault), SHMQ_SYSTEM);
    CHECK(fault.error == ENOSPC && fault.found > UINT64_C(1) << 45 && fault.allowed > 0);
    CHECK_EQ(refused(UINT64_C(1) << 60, &fault), SHMQ_SYSTEM);
    CHECK_EQ(refused(PAGE + 1, &fault), SHMQ_CORRUPT);
    CHECK_EQ(open_queue(&q, "/nowhere/at-all", PAGE, 0600, &fault), SHMQ_SYSTEM);
    CHECK_EQ(fault.error, ENOENT);
    CHECK(!exists());
}

static void open_as_nobody(void *arg)
{
    struct shmq_fault fault;
    (void)arg;
    CHECK(setgid(65534) == 0 && setuid(65534) == 0);
    CHECK_EQ(refused(PAGE, &fault), SHMQ_SYSTEM);
    CHECK_EQ(fault.error, EACCES);
}

static void test_another_users_queue_is_refused(void)
{
    if (getuid() != 0)
        return;
    struct shmq *q = attach(PAGE);
    child_ends_well(start_child(open_as_nobody, NULL));
    closes(q);
}

/* ---- who is alive */

static uint64_t *self_of_child; /* shared: its owner word */

static void tell_self_and_stop(void *arg)
{
    (void)arg;
    struct shmq *q = attach(PAGE);
    *self_of_child = q->self;
    raise(SIGSTOP);
    closes(q);
}

static void test_frozen_is_alive_and_killed_is_dead(void)
{
    struct shmq *q = attach(PAGE);
    self_of_child = shared_bytes(8);
    pid_t pid = start_child(tell_self_and_stop, NULL);
    child_has_stopped(pid);
    CHECK(!shmq_is_dead(q, q->self));
    CHECK(!shmq_is_dead(q, *self_of_child));
    CHECK_EQ(shmq_refs(q), 2);
    kill_child(pid);
    CHECK(shmq_is_dead(q, *self_of_child));
    CHECK_EQ(shmq_refs(q), 1);
    closes(q);
}

static void test_who_has_left_is_dead_also_when_its_slot_is_anothers(void)
{
    struct shmq *q = attach(PAGE), *a = attach(PAGE);
    uint64_t first = a->self;
    closes(a);
    CHECK(shmq_is_dead(q, first));
    a = attach(PAGE);
    CHECK_EQ(shmq_slot_of(a->self), shmq_slot_of(first));
    CHECK(a->self > first);
    CHECK(shmq_is_dead(q, first) && !shmq_is_dead(q, a->self));
    closes(a);
    closes(q);
}

static void test_words_that_name_no_slot_are_dead(void)
{
    struct shmq *q = attach(PAGE);
    CHECK(shmq_is_dead(q, 0));
    CHECK(shmq_is_dead(q, shmq_owner_of(77, SHMQ_SLOTS)));
    CHECK(shmq_is_dead(q, UINT64_MAX - 1));
    CHECK(shmq_is_dead(q, shmq_owner_of(1, 300))); /* a slot nobody was ever in */
    closes(q);
}

static void lose_descriptors_and_lock(void *other)
{
    struct shmq *q = attach(PAGE);
    for (int fd = 3; fd < 256; fd++)
        close(fd);
    for (int i = 0; other != NULL && i < 20; i++)
        CHECK(open("/dev/null", O_RDWR) >= 0); /* the numbers are others' now */
    CHECK_EQ(shmq_enter_side(q, SHMQ_PRODUCING, in_ms(STATE_MS)), SHMQ_OK);
    raise(SIGSTOP);
    shmq_leave_side(q, SHMQ_PRODUCING);
    CHECK_EQ(shmq_refs(q), 2);
    gets(q, 1);
    CHECK_EQ(shmq_close(q, false), SHMQ_OK);
    for (int fd = 3; other != NULL && fd < 20; fd++)
        CHECK(fcntl(fd, F_GETFD) >= 0); /* none of the others' was closed */
}

static void test_process_that_closed_all_descriptors_is_never_robbed(void)
{
    for (uintptr_t others = 0; others < 2; others++) {
        struct shmq *q = attach(PAGE);
        pid_t pid = start_child(lose_descriptors_and_lock, (void *)others);
        child_has_stopped(pid);
        uint64_t word = shmq_side(q, SHMQ_PRODUCING)->lock;
        CHECK_EQ(shmq_lock_pid(q, SHMQ_PRODUCING), pid);
        CHECK_EQ(item_put(q, 1, 100, 200), SHMQ_BUSY);
        CHECK_EQ(shmq_side(q, SHMQ_PRODUCING)->lock & ~SHMQ_CONTENDED, word);
        CHECK_EQ(kill(pid, SIGCONT), 0);
        puts_ok(q, 1, 100);
        child_ends_well(pid);
        CHECK_EQ(shmq_refs(q), 1);
        closes(q);
        CHECK(!exists());
    }
}

static void test_prober_that_lost_its_descriptors_still_finds_the_dead(void)
{
    struct shmq *q = attach(PAGE);
    self_of_child = shared_bytes(8);
    pid_t pid = start_child(tell_self_and_stop, NULL);
    child_has_stopped(pid);
    int fd = q->probe_fd;
    close(fd);
    CHECK_EQ(dup2(open("/dev/null", O_RDWR), fd) >= 0, true);
    CHECK(!shmq_is_dead(q, *self_of_child));
    kill_child(pid);
    CHECK(shmq_is_dead(q, *self_of_child));
    close(q->probe_fd);
    CHECK_EQ(unlink(check_path), 0);
    CHECK(!shmq_is_dead(q, *self_of_child)); /* nobody to ask: alive when in doubt */
    closes(q);
}

/* ---- references */

static void test_manual_references_go_with_their_attachment(void)
{
    struct shmq *a = attach(PAGE), *b = attach(PAGE);
    shmq_ref_add(a);
    shmq_ref_add(b);
    shmq_ref_add(b);
    CHECK_EQ(shmq_refs(a), 5);
    CHECK(shmq_ref_drop(a));
    CHECK_EQ(shmq_refs(a), 4);
    CHECK(shmq_ref_drop(a)); /* one of b's */
    CHECK_EQ(shmq_refs(a), 3);
    closes(b);
    CHECK_EQ(shmq_refs(a), 1);
    CHECK(!shmq_ref_drop(a));
    closes(a);
}

/* ---- forks */

static struct shmq *inherited;

static void child_with_hook(void *arg)
{
    (void)arg;
    CHECK_EQ(shmq_usable(inherited), SHMQ_FORKED);
    CHECK_EQ(shmq_fork_child(inherited), SHMQ_OK);
    CHECK_EQ(shmq_usable(inherited), SHMQ_OK);
    CHECK_EQ(shmq_refs(inherited), 2);
    puts_ok(inherited, 1, 50);
}

/* A fork with all three steps; `run` is the child's part, from its own step on. */
static pid_t fork_with_hooks(struct shmq *q, void (*run)(void *arg))
{
    inherited = q;
    CHECK_EQ(shmq_fork_before(q), SHMQ_OK);
    pid_t pid = start_child(run, NULL);
    shmq_fork_parent(q);
    return pid;
}

static void test_forked_child_has_an_attachment_of_its_own(void)
{
    struct shmq *q = attach(PAGE);
    int before = open_descriptors();
    child_ends_well(fork_with_hooks(q, child_with_hook));
    CHECK_EQ(open_descriptors(), before);
    CHECK_EQ(shmq_refs(q), 1); /* its exit takes its own attachment along, and nothing of ours */
    gets(q, 1);
    CHECK(exists());
    closes(q);
}

static void child_that_closes_and_stays(void *arg)
{
    (void)arg;
    CHECK_EQ(shmq_fork_child(inherited), SHMQ_OK);
    CHECK_EQ(shmq_close(inherited, false), SHMQ_OK);
    raise(SIGSTOP);
}

static void test_forked_child_that_closes_is_no_reference_while_it_lives(void)
{
    struct shmq *q = attach(PAGE);
    pid_t pid = fork_with_hooks(q, child_that_closes_and_stays);
    child_has_stopped(pid);
    CHECK_EQ(shmq_refs(q), 1);
    closes(q);
    CHECK(!exists()); /* else nobody would remove it */
    let_child_end(pid);
}

static uint64_t *selves;

/* Of two that come with one slot, one gets it and the other an attachment of its own. */
static void child_of_two_forks(void *arg)
{
    int rc = shmq_fork_child(inherited);
    CHECK(rc == SHMQ_OK || rc == SHMQ_GONE);
    if (rc == SHMQ_GONE)
        CHECK_EQ(shmq_adopt(inherited), SHMQ_OK);
    selves[(uintptr_t)arg] = inherited->self;
    raise(SIGSTOP);
    CHECK_EQ(shmq_close(inherited, false), SHMQ_OK);
}

static void test_children_of_two_forks_at_once_are_two(void)
{
    pid_t pid[2];
    struct shmq *q = inherited = attach(PAGE);
    selves = shared_bytes(2 * sizeof *selves);
    CHECK_EQ(shmq_fork_before(q), SHMQ_OK);
    for (uintptr_t i = 0; i < 2; i++)
        pid[i] = start_child(child_of_two_forks, (void *)i);
    shmq_fork_parent(q);
    for (int i = 0; i < 2; i++)
        child_has_stopped(pid[i]);
    CHECK(selves[0] != selves[1] && selves[0] != q->self && selves[1] != q->self);
    CHECK_EQ(shmq_refs(q), 3);
    for (int i = 0; i < 2; i++)
        let_child_end(pid[i]);
    CHECK_EQ(shmq_refs(q), 1);
    closes(q);
    CHECK(!exists());
}

static void child_that_is_late(void *arg)
{
    raise(SIGSTOP);
    CHECK(exists());
    CHECK_EQ(shmq_fork_child(inherited), SHMQ_OK);
    CHECK_EQ(shmq_refs(inherited), 1);
    gets(inherited, 7);
    CHECK_EQ(shmq_close(inherited, false), SHMQ_OK);
    CHECK(!exists());
    (void)arg;
}

static void test_queue_stays_while_a_child_is_on_its_way(void)
{
    struct shmq *q = attach(PAGE);
    puts_ok(q, 7, 70);
    pid_t pid = fork_with_hooks(q, child_that_is_late);
    child_has_stopped(pid);
    CHECK_EQ(shmq_refs(q), 2);
    closes(q);
    CHECK(exists());
    let_child_end(pid);
    CHECK(!exists());
}

static void test_fork_that_failed_leaves_no_reference(void)
{
    struct shmq *q = attach(PAGE);
    CHECK_EQ(shmq_fork_before(q), SHMQ_OK);
    CHECK_EQ(shmq_refs(q), 2);
    shmq_fork_parent(q);
    CHECK_EQ(shmq_refs(q), 1);
    closes(q);
}

static void child_of_a_closed_handle(void *arg)
{
    (void)arg;
    CHECK_EQ(shmq_fork_child(inherited), SHMQ_CLOSED);
    CHECK_EQ(shmq_usable(inherited), SHMQ_CLOSED);
}

static void test_handle_closed_during_a_fork_leaves_nothing_behind(void)
{
    for (int does_fork = 0; does_fork < 2; does_fork++) {
        struct shmq *q = inherited = attach(PAGE);
        CHECK_EQ(shmq_fork_before(q), SHMQ_OK);
        CHECK_EQ(shmq_close(q, false), SHMQ_OK);
        pid_t pid = does_fork ? start_child(child_of_a_closed_handle, NULL) : 0;
        shmq_fork_parent(q);
        if (does_fork)
            child_ends_well(pid);
        CHECK(!exists());
        shmq_free(q);
    }
}

static void child_without_hook(void *arg)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    struct shmq_part part = {"x", 1};
    struct shmq_out out = shmq_out(&part, 1, 0, false);
    uint32_t n;
    struct shmq *q = inherited;
    CHECK_EQ(shmq_usable(q), SHMQ_FORKED);
    CHECK_EQ(shmq_hold(q), SHMQ_FORKED);
    CHECK_EQ(shmq_put_try(q, &out, 1, &n), SHMQ_FORKED);
    CHECK_EQ(shmq_put_wait(q, &out, 1, &n, 0), SHMQ_FORKED);
    CHECK_EQ(shmq_get_try(q, scratch, &in), SHMQ_FORKED);
    CHECK_EQ(shmq_get_wait(q, scratch, &in, 0), SHMQ_FORKED);
    CHECK_EQ(shmq_get_batch_try(q, &in, &n), SHMQ_FORKED);
    CHECK_EQ(shmq_clear(q, 0), SHMQ_FORKED);
    if (arg == NULL)
        return;
    CHECK_EQ(shmq_adopt(q), SHMQ_OK);
    CHECK_EQ(shmq_usable(q), SHMQ_OK);
    CHECK_EQ(shmq_refs(q), 2);
    puts_ok(q, 1, 50);
    CHECK_EQ(shmq_close(q, false), SHMQ_OK);
}

static void test_child_without_hooks_is_told_and_can_adopt(void)
{
    struct shmq *q = inherited = attach(PAGE);
    child_ends_well(start_child(child_without_hook, NULL));
    child_ends_well(start_child(child_without_hook, q));
    CHECK_EQ(shmq_refs(q), 1);
    gets(q, 1);
    closes(q);
}

static void test_raw_clone_is_told_and_can_adopt(void)
{
    struct shmq *q = inherited = attach(PAGE);
    pid_t pid = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
    if (pid == 0) {
        child_without_hook(q);
        _exit(0);
    }
    child_ends_well(pid);
    gets(q, 1);
    CHECK_EQ(shmq_refs(q), 1);
    closes(q);
}

static void child_that_closes(void *arg)
{
    (void)arg;
    shmq_free(inherited);
}

static void test_child_that_closes_what_is_its_parents_changes_nothing(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    struct shmq *q = inherited = attach(4 * PAGE);
    puts_ok(q, 1, 2 * PAGE);
    CHECK_EQ(shmq_hold(q), SHMQ_OK);
    CHECK(shmq_get_try(q, scratch, &in) == SHMQ_OK && in.hand >= 0);
    child_ends_well(start_child(child_that_closes, NULL));
    CHECK(exists());
    CHECK_EQ(shmq_refs(q), 1);
    CHECK(!shmq_is_dead(q, q->self));
    CHECK_EQ(item_accept(q, &in), 1);
    shmq_let_go(q);
    closes(q);
    CHECK(!exists());
}

static void child_of_a_gone_queue(void *arg)
{
    raise(SIGSTOP);
    CHECK_EQ(shmq_adopt(inherited), SHMQ_GONE);
    CHECK_EQ(shmq_usable(inherited), SHMQ_FORKED);
    shmq_free(inherited);
    CHECK(exists() == (arg != NULL));
}

static void test_queue_that_is_gone_cannot_be_adopted(void)
{
    for (uintptr_t is_replaced = 0; is_replaced < 2; is_replaced++) {
        struct shmq *q = inherited = attach(PAGE);
        pid_t pid = start_child(child_of_a_gone_queue, (void *)is_replaced);
        child_has_stopped(pid);
        closes(q);
        q = is_replaced ? attach(PAGE) : NULL;
        let_child_end(pid);
        if (q != NULL)
            closes(q);
    }
}

/* A parent with a frozen lock and a claim; its forked child outlives it, with or without an attachment of its own. */
struct family {
    bool has_hooks;
    _Atomic pid_t grandchild;
    _Atomic bool is_attached, may_end;
};

static void grandchild_lives_on(struct family *f)
{
    if (f->has_hooks) {
        CHECK_EQ(shmq_fork_child(inherited), SHMQ_OK);
        f->is_attached = true;
    }
    WAIT_FOR(f->may_end);
    if (f->has_hooks)
        CHECK_EQ(shmq_close(inherited, false), SHMQ_OK);
    _exit(0);
}

static void parent_with_grandchild(void *arg)
{
    struct family *f = arg;
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    struct shmq *q = inherited = attach(4 * PAGE);
    CHECK(shmq_get_try(q, scratch, &in) == SHMQ_OK && in.hand >= 0);
    CHECK_EQ(shmq_enter_side(q, SHMQ_PRODUCING, in_ms(STATE_MS)), SHMQ_OK);
    if (f->has_hooks)
        CHECK_EQ(shmq_fork_before(q), SHMQ_OK);
    pid_t pid = fork(); /* by itself: it outlives us */
    if (pid == 0)
        grandchild_lives_on(f);
    shmq_fork_parent(q);
    f->grandchild = pid;
    raise(SIGSTOP);
}

static void test_parent_is_dead_though_its_forked_child_lives(void)
{
    for (int has_hooks = 0; has_hooks < 2; has_hooks++) {
        struct family *f = shared_bytes(sizeof *f);
        struct shmq *q = attach(4 * PAGE);
        f->has_hooks = has_hooks;
        puts_ok(q, 1, 2 * PAGE);
        puts_ok(q, 2, 50);
        pid_t pid = start_child(parent_with_grandchild, f);
        child_has_stopped(pid);
        WAIT_FOR(f->grandchild != 0 && f->is_attached == has_hooks);
        CHECK_EQ(shmq_refs(q), 2 + has_hooks);
        kill_child(pid);
        uint64_t start = shmq_now_ns();
        puts_ok(q, 3, 50); /* takes the lock over */
        gets(q, 2);
        gets(q, 1); /* swept out of the dead hands by the way */
        gets(q, 3);
        CHECK(shmq_now_ns() - start < UINT64_C(2000000000));
        CHECK_EQ(kill(f->grandchild, 0), 0);
        CHECK_EQ(shmq_refs(q), 1 + has_hooks);
        f->may_end = true;
        WAIT_FOR(shmq_refs(q) == 1);
        closes(q);
        CHECK(!exists());
    }
}

static void *come_and_go_elsewhere(void *may_end)
{
    char path[80];
    snprintf(path, sizeof path, "%s.elsewhere", check_path);
    while (!*(_Atomic bool *)may_end)
        closes(attach_to(path, PAGE));
    CHECK_EQ(access(path, F_OK), -1);
    return NULL;
}

static void stay(void *arg)
{
    (void)arg;
    for (;;)
        pause();
}

static void test_no_lock_slips_into_a_child_forked_by_another_thread(void)
{
    pid_t pids[60];
    pthread_t thread;
    static _Atomic bool may_end;
    closes(attach(PAGE));
    CHECK_EQ(pthread_create(&thread, NULL, come_and_go_elsewhere, &may_end), 0);
    for (int i = 0; i < 60; i++)
        pids[i] = start_child(stay, NULL); /* it would keep the queue alive */
    may_end = true;
    pthread_join(thread, NULL);
    for (int i = 0; i < 60; i++)
        kill_child(pids[i]);
}

/* ---- somebody is in the way */

static void attach_and_stop_half_way(void *arg)
{
    (void)arg;
    arm();
    struct shmq *q = attach(PAGE);
    closes(q);
}

static void refused_as_busy(void *pid)
{
    struct shmq_fault fault;
    CHECK_EQ(refused(PAGE, &fault), SHMQ_BUSY);
    CHECK_EQ(fault.found, *(pid_t *)pid);
}

static void test_who_freezes_while_attaching_is_named_after_five_seconds(void)
{
    struct shmq *q = attach(PAGE), *other = attach(PAGE);
    plan(SIGSTOP, 0, "attach:occupied");
    pid_t pid = start_child(attach_and_stop_half_way, NULL);
    child_has_stopped(pid);
    uint64_t start = shmq_now_ns();
    pid_t attaching = start_child(refused_as_busy, &pid);
    CHECK_EQ(shmq_close(other, false), SHMQ_BUSY); /* detached all the same */
    CHECK_EQ(shmq_fault(other)->found, pid);
    shmq_free(other);
    child_ends_well(attaching);
    uint64_t waited_ms = (shmq_now_ns() - start) / 1000000;
    CHECK(waited_ms >= 5000 && waited_ms < 15000);
    puts_ok(q, 1, 10); /* items go on meanwhile */
    gets(q, 1);
    CHECK_EQ(shmq_refs(q), 1);
    let_child_end(pid);
    CHECK_EQ(shmq_refs(q), 1);
    closes(q);
    CHECK(!exists());
}

/* Steps: 1 the segment has its name, 3 the name is another's, 4 that one may leave. */
static _Atomic int *step_of_replacing;

static void replace_by_hand(void *arg)
{
    (void)arg;
    WAIT_FOR(*step_of_replacing == 1);
    CHECK_EQ(unlink(check_path), 0);
    struct shmq *q = attach(PAGE);
    *step_of_replacing = 3;
    WAIT_FOR(*step_of_replacing == 4);
    closes(q);
}

static void wait_until_replaced(const char *name)
{
    if (strcmp(name, "create:named") != 0 || *step_of_replacing != 0)
        return;
    *step_of_replacing = 1;
    WAIT_FOR(*step_of_replacing == 3);
}

static void test_creator_whose_name_was_taken_away_joins_who_has_it(void)
{
    step_of_replacing = shared_bytes(sizeof *step_of_replacing);
    pid_t pid = start_child(replace_by_hand, NULL);
    check->plan.on_hit = wait_until_replaced;
    arm();
    struct shmq *q = attach(PAGE);
    disarm();
    CHECK(!shmq_was_created(q));
    CHECK_EQ(shmq_refs(q), 2);
    *step_of_replacing = 4;
    child_ends_well(pid);
    CHECK(exists());
    closes(q);
}

static void attach_and_put(void *arg)
{
    (void)arg;
    struct shmq *q = attach(PAGE);
    puts_ok(q, 5, 50);
    raise(SIGSTOP);
    closes(q);
}

static void adopt_in_vain(void *arg)
{
    (void)arg;
    CHECK_EQ(shmq_adopt(inherited), SHMQ_GONE);
}

static void test_who_waited_for_a_segment_that_is_gone_by_then_starts_over(void)
{
    for (int adopts = 0; adopts < 2; adopts++) {
        int fd;
        struct shmq *a = inherited = attach(PAGE);
        CHECK(port_open(check_path, &fd) == 0 && port_lock_byte(fd, 0) == 0);
        pid_t pid = start_child(adopts ? adopt_in_vain : attach_and_put, NULL);
        pause_ms(20); /* by then it waits, or comes later, which is as well */
        CHECK_EQ(unlink(check_path), 0);
        struct shmq *b = attach(PAGE);
        CHECK_EQ(port_unlock_byte(fd, 0), 0);
        port_close(fd);
        if (!adopts) {
            child_has_stopped(pid);
            CHECK_EQ(shmq_refs(b), 2);
            gets(b, 5);
            CHECK_EQ(kill(pid, SIGCONT), 0);
        }
        child_ends_well(pid);
        closes(a);
        CHECK(exists());
        closes(b);
        CHECK(!exists());
    }
}

static void leave_together(void *arg)
{
    struct crowd *crowd = arg;
    struct shmq *q = attach(PAGE);
    crowd->ready++;
    while (!crowd->go) /* awake, so that all leave at one time */
        port_pause();
    closes(q);
}

static void test_of_those_that_leave_at_one_time_the_last_unlinks(void)
{
    for (int round = 0; round < 100; round++) {
        struct crowd *crowd = shared_bytes(sizeof *crowd);
        pid_t pids[2];
        for (int i = 0; i < 2; i++)
            pids[i] = start_child(leave_together, crowd);
        WAIT_FOR(crowd->ready == 2);
        crowd->go = true;
        for (int i = 0; i < 2; i++)
            child_ends_well(pids[i]);
        CHECK(!exists());
        munmap(crowd, sizeof *crowd);
    }
}

static void test_close_spares_what_now_has_its_descriptors_number(void)
{
    struct shmq *q = attach(PAGE);
    int number = q->probe_fd, null = open("/dev/null", O_RDWR);
    CHECK_EQ(dup2(null, number), number);
    closes(q);
    CHECK(fcntl(number, F_GETFD) >= 0);
    close(number);
    close(null);
    CHECK(!exists());
}

/* ---- deaths half-way */

struct scene {
    struct shmq *survivor; /* attached throughout, or NULL */
    uint32_t n_items;      /* that must be there afterwards */
};

static void before_nobody(void *arg) { ((struct scene *)arg)->survivor = NULL; }
static void before_attached(void *arg) { ((struct scene *)arg)->survivor = inherited = attach(8 * PAGE); }

static void before_orphan_with_items(void *arg)
{
    before_nobody(arg);
    make_orphan(put_three_and_stop, 8 * PAGE);
}

static void before_orphan_without(void *arg)
{
    before_nobody(arg);
    make_orphan(stop_attached, 4 * PAGE);
}

static void dies_attaching(void *arg)
{
    (void)arg;
    arm();
    attach(8 * PAGE);
}

static void dies_detaching(void *arg)
{
    (void)arg;
    struct shmq *q = attach(8 * PAGE);
    arm();
    closes(q);
}

static void dies_leaving(void *arg)
{
    (void)arg;
    struct shmq *q = attach(8 * PAGE);
    CHECK_EQ(shmq_hold(q), SHMQ_OK);
    arm();
    CHECK_EQ(shmq_close(q, true), SHMQ_OK);
    shmq_let_go(q);
}

static void dies_forking(void *arg)
{
    (void)arg;
    struct shmq *q = attach(8 * PAGE);
    arm();
    CHECK_EQ(shmq_fork_before(q), SHMQ_OK);
    shmq_fork_parent(q);
}

/* As the child would go on. */
static void dies_forked(void *arg)
{
    (void)arg;
    struct shmq *q = attach(8 * PAGE);
    CHECK_EQ(shmq_fork_before(q), SHMQ_OK);
    arm();
    CHECK_EQ(shmq_fork_child(q), SHMQ_OK);
}

static void dies_counting(void *arg)
{
    (void)arg;
    struct shmq *q = attach(8 * PAGE);
    arm();
    shmq_ref_add(q);
    CHECK(shmq_ref_drop(q));
}

static void dies_adopting(void *arg)
{
    (void)arg;
    arm();
    CHECK_EQ(shmq_adopt(inherited), SHMQ_OK);
}

static void after_death(void *arg)
{
    struct scene *scene = arg;
    struct shmq *q = scene->survivor != NULL ? scene->survivor : attach(8 * PAGE);
    CHECK_EQ(shmq_refs(q), 1);
    CHECK_EQ(shmq_capacity(q), 8 * PAGE);
    for (uint32_t id = 1; id <= scene->n_items; id++)
        gets(q, id);
    puts_ok(q, 9, 5000);
    gets(q, 9);
    uint32_t id;
    CHECK_EQ(item_get(q, &id, 0), SHMQ_EMPTY);
    CHECK_EQ(broken_invariants(q), 0);
    closes(q);
    CHECK(!exists());
}

static void test_death_at_any_point_of_coming_and_going_leaves_a_queue_that_works(void)
{
    struct scene empty = {NULL, 0}, three = {NULL, 3};
    kill_at_every_failpoint("create", before_nobody, dies_attaching, after_death, &empty);
    kill_at_every_failpoint("attach", before_attached, dies_attaching, after_death, &empty);
    kill_at_every_failpoint("adopt an orphan", before_orphan_with_items, dies_attaching, after_death, &three);
    kill_at_every_failpoint("replace an orphan", before_orphan_without, dies_attaching, after_death, &empty);
    kill_at_every_failpoint("detach", before_attached, dies_detaching, after_death, &empty);
    kill_at_every_failpoint("detach as the last", before_nobody, dies_detaching, after_death, &empty);
    kill_at_every_failpoint("leave", before_attached, dies_leaving, after_death, &empty);
    kill_at_every_failpoint("fork", before_attached, dies_forking, after_death, &empty);
    kill_at_every_failpoint("forked", before_attached, dies_forked, after_death, &empty);
    kill_at_every_failpoint("references", before_attached, dies_counting, after_death, &empty);
    kill_at_every_failpoint("adopt", before_attached, dies_adopting, after_death, &empty);
    tell_deaths(died_everywhere_in("core", "attach.c"), "attach.c");
}

/* ---- a file that is cut while it is attached */

static uint64_t segment_bytes(void) { return (sizeof(struct shmq_segment) + PAGE - 1) / PAGE * PAGE + PAGE; }

static struct shmq *attach_and_cut(off_t size)
{
    struct shmq *q = attach(PAGE);
    puts_ok(q, 1, 10);
    CHECK_EQ(truncate(check_path, size), 0);
    return q;
}

static void test_file_that_was_cut_is_named_and_can_be_closed(void)
{
    const off_t sizes[] = {0, 1, 4096, (off_t)segment_bytes() - 4096};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        context("%jd bytes", (intmax_t)sizes[i]);
        struct shmq *q = attach_and_cut(sizes[i]);
        CHECK_EQ(shmq_check_file(q), SHMQ_CORRUPT);
        CHECK(strcmp(shmq_fault(q)->what, "file size") == 0 && shmq_fault(q)->found == (uint64_t)sizes[i]);
        CHECK_EQ(shmq_fault(q)->allowed, segment_bytes());
        CHECK_EQ(shmq_fork_before(q), SHMQ_GONE);
        CHECK_EQ(shmq_close(q, i % 2), SHMQ_OK);
        CHECK(!exists()); /* of no use to anybody */
        shmq_free(q);
    }
}

static void attach_in_vain(void *arg)
{
    struct shmq_fault fault;
    (void)arg;
    CHECK_EQ(refused(PAGE, &fault), SHMQ_CORRUPT);
    CHECK(strcmp(fault.what, "file size") == 0 && fault.found == PAGE);
}

static void test_file_that_is_cut_while_somebody_waits_to_attach_is_refused(void)
{
    struct shmq *q = attach(PAGE);
    int fd;
    CHECK_EQ(port_open(check_path, &fd), 0);
    CHECK_EQ(port_lock_byte(fd, 0), 0);
    pid_t child = start_child(attach_in_vain, NULL);
    pause_ms(50); /* it has read the header by then, or refuses for the same reason when it does */
    CHECK_EQ(truncate(check_path, (off_t)PAGE), 0);
    CHECK_EQ(port_unlock_byte(fd, 0), 0);
    child_ends_well(child);
    port_close(fd);
    closes(q);
}

static void cut_soon(void *arg)
{
    pause_ms(20);
    CHECK_EQ(truncate(arg, 0), 0);
}

static void test_who_sleeps_while_the_file_is_cut_is_told(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    struct shmq_part part = {scratch, PAGE - 50};
    struct shmq_out out = shmq_out(&part, 1, 0, false);
    uint32_t done;
    for (int is_put = 0; is_put < 2; is_put++) {
        struct shmq *q = attach(PAGE);
        if (is_put)
            puts_ok(q, 1, 100);
        pid_t child = start_child(cut_soon, check_path);
        int rc;
        do {
            rc = is_put ? shmq_put_wait(q, &out, 1, &done, in_ms(STATE_MS))
                        : shmq_get_wait(q, scratch, &in, in_ms(STATE_MS));
        } while (rc == SHMQ_INTR);
        CHECK_EQ(rc, SHMQ_CORRUPT);
        CHECK(strcmp(shmq_fault(q)->what, "file size") == 0);
        child_ends_well(child);
        shmq_free(q);
    }
}

static void test_claims_of_a_file_that_was_cut_can_be_let_go_of(void)
{
    struct shmq_in in;
    struct shmq *q = attach(PAGE);
    puts_ok(q, 1, 10);
    CHECK_EQ(shmq_get_try(q, NULL, &in), SHMQ_OK);
    CHECK_EQ(shmq_hold(q), SHMQ_OK); /* as a lease does */
    CHECK_EQ(truncate(check_path, 0), 0);
    CHECK_EQ(shmq_close(q, true), SHMQ_OK);
    shmq_give_back_from(q, in.hand, in.pos);
    shmq_release(q, in.hand);
    shmq_let_go(q);
    shmq_free(q);
}

static void use_inherited(void *arg)
{
    struct shmq *q = arg;
    CHECK_EQ(shmq_usable(q), SHMQ_FORKED);
    CHECK_EQ(shmq_adopt(q), SHMQ_CORRUPT);
    shmq_free(q);
}

static void test_forked_child_does_not_adopt_a_file_that_was_cut(void)
{
    struct shmq *q = attach_and_cut(0);
    child_ends_well(start_child(use_inherited, q));
    shmq_free(q);
}

static const struct test tests[] = {
    TEST(test_first_creates_and_others_attach),
    TEST(test_segment_has_its_size_and_mode_whatever_the_umask),
    TEST(test_new_queue_of_the_name_is_another),
    TEST(test_everything_is_refused_once_closed),
    TEST(test_nothing_is_left_open_or_mapped),
    TEST(test_close_leaves_a_name_alone_that_leads_elsewhere),
    TEST(test_many_that_come_at_once_share_one_queue),
    TEST(test_coming_and_going_never_makes_two_queues_of_one_name),
    TEST(test_threads_come_and_go),
    TEST(test_last_slot_is_the_512th),
    TEST(test_orphan_with_items_is_adopted_with_all_of_them),
    TEST(test_item_in_dead_hands_keeps_an_orphan_too),
    TEST(test_empty_orphan_of_another_size_is_replaced),
    TEST(test_empty_queue_of_another_size_that_lives_is_not),
    TEST(test_foreign_files_are_refused_and_left_alone),
    TEST(test_segments_whose_header_cannot_be_are_refused),
    TEST(test_truncated_segment_is_refused),
    TEST(test_other_kinds_of_files_are_refused_at_once),
    TEST(test_impossible_wishes_leave_nothing_behind),
    TEST(test_another_users_queue_is_refused),
    TEST(test_frozen_is_alive_and_killed_is_dead),
    TEST(test_who_has_left_is_dead_also_when_its_slot_is_anothers),
    TEST(test_words_that_name_no_slot_are_dead),
    TEST(test_process_that_closed_all_descriptors_is_never_robbed),
    TEST(test_prober_that_lost_its_descriptors_still_finds_the_dead),
    TEST(test_manual_references_go_with_their_attachment),
    TEST(test_forked_child_has_an_attachment_of_its_own),
    TEST(test_forked_child_that_closes_is_no_reference_while_it_lives),
    TEST(test_children_of_two_forks_at_once_are_two),
    TEST(test_queue_stays_while_a_child_is_on_its_way),
    TEST(test_fork_that_failed_leaves_no_reference),
    TEST(test_handle_closed_during_a_fork_leaves_nothing_behind),
    TEST(test_child_without_hooks_is_told_and_can_adopt),
    TEST(test_raw_clone_is_told_and_can_adopt),
    TEST(test_child_that_closes_what_is_its_parents_changes_nothing),
    TEST(test_queue_that_is_gone_cannot_be_adopted),
    TEST(test_parent_is_dead_though_its_forked_child_lives),
    TEST(test_no_lock_slips_into_a_child_forked_by_another_thread),
    TEST(test_who_freezes_while_attaching_is_named_after_five_seconds),
    TEST(test_creator_whose_name_was_taken_away_joins_who_has_it),
    TEST(test_who_waited_for_a_segment_that_is_gone_by_then_starts_over),
    TEST(test_of_those_that_leave_at_one_time_the_last_unlinks),
    TEST(test_close_spares_what_now_has_its_descriptors_number),
    TEST(test_death_at_any_point_of_coming_and_going_leaves_a_queue_that_works),
    TEST(test_file_that_was_cut_is_named_and_can_be_closed),
    TEST(test_file_that_is_cut_while_somebody_waits_to_attach_is_refused),
    TEST(test_who_sleeps_while_the_file_is_cut_is_told),
    TEST(test_claims_of_a_file_that_was_cut_can_be_let_go_of),
    TEST(test_forked_child_does_not_adopt_a_file_that_was_cut),
};
RUN_TESTS(tests)
