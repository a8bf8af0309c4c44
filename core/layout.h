/* layout.h - the segment, byte by byte. docs/format.md says the same in prose; a test compares the two.
 *
 *   offset 0        struct shmq_segment_hdr   what the segment is; written before it has a name, never again
 *                   struct shmq_waiters_hdr   the two eventcounts
 *                   struct shmq_side_hdr x 2  the producing side, the consuming side: lock and position
 *                   struct shmq_slot_hdr[]    the attachment table
 *                   struct shmq_hand_hdr[]    R, the reservations in hand
 *                   struct shmq_hand_hdr[]    H, the claims in hand
 *   ring_offset     the ring: `capacity` bytes of records, mapped twice, back to back
 *
 * A record is one little-endian word and the payload, packed without padding:
 *   bits 0-7 state, 8-31 serialization method, 32-63 payload length in bytes.
 * Nothing read from here is trusted: see ring.c and check.c. */
#ifndef SHMQ_LAYOUT_H
#define SHMQ_LAYOUT_H

#include <stdalign.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "failpoint.h"

#define SHMQ_MAGIC UINT64_C(0x65756575716d6873) /* "shmqueue" */
#define SHMQ_FORMAT 1u
#define SHMQ_SLOTS 512u
#define SHMQ_R_ENTRIES 128u
#define SHMQ_H_ENTRIES 1216u
#define SHMQ_H_SPLITS 64u /* kept for splitting runs of records, and as many as R has for passed reservations */
#define SHMQ_H_CLAIMS (SHMQ_H_ENTRIES - SHMQ_H_SPLITS - SHMQ_R_ENTRIES)
#define SHMQ_RECORD_HDR 8u
#define SHMQ_LINE 64 /* bytes; groups are two lines apart, since lines are prefetched in pairs */

enum shmq_state { SHMQ_RESERVED = 1, SHMQ_COMMITTED = 2, SHMQ_ABANDONED = 3 };

/* An owner is an attachment: (generation << 11) | ((slot + 1) << 1). 0 is nobody. Bit 0 is free for the
 * locks' contended flag. The generation has 53 bits, so it doesn't wrap. */
#define SHMQ_CONTENDED UINT64_C(1)
#define SHMQ_SLOT_BITS 10

/* Written once by the creator, before the segment has a name. */
struct shmq_segment_hdr {
    uint64_t magic;
    uint32_t format;
    uint32_t ring_offset; /* bytes */
    uint64_t capacity;    /* bytes of the ring, a multiple of the page size */
    uint8_t uuid[16];
    uint64_t created_ns; /* wall clock */
    uint8_t reserved[80];
};

/* field        written by           rule
 * items        who put an item      counts wakes of consumers; a futex
 * items_asleep who sleeps, wakes    1: a consumer may be asleep; cleared by who wakes
 * room         who made room        counts wakes of producers; a futex
 * room_wanted  who sleeps, wakes    bytes that the least demanding sleeping producer needs; 0: none asleep
 * busy_pid     holder of byte 0     who attaches, detaches or unlinks; for the error message only */
struct shmq_waiters_hdr {
    alignas(2 * SHMQ_LINE) _Atomic uint32_t items;
    _Atomic uint32_t items_asleep;
    _Atomic uint32_t room;
    _Atomic uint32_t busy_pid;
    _Atomic uint64_t room_wanted;
};

/* A position and the number of records passed up to there. */
struct shmq_mark_hdr {
    _Atomic uint64_t pos;
    _Atomic uint64_t count;
};

/* field  written by           rule
 * lock   CAS                  owner, or 0; bit 0: somebody sleeps on the low half
 * seq    holder of the lock   mark[seq % 2] is the side's mark; bumping it publishes a critical section
 * mark   holder of the lock   pos is put_pos here, get_pos there: bytes since creation, never decreases
 * top    holder of the lock   entries of the side's table at and above it are free (a bound, not a count) */
struct shmq_side_hdr {
    alignas(2 * SHMQ_LINE) _Atomic uint64_t lock;
    _Atomic uint64_t seq;
    struct shmq_mark_hdr mark[2];
    _Atomic uint32_t top;
};

/* field        written by           rule
 * owner        holder of the byte   the slot's current or last owner; its generation only grows
 * is_attached  holder of the byte   1 from attach to detach; stays 1 at a death: the byte's lock tells
 * pid          holder of the byte   for people; liveness never depends on it
 * manual_refs  the attachment       references added by hand
 * since_ns     holder of the byte   wall clock of the attach */
struct shmq_slot_hdr {
    _Atomic uint64_t owner;
    _Atomic uint32_t is_attached;
    _Atomic uint32_t pid;
    _Atomic uint32_t manual_refs;
    uint32_t reserved0;
    _Atomic uint64_t since_ns;
    uint8_t reserved[32];
};

/* field       written by                     rule
 * pos1        lock holder; owner frees       position + 1 of the first record in hand; 0: the entry is free
 * owner       lock holder; owner gives back  0: nobody (H: deliverable when committed; R: abandoned)
 * end         lock holder                    where the last record ends: one record, or (H) a run of committed ones
 * deliveries  lock holder                    how often the records were claimed (H)
 * A beginning stores pos1 last; an ending, also of a run's first record, is one store to pos1 or owner. An entry at or
 * beyond the published position is void, and one that begins inside another. */
struct shmq_hand_hdr {
    _Atomic uint64_t pos1;
    _Atomic uint64_t owner;
    _Atomic uint64_t end;
    _Atomic uint32_t deliveries;
    uint32_t reserved;
};

enum { SHMQ_PRODUCING = 0, SHMQ_CONSUMING = 1 };

struct shmq_segment {
    struct shmq_segment_hdr hdr;
    struct shmq_waiters_hdr waiters;
    struct shmq_side_hdr side[2];
    struct shmq_slot_hdr slot[SHMQ_SLOTS];
    struct shmq_hand_hdr reservations[SHMQ_R_ENTRIES];
    struct shmq_hand_hdr claims[SHMQ_H_ENTRIES];
};

/* Each attachment holds a kernel lock on byte 1 + slot of the file; byte 0 guards attach, detach and unlink. */
#define SHMQ_SLOT_BYTE(slot) (1 + (slot))

_Static_assert(sizeof(struct shmq_segment_hdr) == 128, "layout");
_Static_assert(sizeof(struct shmq_waiters_hdr) == 128, "layout");
_Static_assert(sizeof(struct shmq_side_hdr) == 128, "layout");
_Static_assert(sizeof(struct shmq_slot_hdr) == 64, "layout");
_Static_assert(sizeof(struct shmq_hand_hdr) == 32, "layout");
_Static_assert(offsetof(struct shmq_segment, waiters) == 128, "layout");
_Static_assert(offsetof(struct shmq_segment, side) == 256, "layout");
_Static_assert(offsetof(struct shmq_segment, slot) == 512, "layout");
_Static_assert(offsetof(struct shmq_segment, reservations) == 33280, "layout");
_Static_assert(offsetof(struct shmq_segment, claims) == 37376, "layout");
_Static_assert(sizeof(struct shmq_segment) <= 100 * 1024, "layout");
_Static_assert(SHMQ_SLOTS < (1u << SHMQ_SLOT_BITS), "layout");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a lock's low half is its futex");

#endif
