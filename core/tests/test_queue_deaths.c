/* test_queue_deaths.c - processes killed or frozen at each failpoint of each call, and killed at random: what the
 * others get. The failpoints are found by passing them (kill_at_every_failpoint), so a new one needs no new test; the
 * last test compares with the sources. Item numbers: 1.. were there before, 100.. are the victim's, 200.. come from the
 * survivor afterwards. */
#include "check.h"

#define PAGE port_page_size()
#define CAPACITY (21 * PAGE)
#define BIG (SHMQ_SMALL + 5000)

static struct shmq *survivor, *mine; /* mine: the victim's own attachment */

/* Shared with the victims. */
static struct {
    _Atomic uint32_t begun, returned;    /* the victim's puts: items */
    _Atomic bool has_recovered;          /* the second victim's put of item 300 has returned */
    _Atomic uint32_t n_taken, taken[16]; /* what the victim has got and is done with */
    pid_t frozen;                        /* another producer, in the middle of item 50; 0: none */
    struct shmq_in claim;                /* what the survivor itself has in hand */
} *stage;

static uint32_t random_below(uint32_t n)
{
    static uint64_t state;
    if (state == 0)
        CHECK_EQ(port_random(&state, sizeof state), 0);
    state = state * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (uint32_t)(state >> 33) % n;
}

/* ---- calls that somebody dies in */

struct op {
    const char *name;
    void (*prepare)(void);
    void (*act)(void);
    const char *decides;   /* the failpoint after which it has happened, when that is one */
    const uint32_t *takes; /* items that are gone when it has happened, ended by 0 */
    bool is_stepwise;      /* some of them may be gone before */
};

static struct shmq_part part_of(uint32_t id, size_t len)
{
    static uint8_t payload[8][BIG];
    uint8_t *bytes = payload[id % 8];
    CHECK(len <= BIG);
    item_fill(bytes, id, len);
    return (struct shmq_part){bytes, len};
}

static void puts_mine(const size_t *len, uint32_t n)
{
    struct shmq_part part[8];
    struct shmq_out out[8];
    uint32_t sent = 0, done;
    for (uint32_t i = 0; i < n; i++) {
        part[i] = part_of(100 + i, len[i]);
        out[i] = shmq_out(&part[i], 1, 100 + i, false);
    }
    for (stage->begun = n; sent < n; stage->returned = sent += done) {
        int rc;
        while ((rc = shmq_put_wait(mine, out + sent, n - sent, &done, in_ms(STATE_MS))) == SHMQ_INTR)
            ;
        CHECK_EQ(rc, SHMQ_OK);
    }
}

static void put_small(void) { puts_mine((size_t[]){70}, 1); }
static void put_empty(void) { puts_mine((size_t[]){0}, 1); }
static void put_big(void) { puts_mine((size_t[]){BIG}, 1); }
static void put_three(void) { puts_mine((size_t[]){30, 0, 4000}, 3); }
static void put_mixed(void) { puts_mine((size_t[]){10, BIG, 20, 30, BIG - 1}, 5); }

static struct shmq_in reserve_mine(size_t len)
{
    struct shmq_in room;
    CHECK_EQ(shmq_reserve(mine, len, 100, &room, in_ms(STATE_MS)), SHMQ_OK);
    item_fill((uint8_t *)room.payload, 100, len);
    return room;
}

static void reserve_and_commit(void)
{
    struct shmq_in room = reserve_mine(70);
    stage->begun = 1;
    shmq_commit(mine, &room);
    stage->returned = 1;
}

static void reserve_and_abandon(void)
{
    struct shmq_in room = reserve_mine(BIG);
    shmq_abandon(mine, &room);
}

static void took(uint32_t id) { stage->taken[stage->n_taken++] = id; }

static void get_one(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    int rc;
    while ((rc = shmq_get_wait(mine, scratch, &in, in_ms(STATE_MS))) == SHMQ_INTR)
        ;
    CHECK_EQ(rc, SHMQ_OK);
    took(item_accept(mine, &in));
}

static void get_batch(struct shmq_in *in)
{
    uint32_t n = 3;
    CHECK_EQ(shmq_get_batch_try(mine, in, &n), SHMQ_OK);
    CHECK_EQ(n, 3);
    for (uint32_t i = 0; i < n; i++)
        item_check(in[i].payload, in[i].method, in[i].len);
}

static void get_and_release_batch(void)
{
    struct shmq_in in[3];
    get_batch(in);
    shmq_release(mine, in[0].hand);
    for (int i = 0; i < 3; i++)
        took(in[i].method);
}

static void get_and_give_back_rest(void)
{
    struct shmq_in in[3];
    get_batch(in);
    shmq_give_back_from(mine, in[0].hand, in[1].pos);
    took(in[0].method);
}

static void get_and_give_back_one(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    CHECK_EQ(shmq_get_try(mine, scratch, &in), SHMQ_OK);
    CHECK(in.hand >= 0);
    shmq_give_back_from(mine, in.hand, in.pos);
}

static void lease(struct shmq_in *in)
{
    CHECK_EQ(shmq_get_try(mine, NULL, in), SHMQ_OK);
    item_check(in->payload, in->method, in->len);
}

static void lease_and_release(void)
{
    struct shmq_in in;
    lease(&in);
    shmq_release(mine, in.hand);
    took(in.method);
}

