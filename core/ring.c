/* ring.c - the parts of ring.h that aren't a few instructions, or must not be inlined. */
#include "ring.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define STREAM_FROM (UINT32_C(256) << 10)  /* bytes of a part */
#define CACHED_UP_TO (UINT32_C(16) << 20) /* bytes of a ring; about what a common cache still has of it after a lap */

/* Copy around the caches: ordinary stores would fetch the lines first that they overwrite, from memory if the ring is
 * larger than the caches. In a smaller one the bytes had better stay there for the reader. */
static void copy_streamed(uint8_t *to, const uint8_t *from, size_t len)
{
#if defined(__SSE2__)
    size_t head = -(uintptr_t)to % SHMQ_LINE;
    memcpy(to, from, head);
    for (to += head, from += head, len -= head; len >= SHMQ_LINE; to += SHMQ_LINE, from += SHMQ_LINE, len -= SHMQ_LINE)
        for (int i = 0; i < SHMQ_LINE; i += 16)
            _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
    _mm_sfence(); /* these stores know no order; what is published comes after them */
#endif
    memcpy(to, from, len);
}

void shmq_ring_fill(const struct shmq_ring *ring, uint64_t pos, const struct shmq_out *out)
{
    uint8_t *to = shmq_ring_payload(ring, pos);
    for (uint32_t i = 0; i < out->n_parts; i++) {
        if (out->is_aligned && i > 0)
            to += -(uintptr_t)to % SHMQ_ALIGN;
        if (out->parts[i].len >= STREAM_FROM && ring->capacity > CACHED_UP_TO)
            copy_streamed(to, out->parts[i].ptr, out->parts[i].len);
        else
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
