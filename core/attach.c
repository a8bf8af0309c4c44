/* attach.c - a segment's life: create, attach, fork, detach, unlink; and who is alive.
 * A segment is created complete or not at all. Every attachment holds a kernel lock on its slot's byte through a pinned
 * page, which the kernel drops at death; attach, detach and unlink hold byte 0. The items are queue.c's business. */
#define _POSIX_C_SOURCE 200809L
#include "handle.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BYTE0_TIMEOUT_NS UINT64_C(5000000000)
#define BYTE0_SLICE_NS UINT64_C(50000000) /* then it is time to look for signals */
#define BYTE0_PAUSE_NS UINT64_C(1000000) /* the kernel has no lock with a timeout; only attach and detach wait so */
#define GENERATION_BITS 53
#define MAX_CAPACITY (UINT64_C(1) << 46) /* two mappings of it fit into an address space */

static int fail(struct shmq_fault *fault, int status, const char *what, uint64_t found, uint64_t allowed, int error)
{
    *fault = (struct shmq_fault){what, found, allowed, error};
    return status;
}

static int fail_system(struct shmq_fault *fault, const char *what, int error)
{
    return fail(fault, SHMQ_SYSTEM, what, 0, 0, error);
}

static bool is_same_file(const struct port_file *a, const struct port_file *b)
{
    return a->device == b->device && a->inode == b->inode;
}

static uint64_t ring_offset(void)
{
    uint64_t page = port_page_size();
    return (sizeof(struct shmq_segment) + page - 1) / page * page;
}

/* ---- who is alive */

/* Is this number still our probe? The program may have closed it, and opened something else. Only a read-only
 * description is one: one that can hold locks would not see its own. */
static bool is_probe(const struct shmq *q, int fd)
{
    struct port_file file;
    return fd >= 0 && port_stat(fd, &file) == 0 && is_same_file(&file, &q->file) && port_is_to_look(fd);
}

/* A descriptor to ask through; a lost one is opened anew, if the name still leads to our segment. -1: can't ask. */
static int probe_fd(struct shmq *q)
{
    struct port_file file;
    if (is_probe(q, q->probe_fd))
        return q->probe_fd;
    q->probe_fd = -1;
    int fd;
    if (port_open_to_look(q->path, &fd) != 0)
        return -1;
    if (port_stat(fd, &file) != 0 || !is_same_file(&file, &q->file)) {
        port_close(fd);
        return -1;
    }
    return q->probe_fd = fd;
}

SHMQ_COLD int shmq_check_file(struct shmq *q)
{
    struct port_file file;
    bool is_cut = port_stat(q->probe_fd, &file) == 0 && is_same_file(&file, &q->file) && file.size < q->file.size;
    if (is_cut) {
        shmq_corrupt(q, "file size", file.size, q->file.size);
        atomic_store(&q->is_cut, true);
    }
    return atomic_load(&q->is_cut) ? SHMQ_CORRUPT : SHMQ_OK;
}

/* Is this slot's byte locked by somebody? Yes when in doubt: a live owner must never be robbed. */
static bool is_slot_locked(struct shmq *q, uint32_t slot)
{
    uint64_t byte;
    int fd = probe_fd(q);
    if (fd < 0 || port_first_locked(fd, SHMQ_SLOT_BYTE(slot), SHMQ_SLOT_BYTE(slot), &byte) != 0 || byte != UINT64_MAX)
        return true;
    /* the descriptor may have been swapped under us by another thread */
    return !is_probe(q, fd);
}

bool shmq_is_dead(void *arg, uint64_t owner)
{
    struct shmq *q = arg;
    uint32_t slot = shmq_slot_of(owner);
    if (owner == q->self)
        return false; /* a thread of ours */
    if (slot >= SHMQ_SLOTS)
        return true; /* nobody was ever called that */
    if (!is_slot_locked(q, slot))
        return true;
    /* [A6] pairs with [R6], read after the probe: a newer owner of the slot means that this one is gone. "Another"
     * would not do: we might see the generation before this one's. */
    uint64_t now = atomic_load_explicit(&q->seg->slot[slot].owner, memory_order_acquire);
    return (int64_t)(now - owner) > 0;
}