static void lease_and_give_back(void)
{
    struct shmq_in in;
    lease(&in);
    shmq_give_back_from(mine, in.hand, in.pos);
}

/* The later one ends first. */
static void lease_two(void)
{
    struct shmq_in in[2];
    lease(&in[0]);
    lease(&in[1]);
    shmq_release(mine, in[1].hand);
    took(in[1].method);
    shmq_give_back_from(mine, in[0].hand, in[0].pos);
}

static void clear(void) { CHECK_EQ(shmq_clear(mine, in_ms(STATE_MS)), SHMQ_OK); }

static void close_mine(void) { CHECK_EQ(shmq_close(mine, false), SHMQ_OK); }

static void check_all(void) { CHECK_EQ(broken_invariants(mine), 0); }

static void puts_too_much(struct shmq *q, uint64_t deadline_ns)
{
    static uint8_t *payload;
    uint32_t n;
    payload = payload != NULL ? payload : calloc(1, CAPACITY);
    struct shmq_part part = {payload, CAPACITY - 8};
    struct shmq_out out = shmq_out(&part, 1, 0, false);
    int rc;
    while ((rc = shmq_put_wait(q, &out, 1, &n, deadline_ns)) == SHMQ_INTR)
        ;
    CHECK_EQ(rc, SHMQ_FULL);
}

/* A put that doesn't fit now: takes over both locks where their owners are dead, and sweeps. */
static void sweep_with(struct shmq *q) { puts_too_much(q, 0); }

static void wait_for_room(void)
{
    mine->seg->waiters.room_wanted = 0; /* the first one to want some */
    puts_too_much(mine, in_ms(2));
}

static void get_all_and_wait(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    uint64_t deadline = in_ms(2);
    int rc;
    for (int i = 0; i < 4; i++)
        get_one();
    while ((rc = shmq_get_wait(mine, scratch, &in, deadline)) == SHMQ_INTR)
        ;
    CHECK_EQ(rc, SHMQ_EMPTY);
}

static void sweep_and_put(void)
{
    sweep_with(mine);
    put_small();
}

/* ---- what was there before */

static void put_four(void)
{
    for (uint32_t id = 1; id <= 4; id++)
        puts_ok(survivor, id, id * 10);
}

static void put_four_big(void)
{
    for (uint32_t id = 1; id <= 4; id++)
        puts_ok(survivor, id, BIG - id);
}

static void give_back_three(void)
{
    struct shmq_in in[3];
    uint32_t n = 3;
    put_four();
    CHECK_EQ(shmq_get_batch_try(survivor, in, &n), SHMQ_OK);
    shmq_give_back_from(survivor, in[0].hand, in[0].pos);
}

static void give_back_big(void)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    put_four_big();
    CHECK_EQ(shmq_get_try(survivor, scratch, &in), SHMQ_OK);
    shmq_give_back_from(survivor, in.hand, in.pos);
}

static void freeze_in_put(void *arg)
{
    (void)arg;
    struct shmq *q = attach(CAPACITY);
    arm();
    puts_ok(q, 50, BIG);
}

static void start_frozen(void)
{
    plan(SIGSTOP, 0, "put:unlocked");
    stage->frozen = start_child(freeze_in_put, NULL);
    child_has_stopped(stage->frozen);
}

static void put_four_behind_frozen(void)
{
    start_frozen();
    put_four();
}

/* Passed by get_pos, and committed then. */
static void put_four_behind_passed(void)
{
    start_frozen();
    puts_ok(survivor, 99, 10);
    gets(survivor, 99);
    let_child_end(stage->frozen);
    stage->frozen = 0;
    put_four();
}

/* A big item in our own hands throughout, so that nothing is free below. */
static void put_four_behind_claim(void)
{
    uint8_t scratch[SHMQ_SMALL];
    puts_ok(survivor, 60, BIG);
    CHECK_EQ(shmq_get_try(survivor, scratch, &stage->claim), SHMQ_OK);
    put_four();
}

static void die_locking(void *side)
{
    struct shmq *q = attach(CAPACITY);
    CHECK_EQ(shmq_enter_side(q, (int)(uintptr_t)side, in_ms(STATE_MS)), SHMQ_OK);
    raise(SIGKILL);
}

static void put_four_and_die_locking(void)
{
    put_four();
    for (int side = 0; side < 2; side++)
        child_was_killed(start_child(die_locking, (void *)(uintptr_t)side));
}

#define ITEMS(...) ((const uint32_t[]){__VA_ARGS__, 0})

