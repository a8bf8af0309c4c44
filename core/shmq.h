/* shmq.h - the door to the core: a named FIFO queue of byte records between processes.
 *
 * A handle is one attachment. Any number of threads may use it. The `_try` calls and the status calls never
 * sleep (but for some ms when they find that somebody has died) and expect that the caller keeps shmq_close() out meanwhile (the binding does so by the GIL); the `_wait`
 * calls look after themselves. Deadlines are points on the monotonic clock (shmq_now_ns), 0 for "don't wait",
 * SHMQ_FOREVER for "no end". How it works: docs/protocol.md. */
#ifndef SHMQ_H
#define SHMQ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SHMQ_COLD __attribute__((cold)) /* off the way of a put or get that goes through at once */

#define SHMQ_FOREVER UINT64_MAX
#define SHMQ_MAX_LEN UINT32_MAX /* bytes of one payload */
#define SHMQ_SMALL 4096u        /* bytes; up to here payloads are copied inside the lock */
#define SHMQ_ALIGN 64u          /* bytes; where aligned parts begin in the ring */
#define SHMQ_MAX_BATCH 64u      /* records of one batch */

enum shmq_status {
    SHMQ_OK = 0,
    SHMQ_FULL,    /* no room before the deadline; nothing changed */
    SHMQ_EMPTY,   /* no record before the deadline; nothing changed */
    SHMQ_TOO_BIG, /* can never fit; nothing changed */
    SHMQ_CLAIMED, /* no more records can be claimed at once before the deadline; nothing changed */
    SHMQ_BUSY,    /* the side's lock is held by a live owner; nothing changed */
    SHMQ_INTR,    /* a signal, or time to look for one; nothing changed: call again */
    SHMQ_CLOSED,  /* the handle is closed, or closing */
    SHMQ_FORKED,  /* the handle belongs to a parent process: shmq_adopt() first */
    SHMQ_CORRUPT, /* see shmq_fault(): a value in the segment can't be */
    SHMQ_VERSION, /* the segment has another format; see shmq_fault() */
    SHMQ_SYSTEM,  /* see shmq_fault().error, an errno */
    SHMQ_NO_SLOT, /* all SHMQ_SLOTS attachments are in use */
    SHMQ_GONE,    /* the segment was removed, so there is nothing to adopt */
};

struct shmq; /* one attachment */

/* What went wrong, for messages: a field of the segment and what stands there, or a call and its errno. */
struct shmq_fault {
    const char *what;
    uint64_t found, allowed;
    int error;
};

/* A piece of a payload. */
struct shmq_part {
    const void *ptr;
    size_t len;
};

/* One record to put: its parts, one after the other. With `is_aligned` every part but the first begins at a
 * multiple of SHMQ_ALIGN in memory; the record is then SHMQ_ALIGN - 1 bytes longer for each. Made by shmq_out(). */
struct shmq_out {
    const struct shmq_part *parts;
    uint32_t n_parts;
    uint32_t method;
    bool is_aligned;
    uint64_t size; /* bytes in the ring, header included; more than any ring's for 4 GiB and more */
};

/* One record taken. A small one was copied to the caller's scratch and is off the queue; a big one (hand >= 0) is
 * claimed: copy `len` bytes from `payload` and shmq_release() it. `phase` is payload % SHMQ_ALIGN in the ring.
 * `deliveries` says how often a claimed record was claimed, this time included. */
struct shmq_in {
    const uint8_t *payload;
    uint8_t *heap; /* to be freed by the caller when not NULL: the payload's copy, where H was full */
    uint64_t pos;
    uint32_t len;
    uint32_t method;
    uint32_t phase;
    uint32_t deliveries;
    int32_t hand;
};

struct shmq_info {
    uint64_t put_pos, get_pos, free_pos; /* bytes since creation */
    uint64_t qsize;                      /* items put and not yet taken */
};

/* ---- life --------------------------------------------------------------------------------------------------- */

/* Attach to the segment at `path`, creating it with `capacity` bytes (a multiple of the page size) when there is
 * none. OK | VERSION | CORRUPT | SYSTEM | NO_SLOT | BUSY (somebody attaches until the deadline; found = its pid) |
 * INTR (time to look for a signal: call again). *out is NULL unless OK; *fault says what was wrong. */
int shmq_open(struct shmq **out, const char *path, uint64_t capacity, uint32_t mode, uint64_t deadline_ns,
              struct shmq_fault *fault);

/* Detach: wakes this handle's sleeping calls; the last call to leave lets go of the slot, and the last
 * attachment unlinks the segment. Never waits for other threads. With `now` the unlinking doesn't wait for the calls
 * inside: for a process about to end, whose death lets go of the rest. Twice is fine. Returns OK, or BUSY / SYSTEM when
 * the segment couldn't be looked at (it then stays in place; the attachment is gone all the same).
 * In two steps: begin, the one that the `_try` and status calls must be kept out of, refuses all calls from there on;
 * false: somebody has begun already. Who got true owes the end. */
int shmq_close(struct shmq *q, bool now);
bool shmq_close_begin(struct shmq *q);
int shmq_close_end(struct shmq *q, bool now);

/* Have all of the segment's pages at hand, so that no first touch costs a fault. OK | SYSTEM | CLOSED | FORKED */
int shmq_prefault(struct shmq *q);

/* If this attachment is the last to leave, it leaves the segment in place when items are in it. */
void shmq_keep_items(struct shmq *q);