static bool is_slot_live(struct shmq *q, uint32_t slot)
{
    struct shmq_slot_hdr *s = &q->seg->slot[slot];
    return atomic_load_explicit(&s->is_attached, memory_order_acquire) && is_slot_locked(q, slot);
}

uint32_t shmq_refs(struct shmq *q)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < SHMQ_SLOTS; i++)
        if (is_slot_live(q, i))
            n += 1 + atomic_load_explicit(&q->seg->slot[i].manual_refs, memory_order_relaxed);
    return n;
}

void shmq_ref_add(struct shmq *q)
{
    atomic_fetch_add_explicit(&q->seg->slot[shmq_slot_of(q->self)].manual_refs, 1, memory_order_relaxed);
}

static bool drop_ref(struct shmq *q, uint32_t slot)
{
    _Atomic uint32_t *refs = &q->seg->slot[slot].manual_refs;
    uint32_t n = atomic_load_explicit(refs, memory_order_relaxed);
    while (n > 0)
        if (atomic_compare_exchange_weak_explicit(refs, &n, n - 1, memory_order_relaxed, memory_order_relaxed))
            return true;
    return false;
}

bool shmq_ref_drop(struct shmq *q)
{
    if (drop_ref(q, shmq_slot_of(q->self)))
        return true;
    for (uint32_t i = 0; i < SHMQ_SLOTS; i++)
        if (is_slot_live(q, i) && drop_ref(q, i))
            return true;
    return false;
}

/* ---- byte 0 */

/* Lock byte 0 of fd's file. OK | BUSY (fault->found: the pid that has it) | SYSTEM. Doesn't wait, as a fork must not
 * have to wait meanwhile: see pause_for_byte0(). */
static int lock_byte0(int fd, struct shmq_fault *fault)
{
    struct {
        struct shmq_segment_hdr hdr;
        struct shmq_waiters_hdr waiters;
    } head;
    int rc = port_lock_byte(fd, 0);
    if (rc == 0)
        return SHMQ_OK;
    if (rc != EAGAIN)
        return fail_system(fault, "lock", rc);
    uint32_t pid = port_read(fd, &head, sizeof head) == 0 ? head.waiters.busy_pid : 0;
    return fail(fault, SHMQ_BUSY, "attach", pid, 0, 0);
}

/* Before the next try, with the fork guard let go of. False: too late. */
static bool pause_for_byte0(uint64_t until_ns)
{
    _Atomic uint32_t never = 0;
    port_sleep(&never, 0, BYTE0_PAUSE_NS);
    return shmq_now_ns() < until_ns;
}

/* Does the name still lead to the file that fd has open? Asked under byte 0. */
static bool is_named(int fd, const char *path)
{
    struct port_file open_file, named;
    return port_stat(fd, &open_file) == 0 && open_file.links > 0 && port_stat_path(path, &named) == 0 &&
           is_same_file(&open_file, &named);
}

#define NO_SLOT_OF_OURS SHMQ_SLOTS

/* Does a live attachment other than `own` hold a slot? Asked through fd, which holds none. Yes when in doubt. Without
 * `own` one question sees all at one instant; around it takes three, lest one that forks from above to below between two
 * of them, and dies, isn't seen. */
static bool is_anyone_live(int fd, uint32_t own)
{
    const uint32_t from[] = {0, own + 1, 0}, to[] = {own, SHMQ_SLOTS, own};
    uint64_t byte = UINT64_MAX;
    int rc = 0;
    if (own == NO_SLOT_OF_OURS)
        return port_first_locked(fd, SHMQ_SLOT_BYTE(0), SHMQ_SLOT_BYTE(SHMQ_SLOTS - 1), &byte) != 0 ||
               byte != UINT64_MAX;
    for (int i = 0; i < 3 && rc == 0 && byte == UINT64_MAX; i++)
        if (from[i] < to[i])
            rc = port_first_locked(fd, SHMQ_SLOT_BYTE(from[i]), SHMQ_SLOT_BYTE(to[i] - 1), &byte);
    return rc != 0 || byte != UINT64_MAX;
}

