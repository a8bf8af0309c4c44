/* ring.h - records in a circle of bytes.
 * Works on memory the caller owns; knows no names, locks or clocks (see queue.c). The byte format is in layout.h;
 * the order of loads and stores is in docs/protocol.md. A record always begins at its canonical address, below
 * `capacity`; only its tail runs into the mirror, so no record is ever split. */
#ifndef SHMQ_RING_H
#define SHMQ_RING_H

#include <stdbool.h>
#include <string.h>

#include "layout.h"
#include "shmq.h"

/* `base` is where `capacity` bytes are mapped twice, back to back. mask: capacity - 1 for a power of two, else 0. */
struct shmq_ring {
    uint8_t *base;
    uint64_t capacity, mask;
};

struct shmq_record {
    uint64_t pos;
    uint32_t len;
    uint32_t method;
};

static inline uint64_t shmq_record_size(uint64_t len) { return SHMQ_RECORD_HDR + len; }

/* The canonical address of a position. */
static inline uint8_t *shmq_ring_at(const struct shmq_ring *ring, uint64_t pos)
{
    return ring->base + (ring->mask != 0 ? pos & ring->mask : pos % ring->capacity);
}

/* Write a record's header at pos. Caller holds the producing lock and has the room. */
static inline void shmq_ring_begin(const struct shmq_ring *ring, const struct shmq_record *record,
                                   enum shmq_state state)
{
    uint64_t word = (uint64_t)record->len << 32 | (uint64_t)record->method << 8 | (uint64_t)state;
    memcpy(shmq_ring_at(ring, record->pos), &word, sizeof word);
}

/* The state of the record at pos; its header and payload may be read after that. Any byte may stand there. */
static inline uint8_t shmq_ring_state(const struct shmq_ring *ring, uint64_t pos)
{
    /* [A3] pairs with [R3]: who sees `committed` sees every payload byte */
    return atomic_load_explicit((_Atomic uint8_t *)shmq_ring_at(ring, pos), memory_order_acquire);
}

static inline void shmq_ring_set_state(const struct shmq_ring *ring, uint64_t pos, enum shmq_state state)
{
    /* [R3] pairs with [A3] */
    atomic_store_explicit((_Atomic uint8_t *)shmq_ring_at(ring, pos), (uint8_t)state, memory_order_release);
}

/* Read the header at pos once. False: its length doesn't fit below `limit` (the length is in out->len all the same). */
static inline bool shmq_ring_read(const struct shmq_ring *ring, uint64_t pos, uint64_t limit, struct shmq_record *out)
{
    const uint8_t *at = shmq_ring_at(ring, pos);
    uint32_t len, method; /* without the state's byte: a reservation's owner may be storing to it */
    memcpy(&len, at + 4, sizeof len);
    memcpy(&method, at + 1, sizeof method);
    *out = (struct shmq_record){pos, len, method & 0xffffff};
    return limit - pos <= ring->capacity && shmq_record_size(out->len) <= limit - pos;
}

static inline uint8_t *shmq_ring_payload(const struct shmq_ring *ring, uint64_t pos)
{
    return shmq_ring_at(ring, pos) + SHMQ_RECORD_HDR;
}

/* The header word at pos (layout.h), for who holds nothing and afterwards looks whether what it saw was still so:
 * the bytes may be somebody's payload by now, and being written. */
uint64_t shmq_ring_peek(const struct shmq_ring *ring, uint64_t pos);

/* Copy a payload to the record at pos. The bytes are the caller's: beyond put_pos, or reserved. */
void shmq_ring_fill(const struct shmq_ring *ring, uint64_t pos, const struct shmq_out *out);

#endif