/* Keep the handle attached, also while it is being closed: around waiting and copying. OK | CLOSED | FORKED */
int shmq_hold(struct shmq *q);
void shmq_let_go(struct shmq *q);

/* Free the handle's own memory; closes it first. No call may be inside. */
void shmq_free(struct shmq *q);

/* A fork in three steps. Before: get a slot for the child. Parent: let go of it. Child: make it its own.
 * shmq_adopt() is for children that none of this was done for. */
int shmq_fork_before(struct shmq *q);
void shmq_fork_parent(struct shmq *q);
int shmq_fork_child(struct shmq *q);

/* Before shmq_fork_child(), where the parent had records in hand whose addresses are in use: map the segment elsewhere.
 * At the old addresses there is private memory from now on, for good. OK | CLOSED | SYSTEM (the handle can't be used) */
int shmq_fork_move(struct shmq *q);
int shmq_adopt(struct shmq *q);

/* ---- items -------------------------------------------------------------------------------------------------- */

struct shmq_out shmq_out(const struct shmq_part *parts, uint32_t n_parts, uint32_t method, bool is_aligned);

/* Put up to n records in one critical section; *done says how many went in. OK: at least one.
 * OK | FULL | TOO_BIG (the first) | BUSY | CLOSED | FORKED | CORRUPT */
int shmq_put_try(struct shmq *q, const struct shmq_out *outs, uint32_t n, uint32_t *done);
int shmq_put_wait(struct shmq *q, const struct shmq_out *outs, uint32_t n, uint32_t *done, uint64_t deadline_ns);

/* Reserve room for one record of `len` bytes that the caller writes to `room->payload`, and then commits, or abandons as
 * if it had never been; a death abandons it. One store, no lock. Later records don't wait for it. Hold the handle
 * meanwhile. OK | FULL | CLAIMED (as many are open as can be) | TOO_BIG | BUSY | INTR | CLOSED | FORKED | CORRUPT */
int shmq_reserve(struct shmq *q, uint64_t len, uint32_t method, struct shmq_in *room, uint64_t deadline_ns);
void shmq_commit(struct shmq *q, const struct shmq_in *room);
void shmq_abandon(struct shmq *q, const struct shmq_in *room);

/* Take the oldest record. `scratch` holds SHMQ_SMALL bytes; NULL: claim the record, whatever its size, until it is
 * released or given back. OK | EMPTY | CLAIMED | BUSY | CLOSED | FORKED | CORRUPT */
int shmq_get_try(struct shmq *q, uint8_t *scratch, struct shmq_in *in);
int shmq_get_wait(struct shmq *q, uint8_t *scratch, struct shmq_in *in, uint64_t deadline_ns);

/* Claim up to n (at most SHMQ_MAX_BATCH) records of at most SHMQ_SMALL bytes that lie one after the other, as one
 * hand: *n says how many. shmq_release(in[0].hand) ends it. EMPTY: none, or the next one is not of that kind (use
 * shmq_get_try). */
int shmq_get_batch_try(struct shmq *q, struct shmq_in *in, uint32_t *n);

/* Give back the records of what is claimed from `pos` on, to be delivered before newer ones, and release the rest. */
void shmq_give_back_from(struct shmq *q, int32_t hand, uint64_t pos);

/* Done with a claimed record, or with a batch. One store, no lock. */
void shmq_release(struct shmq *q, int32_t hand);

/* Drop every item that nobody has in hand. OK | BUSY | INTR | ... */
int shmq_clear(struct shmq *q, uint64_t deadline_ns);

/* Take what dead attachments hold out of their hands. Every wait does so by itself; due: somebody has died and it
 * would show in what a status call says, or let a call that doesn't wait succeed. */
bool shmq_is_sweep_due(struct shmq *q);
void shmq_sweep(struct shmq *q);

/* ---- looking ------------------------------------------------------------------------------------------------ */

/* Is the segment's file still as long as it was? To touch what has been cut off ends the process (SIGBUS). So calls
 * that can afford to ask do: forks, closing, a sleep that has run out; in the binding the status calls. OK | CORRUPT */
int shmq_check_file(struct shmq *q);

int shmq_info(struct shmq *q, struct shmq_info *info); /* one instant; takes no lock. OK | CORRUPT | ... */
bool shmq_is_in_hand(const struct shmq *q);            /* may a record be in hand? */
uint64_t shmq_capacity(const struct shmq *q);
const uint8_t *shmq_uuid(const struct shmq *q); /* 16 bytes */
bool shmq_was_created(const struct shmq *q);    /* did shmq_open() create the segment? */
int shmq_usable(const struct shmq *q);          /* OK | CLOSED | FORKED */
const struct shmq_fault *shmq_fault(const struct shmq *q);
uint32_t shmq_lock_pid(const struct shmq *q, int side); /* who holds the side's lock; 0: nobody */

/* Live attachments plus their manual references. add: for this attachment; drop: one of this attachment's, or
 * else of any live one. false: there was none. */
uint32_t shmq_refs(struct shmq *q);
void shmq_ref_add(struct shmq *q);
bool shmq_ref_drop(struct shmq *q);

/* Compare the segment with every invariant, changing nothing; `report` gets a line for each that is broken.
 * OK (even when some are) | BUSY | INTR | CLOSED | FORKED */
int shmq_check(struct shmq *q, void (*report)(void *arg, const char *line), void *arg, uint64_t deadline_ns);

uint64_t shmq_now_ns(void);
uint64_t shmq_process(void); /* a number of this process that a forked child doesn't share */

#endif