/* ---- create */

static int write_header(int fd, uint64_t capacity)
{
    struct shmq_segment_hdr hdr = {
        .magic = SHMQ_MAGIC,
        .format = SHMQ_FORMAT,
        .ring_offset = (uint32_t)ring_offset(),
        .capacity = capacity,
        .created_ns = port_wall_ns(),
    };
    int rc = port_random(hdr.uuid, sizeof hdr.uuid);
    return rc != 0 ? rc : port_write(fd, &hdr, sizeof hdr);
}

/* A new segment without a name, byte 0 locked. */
static int create_nameless(const char *path, uint64_t capacity, uint32_t mode, int *fd, struct shmq_fault *fault)
{
    uint64_t size = ring_offset() + capacity;
    int rc = capacity > MAX_CAPACITY ? ENOSPC : port_create(path, size, mode, fd);
    if (rc != 0)
        return fail(fault, SHMQ_SYSTEM, "create", size, port_free_bytes(path), rc);
    if ((rc = write_header(*fd, capacity)) == 0)
        rc = port_lock_byte(*fd, 0);
    if (rc == 0)
        return SHMQ_OK;
    port_close(*fd);
    return fail_system(fault, "initialise", rc);
}

/* ---- attach */

/* Is this a segment of ours? OK | CORRUPT | VERSION | SYSTEM */
static int read_header(int fd, struct shmq_segment_hdr *hdr, struct shmq_fault *fault)
{
    struct port_file file;
    int rc = port_stat(fd, &file);
    if (rc != 0)
        return fail_system(fault, "stat", rc);
    if (!file.is_regular)
        return fail(fault, SHMQ_CORRUPT, "kind of file", 0, 0, 0);
    if (file.size < ring_offset())
        return fail(fault, SHMQ_CORRUPT, "file size", file.size, ring_offset(), 0);
    if ((rc = port_read(fd, hdr, sizeof *hdr)) != 0)
        return fail_system(fault, "read", rc);
    if (hdr->magic != SHMQ_MAGIC)
        return fail(fault, SHMQ_CORRUPT, "magic", hdr->magic, SHMQ_MAGIC, 0);
    if (hdr->format != SHMQ_FORMAT)
        return fail(fault, SHMQ_VERSION, "format", hdr->format, SHMQ_FORMAT, 0);
    if (hdr->ring_offset != ring_offset())
        return fail(fault, SHMQ_CORRUPT, "ring_offset", hdr->ring_offset, ring_offset(), 0);
    if (hdr->capacity == 0 || hdr->capacity % port_page_size() != 0 || hdr->capacity > MAX_CAPACITY)
        return fail(fault, SHMQ_CORRUPT, "capacity", hdr->capacity, MAX_CAPACITY, 0);
    if (file.size != hdr->ring_offset + hdr->capacity)
        return fail(fault, SHMQ_CORRUPT, "file size", file.size, hdr->ring_offset + hdr->capacity, 0);
    return SHMQ_OK;
}

/* Lock a free slot's byte through fd. Slots that were left cleanly come first: a dead owner's may hold records. */
static int lock_slot(int fd, const struct shmq_segment *seg, uint32_t *slot)
{
    for (int dead_too = 0; dead_too < 2; dead_too++)
        for (uint32_t i = 0; i < SHMQ_SLOTS; i++) {
            if ((int)atomic_load_explicit(&seg->slot[i].is_attached, memory_order_relaxed) != 0 && !dead_too)
                continue;
            if (port_lock_byte(fd, SHMQ_SLOT_BYTE(i)) == 0) {
                *slot = i;
                return SHMQ_OK;
            }
        }
    return SHMQ_NO_SLOT;
}

