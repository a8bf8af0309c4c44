/* ring.c - the one part of ring.h that isn't a few instructions: copying a payload in. */
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