static const struct op ops[] = {
    {"put small", put_four, put_small, "publish:done", NULL, false},
    {"put empty", put_four, put_empty, "publish:done", NULL, false},
    {"put big", put_four, put_big, "put:committed", NULL, false},
    {"put three", put_four, put_three, "publish:done", NULL, false},
    {"put mixed", put_four, put_mixed, NULL, NULL, false},
    {"put behind a claim", put_four_behind_claim, put_mixed, NULL, NULL, false},
    {"put big behind a frozen one", put_four_behind_frozen, put_big, "put:committed", NULL, false},
    {"reserve and commit", put_four, reserve_and_commit, "put:committed", NULL, false},
    {"reserve and abandon", put_four, reserve_and_abandon, NULL, NULL, false},
    {"reserve and abandon behind a frozen one", put_four_behind_frozen, reserve_and_abandon, NULL, NULL, false},
    {"get small", put_four, get_one, "publish:done", ITEMS(1), false},
    {"get big", put_four_big, get_one, "hands:freed", ITEMS(1), false},
    {"get batch", put_four, get_and_release_batch, "hands:freed", ITEMS(1, 2, 3), false},
    {"give back rest", put_four, get_and_give_back_rest, "hands:advanced", ITEMS(1), false},
    {"give back one", put_four_big, get_and_give_back_one, NULL, NULL, false},
    {"get given back small", give_back_three, get_one, "hands:advanced", ITEMS(1), false},
    {"get given back big", give_back_big, get_one, "hands:freed", ITEMS(1), false},
    {"get past frozen", put_four_behind_frozen, get_one, "publish:done", ITEMS(1), false},
    {"get passed", put_four_behind_passed, get_one, "hands:freed", ITEMS(50), false},
    {"get behind a claim", put_four_behind_claim, get_one, "publish:done", ITEMS(1), false},
    {"lease", put_four, lease_and_release, "hands:freed", ITEMS(1), false},
    {"lease big", put_four_big, lease_and_release, "hands:freed", ITEMS(1), false},
    {"lease given back", give_back_three, lease_and_release, "hands:freed", ITEMS(1), false},
    {"lease given back big", give_back_big, lease_and_release, "hands:freed", ITEMS(1), false},
    {"lease past frozen", put_four_behind_frozen, lease_and_release, "hands:freed", ITEMS(1), false},
    {"lease passed", put_four_behind_passed, lease_and_release, "hands:freed", ITEMS(50), false},
    {"lease and give back", put_four, lease_and_give_back, NULL, NULL, false},
    {"lease given back and give back", give_back_three, lease_and_give_back, NULL, NULL, false},
    {"lease two", put_four, lease_two, "hands:freed", ITEMS(2), false},
    {"lease two given back", give_back_three, lease_two, "hands:freed", ITEMS(2), false},
    {"clear", put_four, clear, "publish:done", ITEMS(1, 2, 3, 4), false},
    {"clear past frozen", put_four_behind_frozen, clear, "publish:done", ITEMS(1, 2, 3, 4), false},
    {"clear given back", give_back_three, clear, "publish:done", ITEMS(1, 2, 3, 4), true},
    {"check", put_four_behind_frozen, check_all, NULL, NULL, false},
    {"take the producing lock over", put_four_and_die_locking, put_small, "publish:done", NULL, false},
    {"take the consuming lock over", put_four_and_die_locking, get_one, "publish:done", ITEMS(1), false},
    {"close", put_four, close_mine, NULL, NULL, false},
    {"wait for room", put_four, wait_for_room, NULL, NULL, false},
    {"get all and wait", put_four, get_all_and_wait, NULL, ITEMS(1, 2, 3, 4), true},
    {"sweep and put", put_four_behind_frozen, sweep_and_put, NULL, NULL, false},
};

/* ---- the stage */

static void start_at(struct shmq *q, uint64_t pos)
{
    for (int side = 0; side < 2; side++)
        shmq_side_publish(shmq_side(q, side), (struct shmq_mark){pos, 1000});
}

static void set_stage(const struct op *op)
{
    memset(stage, 0, sizeof *stage);
    survivor = attach(CAPACITY);
    start_at(survivor, 5 * CAPACITY - 4150); /* so that records wrap */
    op->prepare();
    survivor->seg->waiters.items_asleep = 1; /* so that there is somebody to wake */
    survivor->seg->waiters.room_wanted = 8;
}

/* At every failpoint, as if somebody had come and gone to sleep on a lock of ours. */
static void contend(const char *name)
{
    (void)name;
    for (int side = 0; side < 2; side++) {
        _Atomic uint64_t *word = &shmq_side(mine, side)->lock;
        if ((*word & ~SHMQ_CONTENDED) == mine->self)
            atomic_fetch_or(word, SHMQ_CONTENDED);
    }
}

static void perform(void *arg)
{
    const struct op *op = arg;
    mine = attach(CAPACITY);
    check->plan.decides = op->decides;
    check->plan.on_hit = contend;
    arm();
    op->act();
    disarm();
    shmq_free(mine);
}

/* ---- what is left */

/* Items in the order they must come in. */
static uint32_t wanted[64], n_wanted;

static void want(uint32_t id) { wanted[n_wanted++] = id; }

static bool is_taken(const struct op *op, uint32_t id, bool has_happened)
{
    for (uint32_t i = 0; op->takes != NULL && has_happened && op->takes[i] != 0; i++)
        if (op->takes[i] == id)
            return true;
    return false;
}

/* 50 and 60 lie below the others. */
static void want_what_was_there(const struct op *op, bool has_happened)
{
    n_wanted = 0;
    if ((stage->frozen != 0 || op->prepare == put_four_behind_passed) && !is_taken(op, 50, has_happened))
        want(50);
    for (uint32_t id = 1; id <= 4; id++)
        if (!is_taken(op, id, has_happened))
            want(id);
}

