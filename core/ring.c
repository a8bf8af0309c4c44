/* ring.c - the parts of ring.h that aren't a few instructions, or must not be inlined. */
#include "ring.h"

void shmq_ring_fill(const struct shmq_ring *ring, uint64_t pos, const struct shmq_out *out)
{
    uint8_t *to = shmq_ring_payload(ring, pos);
    for (uint32_t i = 0; i < out->n_parts; i++) {
        if (out->is_aligned && i > 0)
            to += -(uintptr_t)to % SHMQ_ALIGN;
        memcpy(to, out->parts[i].ptr, out->parts[i].len);
        to += out->parts[i].len;
    }
}

/* A race by intent, which the caller makes harmless by looking again; so the thread sanitizer is told to look away. */
__attribute__((noinline, no_sanitize("thread"))) uint64_t shmq_ring_peek(const struct shmq_ring *ring, uint64_t pos)
{
    uint64_t word;
    memcpy(&word, ring->base + pos % ring->capacity, sizeof word);
    atomic_thread_fence(memory_order_acquire); /* [A3] */
    return word;
}
