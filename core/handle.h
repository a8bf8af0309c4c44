/* handle.h - an attachment as the core sees it: shared by attach.c, queue.c, look.c and the C tests; nobody else. */
#ifndef SHMQ_HANDLE_H
#define SHMQ_HANDLE_H

#include "event.h"
#include "hands.h"
#include "lock.h"
#include "port.h"
#include "ring.h"
#include "shmq.h"
#include "side.h"

struct shmq {
    struct shmq_segment *seg; /* the mapping; NULL once detached */
    struct shmq_ring ring;
    struct shmq_hands reservations, claims;
    uint64_t self;   /* our owner word */
    uint64_t cookie; /* of the process whose attachment this is */
    uint64_t ring_offset;
    char *path;
    struct port_file file; /* the segment's identity */
    void *pin;             /* holds the kernel lock on our slot's byte */
    int probe_fd;          /* never holds a lock; -1 when lost */
    int child_fd;          /* between fork_before and fork_parent or fork_child: the child's slot, locked */
    uint64_t child_self;
    uint32_t parent_pid;   /* what the child's slot says until the child has it */
    bool was_created, may_spin, keeps_items;
    _Atomic uint32_t
        calls; /* who holds the handle; SHMQ_CLOSING: nobody may any more, and the last to let go detaches */
    _Atomic bool is_detached;
    _Atomic bool is_cut; /* the file was found shorter than it was: nothing of the mapping is touched any more */
    /* what we last saw of the other side: bounds that can only be behind */
    _Atomic uint64_t put_seen, free_seen;
    _Atomic uint64_t next_look_ns; /* for the dead, on the way of a get */
    _Atomic bool has_caught_up;    /* the last record got was the last one seen */
    struct shmq_lag lag;
    struct shmq_spin spin; /* consumers'; a full ring is worth sleeping for */
    _Atomic uint32_t unbroken_sleeps; /* in a row, of any of its threads */
    struct shmq_fault fault;
};

#define SHMQ_CLOSING (UINT32_C(1) << 31)

static inline bool shmq_is_closing(const struct shmq *q)
{
    return (atomic_load_explicit(&((struct shmq *)q)->calls, memory_order_relaxed) & SHMQ_CLOSING) != 0;
}

static inline struct shmq_side_hdr *shmq_side(const struct shmq *q, int side) { return &q->seg->side[side]; }

static inline uint64_t shmq_owner_of(uint64_t generation, uint32_t slot)
{
    return generation << (SHMQ_SLOT_BITS + 1) | (uint64_t)(slot + 1) << 1;
}
/* SHMQ_SLOTS or more for what no owner can be */
static inline uint32_t shmq_slot_of(uint64_t owner)
{
    return (uint32_t)((owner >> 1) & ((1u << SHMQ_SLOT_BITS) - 1)) - 1;
}

/* Does nobody live under this owner word? "No" when in doubt. arg is the handle. */
bool shmq_is_dead(void *arg, uint64_t owner);

/* Record a broken value for shmq_fault(); returns SHMQ_CORRUPT. */
int shmq_corrupt(struct shmq *q, const char *what, uint64_t found, uint64_t allowed);

/* By attach.c. detach: unlink if we are the last, let go of the slot, unmap; when the last call has left.
 * leave: only unlink if we are the last. */
int shmq_detach(struct shmq *q);
int shmq_leave(struct shmq *q);

/* Take a side's lock; void what a dead holder had begun. OK | BUSY | INTR */
int shmq_enter_side(struct shmq *q, int side, uint64_t until_ns);

/* The same for a call with a deadline. The lock is waited for a little longer than that, as its owner may just have
 * been preempted; held by a live one even then it is BUSY. INTR: also when it's time to look for signals. */
int shmq_enter_side_by(struct shmq *q, int side, uint64_t deadline_ns);
static inline void shmq_leave_side(struct shmq *q, int side) { shmq_unlock(&shmq_side(q, side)->lock); }

#endif