/* Make the locked slot ours: from here on, whatever its last owner left counts as a dead one's. */
static uint64_t occupy_slot(struct shmq_segment *seg, uint32_t slot)
{
    struct shmq_slot_hdr *s = &seg->slot[slot];
    uint64_t generation = atomic_load_explicit(&s->owner, memory_order_relaxed) >> (SHMQ_SLOT_BITS + 1);
    uint64_t start = 0;
    if (generation == 0 && port_random(&start, sizeof start) == 0)
        generation = start >> (64 - GENERATION_BITS + 8); /* starts anywhere in the first 256th: never wraps */
    uint64_t owner = shmq_owner_of(generation + 1, slot);
    atomic_store_explicit(&s->manual_refs, 0, memory_order_relaxed);
    atomic_store_explicit(&s->pid, port_pid(), memory_order_relaxed);
    atomic_store_explicit(&s->since_ns, port_wall_ns(), memory_order_relaxed);
    /* [R6] pairs with [A6] */
    atomic_store_explicit(&s->owner, owner, memory_order_release);
    SHMQ_FAILPOINT("attach:occupied"); /* dies here: the byte's lock goes, the slot is free */
    atomic_store_explicit(&s->is_attached, 1, memory_order_release);
    return owner;
}

static void use_mapping(struct shmq *q, void *base, uint64_t ring_offset, uint64_t capacity)
{
    bool is_power_of_2 = (capacity & (capacity - 1)) == 0;
    q->seg = base;
    q->ring_offset = ring_offset;
    q->ring = (struct shmq_ring){(uint8_t *)base + ring_offset, capacity, is_power_of_2 ? capacity - 1 : 0};
    q->reservations = (struct shmq_hands){q->seg->reservations, SHMQ_R_ENTRIES, &q->seg->side[SHMQ_PRODUCING].top};
    q->claims = (struct shmq_hands){q->seg->claims, SHMQ_H_ENTRIES, &q->seg->side[SHMQ_CONSUMING].top};
}

/* Map the segment behind q->path, and open the probe. Neither through the descriptor that holds our locks: a forked
 * child inherits both. */
static int map_segment(struct shmq *q, const struct shmq_segment_hdr *hdr)
{
    void *base = NULL;
    int fd, rc = port_open(q->path, &fd);
    if (rc != 0)
        return rc;
    if ((rc = port_stat(fd, &q->file)) == 0 && (rc = port_open_to_look(q->path, &q->probe_fd)) == 0)
        rc = port_map(fd, hdr->ring_offset, hdr->capacity, &base);
    port_close(fd);
    if (rc != 0)
        return rc;
    use_mapping(q, base, hdr->ring_offset, hdr->capacity);
    return 0;
}

static void unmap_segment(struct shmq *q)
{
    void *base = q->seg;
    q->seg = NULL; /* first: a fork in between must not leave the child with an address of nothing */
    if (base != NULL)
        port_unmap(base, q->ring_offset, q->ring.capacity);
}

/* Get a slot of q's mapped segment through fd, on which byte 0 is held, and pin it. fd is the caller's to close. */
static int join(struct shmq *q, int fd, struct shmq_fault *fault)
{
    uint32_t slot;
    atomic_store_explicit(&q->seg->waiters.busy_pid, port_pid(), memory_order_relaxed);
    if (lock_slot(fd, q->seg, &slot) != SHMQ_OK)
        return fail(fault, SHMQ_NO_SLOT, "attachments", SHMQ_SLOTS, SHMQ_SLOTS, 0);
    int rc = port_pin(fd, &q->pin);
    if (rc != 0)
        return fail_system(fault, "pin", rc);
    q->self = occupy_slot(q->seg, slot);
    q->cookie = port_cookie();
    return SHMQ_OK;
}