static bool is_settled(void)
{
    uint32_t id;
    struct shmq_info info;
    CHECK_EQ(item_get(survivor, &id, 0), SHMQ_EMPTY);
    CHECK(!shmq_is_sweep_due(survivor));
    shmq_sweep(survivor); /* the one that time would bring: it tidies up */
    CHECK_EQ(shmq_info(survivor, &info), SHMQ_OK);
    CHECK_EQ(info.qsize, 0);
    return info.free_pos == info.put_pos && !shmq_is_in_hand(survivor);
}

/* Everything in its order, and nothing else; of the victim's items those it has put, or had begun to put. */
static void all_wanted_come(const struct op *op, bool has_happened)
{
    uint32_t id, i = 0, put = 0, n_recovered = 0;
    puts_ok(survivor, 200, 10); /* takes a dead one's lock over */
    sweep_with(survivor);
    if (stage->claim.payload != NULL)
        CHECK_EQ(item_accept(survivor, &stage->claim), 60);
    for (;;) {
        CHECK_EQ(item_get(survivor, &id, STATE_MS), SHMQ_OK);
        if (id == 200)
            break;
        if (id == 300) { /* what the second victim put */
            CHECK_EQ(n_recovered++, 0);
        } else if (id >= 100 && id < 200) {
            CHECK_EQ(id, 100 + put);
            put++;
            CHECK_EQ(i, n_wanted);
        } else {
            while (op->is_stepwise && i < n_wanted && id != wanted[i])
                i++;
            CHECK_EQ(id, i < n_wanted ? wanted[i] : 0);
            i++;
        }
    }
    CHECK(i == n_wanted || op->is_stepwise);
    CHECK(n_recovered == 1 || !stage->has_recovered);
    CHECK(put >= stage->returned && put <= stage->begun);
    if (op->decides != NULL)
        CHECK_EQ(put, has_happened ? stage->begun : 0);
}

static void still_works(void)
{
    CHECK_EQ(shmq_refs(survivor), 1);
    puts_ok(survivor, 1, 500);
    puts_ok(survivor, 2, CAPACITY / 2);
    gets(survivor, 1);
    gets(survivor, 2);
    WAIT_FOR(is_settled());
    CHECK_EQ(broken_invariants(survivor), 0);
    shmq_free(survivor);
    CHECK_EQ(access(check_path, F_OK), -1);
}

static void take_stock(const struct op *op, bool has_happened)
{
    want_what_was_there(op, has_happened);
    if (stage->frozen != 0)
        let_child_end(stage->frozen);
    uint64_t start = shmq_now_ns();
    all_wanted_come(op, has_happened);
    CHECK(shmq_now_ns() - start < UINT64_C(2000000000));
    WAIT_FOR(is_settled());
    still_works();
}

#define N_OPS (sizeof ops / sizeof *ops)

static void before_op(void *op) { set_stage(op); }
static void after_op(void *op) { take_stock(op, check->plan.is_decided); }

static void test_survivor_gets_all_in_order_wherever_another_was_killed(void)
{
    stage = shared_bytes(sizeof *stage);
    for (size_t i = 0; i < N_OPS; i++)
        kill_at_every_failpoint(ops[i].name, before_op, perform, after_op, (void *)&ops[i]);
}

/* ---- and somebody dies again while taking over and sweeping what the first one left */

struct two_deaths {
    const struct op *op;
    uint32_t at; /* the failpoint of the first */
    bool has_happened, was_last;
};

static void before_second_death(void *arg)
{
    struct two_deaths *two = arg;
    set_stage(two->op);
    plan(SIGKILL, two->at, NULL);
    check->plan.is_named_only = true; /* both times: at every store it would take minutes */
    int status = wait_child(start_child(perform, (void *)two->op), 0);
    two->was_last = status == 0;
    two->has_happened = check->plan.is_decided;
    survivor->seg->waiters.items_asleep = 1;
    survivor->seg->waiters.room_wanted = 8;
}

static void recover(void *arg)
{
    (void)arg;
    mine = attach(CAPACITY);
    check->plan.on_hit = contend;
    check->plan.is_named_only = true;
    arm();
    puts_ok(mine, 300, 30);
    stage->has_recovered = true;
    sweep_with(mine);
    disarm();
    shmq_free(mine);
}

static void after_second_death(void *arg)
{
    struct two_deaths *two = arg;
    take_stock(two->op, two->has_happened);
}

static void test_survivor_gets_all_in_order_when_two_were_killed_one_after_the_other(void)
{
    char what[100];
    stage = shared_bytes(sizeof *stage);
    for (size_t i = 0; i < N_OPS; i++) {
        struct two_deaths two = {&ops[i], 0, false, false};
        two.was_last = ops[i].act == wait_for_room || ops[i].act == get_all_and_wait; /* nothing new, and slow */
        while (!two.was_last) {
            two.at++;
            snprintf(what, sizeof what, "%s, killed at %u, then recovery", ops[i].name, two.at);
            kill_at_every_failpoint(what, before_second_death, recover, after_second_death, &two);
        }
    }
}

static void commits_and_dies(void *arg)
{
    (void)arg;
    mine = attach(CAPACITY);
    arm();
    puts_ok(mine, 1, BIG);
}