/* Nobody lives, nothing is in it, and it has another size than the one wished for: replace it. */
static bool is_stale(struct shmq *q, int fd, uint64_t capacity)
{
    struct shmq_info info;
    if (q->ring.capacity == capacity || is_anyone_live(fd, NO_SLOT_OF_OURS))
        return false;
    return shmq_info(q, &info) == SHMQ_OK && info.qsize == 0 && !shmq_is_in_hand(q);
}

/* Attach to the named segment behind q->path. ENOENT in fault->error: there is none (any more). */
static int attach(struct shmq *q, uint64_t capacity, struct shmq_fault *fault)
{
    struct shmq_segment_hdr hdr;
    int fd, rc = port_open(q->path, &fd);           /* will hold byte 0 and our slot */
    if (rc == ELOOP || rc == EISDIR || rc == ENXIO) /* a symbolic link, a folder, a socket */
        return fail(fault, SHMQ_CORRUPT, "kind of file", 0, 0, 0);
    if (rc != 0)
        return fail_system(fault, "open", rc);
    rc = read_header(fd, &hdr, fault);
    if (rc == SHMQ_OK)
        rc = lock_byte0(fd, fault);
    int error = 0;
    if (rc == SHMQ_OK && (error = map_segment(q, &hdr)) != 0)
        rc = fail_system(fault, "map", error);
    if (rc == SHMQ_OK && !is_named(fd, q->path)) /* asked last, so that what was mapped is the same */
        rc = fail_system(fault, "open", ENOENT); /* unlinked while we waited: start over */
    if (rc == SHMQ_OK && q->file.size != hdr.ring_offset + hdr.capacity) /* cut while we waited */
        rc = fail(fault, SHMQ_CORRUPT, "file size", q->file.size, hdr.ring_offset + hdr.capacity, 0);
    if (rc == SHMQ_OK && is_stale(q, fd, capacity)) {
        port_unlink(q->path);
        rc = fail_system(fault, "open", ENOENT);
    }
    if (rc == SHMQ_OK)
        rc = join(q, fd, fault);
    port_unlock_byte(fd, 0); /* the pin keeps the description, so closing wouldn't */
    port_close(fd);
    return rc;
}

/* Give the nameless segment its name and attach. EEXIST in fault->error: somebody was faster. */
static int create(struct shmq *q, uint64_t capacity, uint32_t mode, struct shmq_fault *fault)
{
    struct shmq_segment_hdr hdr;
    int fd, rc = create_nameless(q->path, capacity, mode, &fd, fault);
    if (rc != SHMQ_OK)
        return rc;
    int error = port_link(fd, q->path);
    if (error == 0) {
        SHMQ_FAILPOINT("create:named"); /* dies here: an empty segment, adopted by who comes next */
        if ((rc = read_header(fd, &hdr, fault)) == SHMQ_OK)
            error = map_segment(q, &hdr);
        if (error == 0 && !is_named(fd, q->path))
            error = ENOENT; /* removed by hand already */
        if (error == 0 && rc == SHMQ_OK)
            rc = join(q, fd, fault);
        q->was_created = error == 0 && rc == SHMQ_OK;
        if (!q->was_created && is_named(fd, q->path)) /* by now the name may lead to somebody else's */
            port_unlink(q->path);
    }
    port_unlock_byte(fd, 0);
    port_close(fd);
    return error != 0 ? fail_system(fault, "create", error) : rc;
}

static void drop_probe(struct shmq *q)
{
    if (is_probe(q, q->probe_fd))
        port_close(q->probe_fd);
    q->probe_fd = -1;
}

static void drop_files(struct shmq *q)
{
    unmap_segment(q);
    drop_probe(q);
}

int shmq_open(struct shmq **out, const char *path, uint64_t capacity, uint32_t mode, uint64_t deadline_ns,
              struct shmq_fault *fault)
{
    *out = NULL;
    struct shmq *q = calloc(1, sizeof *q);
    if (q == NULL || (q->path = strdup(path)) == NULL) {
        free(q);
        return fail_system(fault, "allocate", ENOMEM);
    }
    q->probe_fd = q->child_fd = -1;
    q->may_spin = port_cpus() > 1;
    port_cookie();
    int rc = SHMQ_SYSTEM;
    uint64_t slice = shmq_now_ns() + BYTE0_SLICE_NS;
    for (int tries = 0; tries < 100;) {
        port_fork_guard();
        rc = attach(q, capacity, fault);
        if (rc == SHMQ_SYSTEM && fault->error == ENOENT) {
            drop_files(q);
            rc = create(q, capacity, mode, fault);
        }
        port_fork_unguard();
        if (rc == SHMQ_BUSY && pause_for_byte0(slice < deadline_ns ? slice : deadline_ns))
            continue;
        if (rc != SHMQ_SYSTEM || (fault->error != ENOENT && fault->error != EEXIST))
            break;
        tries++; /* a round lost means that somebody else came or went */
        drop_files(q);
    }
    if (rc == SHMQ_BUSY && shmq_now_ns() < deadline_ns)
        rc = SHMQ_INTR;
    if (rc == SHMQ_OK) {
        *out = q;
        return SHMQ_OK;
    }
    drop_files(q);
    free(q->path);
    free(q);
    return rc;
}

/* ---- fork */

/* For the end of an attachment that nobody was left to end: a fork's that didn't happen, or whose handle was closed. */
static void unlink_if_unused(struct shmq *q)
{
    uint64_t deadline = shmq_now_ns() + BYTE0_TIMEOUT_NS;
    struct shmq_fault fault;
    struct port_file file;
    int fd, rc;
    if (port_open(q->path, &fd) != 0)
        return;
    if (port_stat(fd, &file) == 0 && is_same_file(&file, &q->file)) {
        while ((rc = lock_byte0(fd, &fault)) == SHMQ_BUSY && pause_for_byte0(deadline))
            ;
        if (rc == SHMQ_OK && is_named(fd, q->path) && !is_anyone_live(fd, NO_SLOT_OF_OURS))
            port_unlink(q->path);
        port_unlock_byte(fd, 0);
    }
    port_close(fd);
}

int shmq_fork_before(struct shmq *q)
{
    struct port_file file;
    uint32_t slot;
    int fd;
    shmq_fork_parent(q); /* of another thread's fork, or of one that an exception cut short: that child adopts */
    if (shmq_usable(q) != SHMQ_OK)
        return SHMQ_CLOSED;
    if (shmq_check_file(q) != SHMQ_OK || port_open(q->path, &fd) != 0)
        return SHMQ_GONE;
    if (port_stat(fd, &file) != 0 || !is_same_file(&file, &q->file) || lock_slot(fd, q->seg, &slot) != SHMQ_OK) {
        port_close(fd);
        return SHMQ_GONE;
    }
    q->child_self = occupy_slot(q->seg, slot);
    q->parent_pid = port_pid();
    q->child_fd = fd;
    return SHMQ_OK;
}

void shmq_fork_parent(struct shmq *q)
{
    int fd = q->child_fd;
    q->child_fd = -1;
    if (fd < 0)
        return;
    port_close(fd); /* the child's copy keeps the description */
    if (shmq_is_closing(q))
        unlink_if_unused(q);
}

/* The parent's threads and calls don't exist in the child. */
static void forget_parent(struct shmq *q)
{
    atomic_store(&q->calls, 0);
    q->cookie = port_cookie();
}

int shmq_fork_move(struct shmq *q)
{
    void *old = q->seg, *base;
    uint64_t ring_offset = q->ring_offset, capacity = q->ring.capacity;
    if (old == NULL)
        return SHMQ_CLOSED;
    int rc = q->child_fd >= 0 ? port_map(q->child_fd, ring_offset, capacity, &base) : EBADF;
    if (rc == 0)
        use_mapping(q, base, ring_offset, capacity);
    else
        q->seg = NULL; /* can't be used here, and must not be unmapped */
    port_blank(old, ring_offset + 2 * capacity);
    return rc == 0 ? SHMQ_OK : fail_system(&q->fault, "mmap", rc);
}