/* The victim's entry outlives its record; what lies there now is nobody's business of sweeping. */
static void test_sweep_does_not_touch_room_that_was_used_again(void)
{
    uint8_t *ones = malloc(CAPACITY);
    memset(ones, SHMQ_RESERVED, CAPACITY); /* so that the place looks like a reservation's */
    struct shmq_part part = {ones, CAPACITY - 8};
    struct shmq_out out = shmq_out(&part, 1, 2, false);
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    uint32_t n;
    survivor = attach(CAPACITY);
    plan(SIGKILL, 0, "put:committed");
    child_was_killed(start_child(commits_and_dies, NULL));
    gets(survivor, 1);
    CHECK_EQ(shmq_put_try(survivor, &out, 1, &n), SHMQ_OK);
    CHECK(shmq_hands_top(&survivor->reservations) > 0);
    sweep_with(survivor);
    CHECK_EQ(shmq_get_try(survivor, scratch, &in), SHMQ_OK);
    CHECK(in.len == CAPACITY - 8 && memcmp(in.payload, ones, in.len) == 0);
    shmq_release(survivor, in.hand);
    WAIT_FOR(is_settled());
    shmq_free(survivor);
    free(ones);
}

/* ---- frozen, not dead: nobody is robbed, and nobody waits longer than for a lock */

/* How often each item came. */
static uint32_t came[400];

/* A call that doesn't wait is refused exactly when the frozen one holds the lock. */
static bool goes_on(int rc, int side, pid_t frozen)
{
    bool is_locked = shmq_lock_pid(survivor, side) == (uint32_t)frozen;
    CHECK_EQ(rc, is_locked ? SHMQ_BUSY : SHMQ_OK);
    return !is_locked;
}

static int try_put(uint32_t id, size_t len)
{
    struct shmq_part part = part_of(id, len);
    struct shmq_out out = shmq_out(&part, 1, id, false);
    uint32_t n;
    return shmq_put_try(survivor, &out, 1, &n);
}

static int try_get(uint32_t *id)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    int rc = shmq_get_try(survivor, scratch, &in);
    if (rc == SHMQ_OK)
        *id = item_accept(survivor, &in);
    return rc;
}

static void others_go_on(pid_t frozen, bool waits)
{
    struct shmq_info info;
    uint32_t id;
    uint64_t start = shmq_now_ns();
    bool puts = goes_on(waits ? item_put(survivor, 201, 10, 0) : try_put(201, 10), SHMQ_PRODUCING, frozen);
    came[201] -= puts;
    if (puts)
        came[202] -= goes_on(try_put(202, BIG), SHMQ_PRODUCING, frozen);
    if (goes_on(waits ? item_get(survivor, &id, 0) : try_get(&id), SHMQ_CONSUMING, frozen))
        came[id]++;
    CHECK_EQ(shmq_info(survivor, &info), SHMQ_OK);
    CHECK_EQ(shmq_refs(survivor), 2 + (stage->frozen != 0));
    CHECK(shmq_now_ns() - start < UINT64_C(2000000000));
}

static void all_came_once(void)
{
    uint32_t id;
    if (stage->claim.payload != NULL)
        CHECK_EQ(item_accept(survivor, &stage->claim), 60);
    while (item_get(survivor, &id, 0) == SHMQ_OK)
        came[id]++;
    for (uint32_t i = 0; i < stage->n_taken; i++)
        came[stage->taken[i]]++;
    for (id = 0; id < 400; id++) {
        bool was_there =
            (id >= 1 && id <= 4) || (id >= 100 && id < 100 + stage->begun) || (id == 50 && stage->frozen != 0);
        if (came[id] != was_there)
            fprintf(stderr, "item %u ", id);
        CHECK_EQ(came[id], was_there);
    }
}

/* True: it didn't get as far as that failpoint. */
static bool freeze_at(const struct op *op, uint32_t at)
{
    set_stage(op);
    memset(came, 0, sizeof came);
    plan(SIGSTOP, at, NULL);
    pid_t pid = start_child(perform, (void *)op);
    int status = wait_child(pid, WUNTRACED);
    context("%s, frozen at failpoint %u, %s", op->name, at, check->plan.last);
    if (WIFSTOPPED(status)) {
        others_go_on(pid, op->act == put_small || op->act == get_one); /* the others don't even wait for the lock */
        let_child_end(pid);
    } else {
        CHECK_EQ(status, 0);
    }
    if (stage->frozen != 0)
        let_child_end(stage->frozen);
    if (op->prepare == put_four_behind_passed)
        came[50]--; /* there before, too */
    all_came_once();
    WAIT_FOR(is_settled());
    still_works();
    return WIFEXITED(status);
}

/* Calls whose outcome depends on what the others do meanwhile, or that leave. */
static bool is_about_others(void (*act)(void))
{
    return act == clear || act == sweep_and_put || act == get_all_and_wait || act == wait_for_room || act == close_mine;
}

static void test_others_go_on_wherever_one_is_frozen(void)
{
    stage = shared_bytes(sizeof *stage);
    for (size_t i = 0; i < N_OPS; i++)
        for (uint32_t at = 1; !is_about_others(ops[i].act) && !freeze_at(&ops[i], at); at++)
            CHECK(at < 200);
}

static void locks_and_freezes(void *side)
{
    mine = attach(CAPACITY);
    CHECK_EQ(shmq_enter_side(mine, (int)(uintptr_t)side, in_ms(STATE_MS)), SHMQ_OK);
    raise(SIGSTOP);
    shmq_leave_side(mine, (int)(uintptr_t)side);
}