int shmq_fork_child(struct shmq *q)
{
    void *pin;
    int fd = q->child_fd, rc;
    q->child_fd = -1;
    if (fd < 0)
        return SHMQ_GONE;
    if (q->seg == NULL || shmq_is_closing(q)) { /* by another thread between the two steps */
        port_close(fd);
        unlink_if_unused(q);
        return SHMQ_CLOSED;
    }
    /* Two threads that fork at once may have two children come here with one slot: the first one takes it. */
    uint32_t parent = q->parent_pid;
    if (!atomic_compare_exchange_strong_explicit(&q->seg->slot[shmq_slot_of(q->child_self)].pid, &parent, port_pid(),
                                                 memory_order_relaxed, memory_order_relaxed)) {
        port_close(fd);
        return SHMQ_GONE; /* this one adopts */
    }
    if ((rc = port_pin(fd, &pin)) == 0) {
        forget_parent(q);
        q->pin = pin;
        q->self = q->child_self;
    }
    port_close(fd);
    return rc == 0 ? SHMQ_OK : fail_system(&q->fault, "pin", rc);
}

static int try_to_adopt(struct shmq *q)
{
    struct port_file file;
    int fd, rc = port_open(q->path, &fd);
    if (rc != 0)
        return rc == ENOENT ? SHMQ_GONE : fail_system(&q->fault, "open", rc);
    rc = port_stat(fd, &file) == 0 && is_same_file(&file, &q->file) ? lock_byte0(fd, &q->fault) : SHMQ_GONE;
    if (rc == SHMQ_OK && !is_named(fd, q->path))
        rc = SHMQ_GONE;
    if (rc == SHMQ_OK && (rc = join(q, fd, &q->fault)) == SHMQ_OK)
        atomic_store(&q->calls, 0);
    port_unlock_byte(fd, 0);
    port_close(fd);
    return rc;
}

int shmq_adopt(struct shmq *q)
{
    uint64_t deadline = shmq_now_ns() + BYTE0_TIMEOUT_NS;
    int rc;
    if (q->seg == NULL || shmq_is_closing(q))
        return SHMQ_CLOSED;
    if (shmq_check_file(q) != SHMQ_OK)
        return SHMQ_CORRUPT;
    do {
        port_fork_guard();
        rc = try_to_adopt(q);
        port_fork_unguard();
    } while (rc == SHMQ_BUSY && pause_for_byte0(deadline));
    return rc;
}

/* ---- detach */

static void let_go_of_slot(struct shmq *q)
{
    if (q->pin == NULL)
        return;
    if (!q->is_cut)
        atomic_store_explicit(&q->seg->slot[shmq_slot_of(q->self)].is_attached, 0, memory_order_release);
    port_unpin(q->pin);
    q->pin = NULL;
}

int shmq_prefault(struct shmq *q)
{
    int rc = shmq_hold(q);
    if (rc != SHMQ_OK)
        return rc;
    int error = port_prefault(q->seg, q->ring_offset + 2 * q->ring.capacity);
    rc = error == 0 ? SHMQ_OK : fail_system(&q->fault, "madvise", error);
    shmq_let_go(q);
    return rc;
}

void shmq_keep_items(struct shmq *q) { q->keeps_items = true; }

static bool has_items(struct shmq *q)
{
    struct shmq_info info;
    return !q->is_cut && shmq_info(q, &info) == SHMQ_OK &&
           (info.qsize > 0 || info.free_pos < info.get_pos); /* or claimed ones */
}

/* Under byte 0: unlink unless somebody else lives; then let go of the slot if asked. BUSY: none of it. */
static int try_to_unlink(struct shmq *q, bool let_go)
{
    struct port_file file;
    int fd, rc = port_open(q->path, &fd);
    if (rc != 0)
        return rc == ENOENT ? SHMQ_OK : fail_system(&q->fault, "open", rc);
    if (port_stat(fd, &file) != 0 || !is_same_file(&file, &q->file)) {
        port_close(fd); /* ours was removed by hand, this one is somebody else's */
        return SHMQ_OK;
    }
    rc = lock_byte0(fd, &q->fault);
    if (rc == SHMQ_BUSY) {
        port_close(fd);
        return rc;
    }
    if (rc == SHMQ_OK && is_named(fd, q->path)) {
        if (!q->is_cut)
            atomic_store_explicit(&q->seg->waiters.busy_pid, port_pid(), memory_order_relaxed);
        bool stays = is_anyone_live(fd, shmq_slot_of(q->self)) || (q->keeps_items && has_items(q));
        int error = stays ? 0 : port_unlink(q->path);
        if (error != 0)
            rc = fail_system(&q->fault, "unlink", error);
    }
    SHMQ_FAILPOINT("detach:decided"); /* dies here: as if it had died before, or had left */
    if (let_go)
        let_go_of_slot(q);   /* still under byte 0: of two that leave at once the second sees the first gone */
    port_unlock_byte(fd, 0); /* a child between vfork and exec may have the descriptor too */
    port_close(fd);
    return rc;
}

static int unlink_if_last(struct shmq *q, bool let_go)
{
    uint64_t deadline = shmq_now_ns() + BYTE0_TIMEOUT_NS;
    int rc;
    do {
        port_fork_guard();
        rc = try_to_unlink(q, let_go);
        port_fork_unguard();
    } while (rc == SHMQ_BUSY && pause_for_byte0(deadline));
    return rc;
}

static bool is_ours(const struct shmq *q) /* or is the attachment our parent's? */
{
    return atomic_load_explicit(port_cookie_page, memory_order_relaxed) == q->cookie;
}

int shmq_detach(struct shmq *q)
{
    int rc = SHMQ_OK;
    if (atomic_exchange(&q->is_detached, true))
        return SHMQ_OK;
    if (is_ours(q)) {
        shmq_check_file(q);
        drop_probe(q); /* first: unlinking needs a descriptor, and there may be no other left */
        rc = unlink_if_last(q, true);
        port_fork_guard();
        let_go_of_slot(q);
        port_fork_unguard();
    }
    drop_files(q);
    return rc;
}

int shmq_leave(struct shmq *q)
{
    if (!is_ours(q) || atomic_load(&q->is_detached))
        return SHMQ_OK;
    return unlink_if_last(q, false);
}

void shmq_free(struct shmq *q)
{
    shmq_close(q, false);
    shmq_detach(q);
    free(q->path);
    free(q);
}

/* ---- what the rest of the core and the binding ask */

SHMQ_COLD int shmq_corrupt(struct shmq *q, const char *what, uint64_t found, uint64_t allowed)
{
    return fail(&q->fault, SHMQ_CORRUPT, what, found, allowed, 0);
}

int shmq_usable(const struct shmq *q)
{
    if (shmq_is_closing(q))
        return SHMQ_CLOSED;
    return atomic_load_explicit(port_cookie_page, memory_order_relaxed) == q->cookie ? SHMQ_OK : SHMQ_FORKED;
}

uint64_t shmq_process(void) { return port_cookie(); }
uint64_t shmq_capacity(const struct shmq *q) { return q->ring.capacity; }
const uint8_t *shmq_uuid(const struct shmq *q) { return q->seg->hdr.uuid; }
bool shmq_was_created(const struct shmq *q) { return q->was_created; }
const struct shmq_fault *shmq_fault(const struct shmq *q) { return &q->fault; }

uint32_t shmq_lock_pid(const struct shmq *q, int side)
{
    uint64_t owner = atomic_load_explicit(&q->seg->side[side].lock, memory_order_relaxed);
    uint32_t slot = shmq_slot_of(owner);
    return owner == 0 || slot >= SHMQ_SLOTS ? 0 : atomic_load_explicit(&q->seg->slot[slot].pid, memory_order_relaxed);
}