static int without_time(int call)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    struct shmq_part part = {"x", 1};
    struct shmq_out out = shmq_out(&part, 1, 0, false);
    uint32_t n;
    switch (call) {
    case 0:
        return shmq_put_wait(survivor, &out, 1, &n, 0);
    case 1:
        return shmq_get_wait(survivor, scratch, &in, 0);
    case 2:
        return shmq_clear(survivor, 0);
    default:
        return shmq_check(survivor, complain, &n, 0);
    }
}

static void test_call_without_time_gives_up_on_a_frozen_ones_lock_soon(void)
{
    survivor = attach(CAPACITY);
    for (int call = 0; call < 4; call++) {
        pid_t pid = start_child(locks_and_freezes, (void *)(uintptr_t)(call == 0 ? SHMQ_PRODUCING : SHMQ_CONSUMING));
        child_has_stopped(pid);
        uint64_t start = shmq_now_ns();
        int rc;
        while ((rc = without_time(call)) == SHMQ_INTR) /* a signal, or time to look for one */
            CHECK(shmq_now_ns() - start < UINT64_C(2000000000));
        CHECK_EQ(rc, SHMQ_BUSY);
        CHECK(shmq_now_ns() - start < UINT64_C(1000000000));
        let_child_end(pid);
    }
    still_works();
}

/* ---- at the pace of time: who waits goes on soon after another's death */

struct wait_case {
    const char *name;
    void (*victim)(void *arg); /* comes to a stop */
    const char *spot; /* the failpoint that it stops at, and is killed there; or (goes_on) stops before, goes on */
    bool goes_on;     /* and is killed at; NULL: none */
    bool puts;        /* does the survivor wait to put, or to get? */
    size_t len;       /* what it waits to put */
};

static void claims_and_stops(void *arg)
{
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in;
    (void)arg;
    struct shmq *q = attach(CAPACITY);
    puts_ok(q, 1, BIG);
    CHECK(shmq_get_try(q, scratch, &in) == SHMQ_OK && in.hand >= 0);
    raise(SIGSTOP);
}

static void gets_big(void *arg)
{
    (void)arg;
    struct shmq *q = attach(CAPACITY);
    puts_ok(q, 1, BIG);
    arm();
    gets(q, 1);
}

static void puts_small(void *arg)
{
    (void)arg;
    struct shmq *q = attach(CAPACITY);
    if (check->plan.signal == SIGKILL)
        raise(SIGSTOP);
    arm();
    puts_ok(q, 1, 10);
}

static void puts_most(void *arg)
{
    (void)arg;
    struct shmq *q = attach(CAPACITY);
    arm();
    puts_ok(q, 1, CAPACITY - 3000);
}

static const struct wait_case wait_cases[] = {
    {"an item in dead hands", claims_and_stops, NULL, false, false, 0},
    {"a dead consumer's lock", gets_big, "hands:taken", false, false, 0},
    {"an item that its producer died without waking for", puts_small, "publish:done", true, false, 0},
    {"a dead producer's lock", puts_small, "publish:prepared", false, true, 10},
    {"room that a dead producer had reserved", puts_most, "put:unlocked", false, true, 3500},
};

struct killing {
    pid_t pid;
    bool goes_on;
    _Atomic uint64_t dead_ns;
};

static void *kill_when_asleep(void *arg)
{
    struct killing *killing = arg;
    pause_ms(20 + random_below(50)); /* for the other thread to wait, and to have slept a while */
    CHECK_EQ(kill(killing->pid, killing->goes_on ? SIGCONT : SIGKILL), 0);
    child_was_killed(killing->pid);
    killing->dead_ns = shmq_now_ns();
    return NULL;
}

/* How long after the death the waiting one went on, ms. */
static uint64_t waits_until_death(const struct wait_case *c)
{
    pthread_t thread;
    struct killing killing = {0, c->goes_on, 0};
    uint32_t id = 1;
    survivor = attach(CAPACITY);
    plan(c->goes_on ? SIGKILL : SIGSTOP, 0, c->spot);
    killing.pid = start_child(c->victim, NULL);
    child_has_stopped(killing.pid);
    CHECK_EQ(pthread_create(&thread, NULL, kill_when_asleep, &killing), 0);
    CHECK_EQ(c->puts ? item_put(survivor, 2, c->len, STATE_MS) : item_get(survivor, &id, STATE_MS), SHMQ_OK);
    uint64_t now = shmq_now_ns();
    pthread_join(thread, NULL);
    CHECK_EQ(id, 1);
    if (c->puts)
        gets(survivor, 2);
    WAIT_FOR(is_settled());
    shmq_free(survivor);
    return now > killing.dead_ns ? (now - killing.dead_ns) / 1000000 : 0;
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void test_who_waits_goes_on_soon_after_a_death(void)
{
    for (size_t i = 0; i < sizeof wait_cases / sizeof *wait_cases; i++) {
        uint64_t ms[9];
        for (int k = 0; k < 9; k++)
            ms[k] = waits_until_death(&wait_cases[i]);
        qsort(ms, 9, sizeof *ms, compare);
        context("waiting for %s: median %" PRIu64 " ms, longest %" PRIu64 " ms", wait_cases[i].name, ms[4], ms[8]);
        if (getenv("CHECK_VERBOSE") != NULL)
            printf("        %s\n", check->context);
        CHECK(ms[4] < 150);
        CHECK(ms[8] < 1000);
    }
}

/* ---- a put of 100 MB */

#define HUGE_LEN (100u << 20)

static void puts_huge(void *arg)
{
    (void)arg;
    struct shmq *q = attach(PAGE);
    puts_ok(q, 1, HUGE_LEN);
    puts_ok(q, 2, 10);
    shmq_free(q);
}

static bool has_arrived(uint64_t offset)
{
    const volatile uint64_t *word = (const volatile uint64_t *)(shmq_ring_payload(&survivor->ring, 0) + offset);
    return *word == item_word(1, offset);
}

/* Freeze the child while it copies: the first bytes have arrived, the last ones have not. */
static bool is_frozen_half_way(pid_t pid)
{
    for (uint64_t until = in_ms(STATE_MS); !has_arrived(1 << 20);)
        CHECK(shmq_now_ns() < until);
    CHECK_EQ(kill(pid, SIGSTOP), 0);
    int status = wait_child(pid, WUNTRACED);
    CHECK(WIFSTOPPED(status));
    return !has_arrived(HUGE_LEN - 8);
}

/* True: it was caught half-way. */
static bool freeze_in_100_MB(void)
{
    survivor = attach((UINT64_C(1) << 27) / PAGE * PAGE);
    pid_t pid = start_child(puts_huge, NULL);
    bool is_half_way = is_frozen_half_way(pid);
    for (uint32_t id = 10; is_half_way && id < 20; id++) {
        puts_ok(survivor, id, id * 500);
        gets(survivor, id);
    }
    uint32_t id;
    CHECK(!is_half_way || item_get(survivor, &id, 0) == SHMQ_EMPTY);
    CHECK_EQ(kill(pid, SIGCONT), 0);
    gets(survivor, 1);
    gets(survivor, 2);
    child_ends_well(pid);
    WAIT_FOR(is_settled());
    CHECK_EQ(broken_invariants(survivor), 0);
    shmq_free(survivor);
    return is_half_way;
}

static void test_items_pass_a_producer_frozen_in_the_middle_of_100_MB(void)
{
    for (int tries = 1; !freeze_in_100_MB(); tries++)
        CHECK(tries < 10);
}

/* ---- storms: somebody is killed every 3 to 30 ms */

#define STORM_MS 2500
#define STORM_ITEMS (1u << 21)
#define STORM_PRODUCERS 3
#define STORM_CONSUMERS 2

static struct storm {
    _Atomic uint32_t next; /* item */
    _Atomic bool is_over;
    _Atomic uint8_t returned[STORM_ITEMS]; /* has its put returned? */
    _Atomic uint8_t came[STORM_ITEMS];     /* how often a consumer got it */
    uint16_t producer[STORM_ITEMS];        /* which life of which producer put it */
} *storm;

static size_t storm_len(void) { return random_below(8) == 0 ? SHMQ_SMALL + random_below(20000) : random_below(400); }

static void storm_producer(void *life)
{
    struct shmq *q = attach(CAPACITY);
    while (!storm->is_over) {
        uint32_t id = storm->next++;
        if (id >= STORM_ITEMS) { /* a fast machine */
            pause_ms(1);
            continue;
        }
        storm->producer[id] = (uint16_t)(uintptr_t)life;
        puts_ok(q, id, storm_len());
        storm->returned[id] = 1;
        if (random_below(64) == 0)
            usleep(200);
    }
    shmq_free(q);
}

static void storm_accept(const struct shmq_in *in)
{
    item_check(in->payload, in->method, in->len);
    CHECK(in->method < STORM_ITEMS);
    storm->came[in->method]++;
}

static void storm_consumer(void *arg)
{
    (void)arg;
    uint8_t scratch[SHMQ_SMALL];
    struct shmq_in in[4];
    struct shmq *q = attach(CAPACITY);
    while (!storm->is_over) {
        uint32_t n = 4;
        if (random_below(2) == 0 && shmq_get_batch_try(q, in, &n) == SHMQ_OK) {
            uint32_t keep = random_below(n + 1);
            for (uint32_t i = 0; i < keep; i++)
                storm_accept(&in[i]);
            if (keep < n)
                shmq_give_back_from(q, in[0].hand, in[keep].pos);
            else
                shmq_release(q, in[0].hand);
        } else if (shmq_get_wait(q, scratch, in, in_ms(50)) == SHMQ_OK) {
            storm_accept(in);
            if (in->hand >= 0)
                shmq_release(q, in->hand);
            free(in->heap);
        }
    }
    shmq_free(q);
}

/* The main process takes what is there, for `until_ms`, or (0) until nothing is left. The longest wait for an item, ms.
 */
static uint64_t storm_take(unsigned until_ms, bool is_only_consumer)
{
    static uint32_t last[1 << 16];
    uint64_t until = in_ms(until_ms), before = shmq_now_ns(), longest = 0;
    uint32_t id;
    while (until_ms == 0 || shmq_now_ns() < until) {
        if (item_get(survivor, &id, until_ms == 0 ? 0 : 30) != SHMQ_OK) {
            if (until_ms == 0)
                return longest;
            continue;
        }
        CHECK(id < STORM_ITEMS);
        storm->came[id]++;
        if (is_only_consumer) { /* each producer's items come in their order */
            CHECK(last[storm->producer[id]] <= id);
            last[storm->producer[id]] = id + 1;
        }
        uint64_t now = shmq_now_ns();
        longest = now - before > longest ? now - before : longest;
        before = now;
    }
    return longest / 1000000;
}

struct storm_losses {
    uint32_t lost, twice, never_returned;
};

static struct storm_losses storm_count(void)
{
    struct storm_losses n = {0, 0, 0};
    for (uint32_t id = 0; id < storm->next && id < STORM_ITEMS; id++) {
        n.lost += storm->returned[id] && storm->came[id] == 0;
        n.twice += storm->came[id] > 1 ? storm->came[id] - 1u : 0;
        n.never_returned += !storm->returned[id] && storm->came[id] > 0;
    }
    return n;
}

/* Kill and replace for a while. How many consumers were killed. */
static uint32_t storm_run(uint32_t n_producers, uint32_t n_consumers, bool kills_consumers, uint64_t *longest)
{
    pid_t pids[STORM_PRODUCERS + STORM_CONSUMERS];
    uint32_t n = n_producers + n_consumers, killed = 0;
    uintptr_t life = 0;
    for (uint32_t i = 0; i < n; i++)
        pids[i] = start_child(i < n_producers ? storm_producer : storm_consumer, (void *)++life);
    *longest = 0;
    for (uint64_t end = in_ms(STORM_MS); shmq_now_ns() < end;) {
        uint64_t waited = storm_take(3 + random_below(28), n_consumers == 0);
        *longest = waited > *longest ? waited : *longest;
        uint32_t i = random_below(kills_consumers ? n : n_producers);
        kill_child(pids[i]);
        killed += i >= n_producers;
        pids[i] = start_child(i < n_producers ? storm_producer : storm_consumer, (void *)++life);
    }
    storm->is_over = true;
    for (uint32_t i = 0; i < n; i++) {
        int status;
        while (waitpid(pids[i], &status, WNOHANG) == 0)
            storm_take(2, n_consumers == 0); /* who waits for room may need it */
        CHECK_EQ(status, 0);
    }
    storm_take(300, n_consumers == 0);
    return killed;
}

static void storm_over(void)
{
    WAIT_FOR(is_settled());
    still_works();
}

static void test_storm_that_kills_producers_loses_nothing(void)
{
    uint64_t longest;
    storm = shared_bytes(sizeof *storm);
    survivor = attach(CAPACITY);
    storm_run(STORM_PRODUCERS, 0, false, &longest);
    struct storm_losses n = storm_count();
    context("of %u items, longest wait %" PRIu64 " ms", storm->next, longest);
    CHECK_EQ(n.lost, 0);
    CHECK_EQ(n.twice, 0);
    CHECK(longest < 1500);
    storm_over();
}

static void test_storm_that_kills_consumers_loses_no_more_than_they_had(void)
{
    uint64_t longest;
    storm = shared_bytes(sizeof *storm);
    survivor = attach(CAPACITY);
    uint32_t killed = storm_run(STORM_PRODUCERS, STORM_CONSUMERS, true, &longest);
    struct storm_losses n = storm_count();
    context("of %u items, %u consumers were killed, %u lost, %u came twice", storm->next, killed, n.lost, n.twice);
    CHECK(n.lost <= killed);      /* one that was off the queue, and not noted yet */
    CHECK(n.twice <= 4 * killed); /* a batch that was noted, and not let go of yet */
    storm_over();
}

/* ---- nothing was forgotten */

static void test_somebody_was_killed_at_every_failpoint_of_the_sources(void)
{
    DIR *folder = opendir("core");
    int n = 0;
    context("this test reads core/, from the repository's root");
    CHECK(folder != NULL);
    for (struct dirent *e; (e = readdir(folder)) != NULL;) {
        const char *end = strrchr(e->d_name, '.');
        if (end != NULL && (strcmp(end, ".c") == 0 || strcmp(end, ".h") == 0) && strcmp(e->d_name, "attach.c") != 0 &&
            strcmp(e->d_name, "failpoint.h") != 0)
            n += died_everywhere_in("core", e->d_name);
    }
    closedir(folder);
    tell_deaths(n, "all sources but attach.c");
}

static const struct test tests[] = {
    TEST(test_survivor_gets_all_in_order_wherever_another_was_killed),
    TEST(test_survivor_gets_all_in_order_when_two_were_killed_one_after_the_other),
    TEST(test_somebody_was_killed_at_every_failpoint_of_the_sources),
    TEST(test_sweep_does_not_touch_room_that_was_used_again),
    TEST(test_others_go_on_wherever_one_is_frozen),
    TEST(test_call_without_time_gives_up_on_a_frozen_ones_lock_soon),
    TEST(test_who_waits_goes_on_soon_after_a_death),
    TEST(test_items_pass_a_producer_frozen_in_the_middle_of_100_MB),
    TEST(test_storm_that_kills_producers_loses_nothing),
    TEST(test_storm_that_kills_consumers_loses_no_more_than_they_had),
};
RUN_TESTS(tests)
