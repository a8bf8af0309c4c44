/* port_linux.c - port.h on Linux: futexes, open-file-description locks, O_TMPFILE, MADV_WIPEONFORK. */
#define _GNU_SOURCE
#include "port.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "shmq.h"

#define ALLOCATE_STEP (UINT64_C(8) << 20) /* bytes; so that a signal is seen and a shortage found early */

static uint64_t clock_ns(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t shmq_now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }
uint64_t port_wall_ns(void) { return clock_ns(CLOCK_REALTIME); }
uint64_t port_page_size(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }
uint32_t port_pid(void) { return (uint32_t)getpid(); }

void port_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

unsigned port_cpus(void)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (unsigned)n : 1;
}

int port_random(void *out, size_t n) { return getrandom(out, n, 0) == (ssize_t)n ? 0 : EIO; }

int port_sleep(_Atomic uint32_t *word, uint32_t expected, uint64_t timeout_ns)
{
    struct timespec t = {(time_t)(timeout_ns / 1000000000u), (long)(timeout_ns % 1000000000u)};
    if (syscall(SYS_futex, word, FUTEX_WAIT, expected, &t, NULL, 0) == 0 || errno == EAGAIN)
        return 0;
    return errno;
}

void port_wake(_Atomic uint32_t *word, int n) { syscall(SYS_futex, word, FUTEX_WAKE, n, NULL, NULL, 0); }

/* ---- forks */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t fork_mutex = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint64_t no_cookie;
_Atomic uint64_t *port_cookie_page = &no_cookie;

void port_fork_guard(void) { pthread_mutex_lock(&fork_mutex); }
void port_fork_unguard(void) { pthread_mutex_unlock(&fork_mutex); }

static void start(void)
{
    void *page = mmap(NULL, port_page_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED || madvise(page, port_page_size(), MADV_WIPEONFORK) != 0)
        abort(); /* Linux 4.14 and later have it; without it a child could act as its parent */
    port_cookie_page = page;
    pthread_atfork(port_fork_guard, port_fork_unguard, port_fork_unguard);
}

uint64_t port_cookie(void)
{
    pthread_once(&once, start);
    uint64_t cookie = atomic_load_explicit(port_cookie_page, memory_order_relaxed), fresh = 0;
    if (cookie != 0)
        return cookie;
    while (fresh == 0)
        if (port_random(&fresh, sizeof fresh) != 0)
            fresh = clock_ns(CLOCK_MONOTONIC) ^ ((uint64_t)getpid() << 40);
    if (atomic_compare_exchange_strong(port_cookie_page, &cookie, fresh))
        return fresh;
    return cookie;
}

/* ---- files */

static int or_errno(int rc) { return rc == 0 ? 0 : errno; }

static void describe(const struct stat *st, struct port_file *out)
{
    *out = (struct port_file){st->st_dev, st->st_ino, st->st_nlink, (uint64_t)st->st_size, S_ISREG(st->st_mode)};
}

int port_stat(int fd, struct port_file *out)
{
    struct stat st;
    *out = (struct port_file){0};
    if (fd < 0 || fstat(fd, &st) != 0)
        return fd < 0 ? EBADF : errno;
    describe(&st, out);
    return 0;
}

int port_stat_path(const char *path, struct port_file *out)
{
    struct stat st;
    *out = (struct port_file){0};
    if (lstat(path, &st) != 0)
        return errno;
    describe(&st, out);
    return 0;
}

int port_open(const char *path, int *fd)
{
    /* O_NONBLOCK: a fifo of that name must not hold us up. Without O_CREAT: a sticky folder refuses that on
     * other users' files. */
    *fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    return *fd < 0 ? errno : 0;
}

int port_open_to_look(const char *path, int *fd)
{
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    return *fd < 0 ? errno : 0;
}

bool port_is_to_look(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && (flags & O_ACCMODE) == O_RDONLY;
}

static void folder_of(const char *path, char *out)
{
    const char *slash = strrchr(path, '/');
    snprintf(out, PATH_MAX, "%.*s",
             slash == NULL   ? 1
             : slash == path ? 1
                             : (int)(slash - path),
             slash == NULL ? "." : path);
}

uint64_t port_free_bytes(const char *path)
{
    char folder[PATH_MAX];
    struct statvfs vfs;
    folder_of(path, folder);
    return statvfs(folder, &vfs) == 0 ? (uint64_t)vfs.f_bavail * vfs.f_frsize : 0;
}

int port_create(const char *path, uint64_t size, uint32_t mode, int *fd)
{
    char folder[PATH_MAX];
    folder_of(path, folder);
    *fd = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, mode);
    if (*fd < 0)
        return errno;
    int rc = or_errno(fchmod(*fd, mode)); /* the mode asked for, whatever the umask */
    if (rc == 0 && size > port_free_bytes(path))
        rc = ENOSPC; /* before any of it is taken from others */
    for (uint64_t done = 0; rc == 0 && done < size;) {
        uint64_t step = size - done < ALLOCATE_STEP ? size - done : ALLOCATE_STEP;
        rc = posix_fallocate(*fd, (off_t)done, (off_t)step);
        if (rc == 0)
            done += step;
        else if (rc == EINTR)
            rc = 0;
    }
    if (rc != 0)
        port_close(*fd);
    return rc;
}

int port_link(int fd, const char *path)
{
    char proc[64];
    if (linkat(fd, "", AT_FDCWD, path, AT_EMPTY_PATH) == 0)
        return 0;
    if (errno == EEXIST)
        return EEXIST;
    snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd); /* the way without privileges */
    return or_errno(linkat(AT_FDCWD, proc, AT_FDCWD, path, AT_SYMLINK_FOLLOW));
}

int port_unlink(const char *path) { return or_errno(unlink(path)); }

int port_read(int fd, void *out, size_t n)
{
    ssize_t got = pread(fd, out, n, 0);
    return got == (ssize_t)n ? 0 : got < 0 ? errno : ENODATA;
}

int port_write(int fd, const void *data, size_t n)
{
    ssize_t put = pwrite(fd, data, n, 0);
    return put == (ssize_t)n ? 0 : put < 0 ? errno : EIO;
}

void port_close(int fd) { close(fd); }

/* ---- locks on bytes */

static int ofd(int fd, int cmd, short type, uint64_t byte, uint64_t n, struct flock *out)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)byte, .l_len = (off_t)n};
    if (fcntl(fd, cmd, &lock) != 0)
        return errno;
    if (out != NULL)
        *out = lock;
    return 0;
}

int port_lock_byte(int fd, uint64_t byte)
{
    int rc = ofd(fd, F_OFD_SETLK, F_WRLCK, byte, 1, NULL);
    return rc == EACCES ? EAGAIN : rc;
}

int port_unlock_byte(int fd, uint64_t byte) { return ofd(fd, F_OFD_SETLK, F_UNLCK, byte, 1, NULL); }

int port_first_locked(int fd, uint64_t from, uint64_t to, uint64_t *byte)
{
    struct flock found = {0};
    *byte = UINT64_MAX;
    for (uint64_t end = to; from <= end;
         end = (uint64_t)found.l_start - 1) { /* the kernel names any, we want the first */
        int rc = ofd(fd, F_OFD_GETLK, F_WRLCK, from, end - from + 1, &found);
        if (rc != 0)
            return rc;
        if (found.l_type == F_UNLCK)
            return 0;
        *byte = (uint64_t)found.l_start < from ? from : (uint64_t)found.l_start;
        if (*byte == from)
            return 0;
    }
    return 0;
}

/* ---- mappings */

int port_pin(int fd, void **pin)
{
    size_t page = port_page_size();
    *pin = mmap(NULL, page, PROT_NONE, MAP_SHARED, fd, 0);
    if (*pin == MAP_FAILED)
        return errno;
    if (madvise(*pin, page, MADV_DONTFORK) != 0) {
        int rc = errno;
        munmap(*pin, page);
        return rc;
    }
    return 0;
}

void port_unpin(void *pin) { munmap(pin, port_page_size()); }

#define HUGE_PAGE (UINT64_C(2) << 20)

/* Where `size` bytes can be mapped. Bigger ones begin at a huge page, as the file does: else none could be used. */
static char *reserve_addresses(uint64_t size)
{
    uint64_t extra = size >= HUGE_PAGE ? HUGE_PAGE : 0;
    char *at = mmap(NULL, size + extra, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED || extra == 0)
        return at;
    uint64_t before = -(uintptr_t)at % HUGE_PAGE;
    if (before > 0)
        munmap(at, before);
    munmap(at + before + size, extra - before);
    return at + before;
}

int port_map(int fd, uint64_t ring_offset, uint64_t capacity, void **base)
{
    uint64_t size = ring_offset + 2 * capacity;
    char *at = reserve_addresses(size);
    *base = NULL;
    if (at == MAP_FAILED)
        return errno;
    char *mirror = at + ring_offset + capacity;
    int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_FIXED;
    if (mmap(at, ring_offset + capacity, prot, flags, fd, 0) == MAP_FAILED ||
        mmap(mirror, capacity, prot, flags, fd, (off_t)ring_offset) == MAP_FAILED) {
        int rc = errno;
        munmap(at, size);
        return rc;
    }
    madvise(at + ring_offset, 2 * capacity, MADV_DONTDUMP);
    madvise(at, size, MADV_HUGEPAGE); /* where the system is set up to ask */
    *base = at;
    return 0;
}

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

int port_prefault(void *at, uint64_t size)
{
    while (madvise(at, size, MADV_POPULATE_WRITE) != 0)
        if (errno == EINVAL) { /* before Linux 5.14 */
            for (uint64_t i = 0; i < size; i += port_page_size())
                (void)*((volatile const char *)at + i);
            return 0;
        } else if (errno != EINTR) {
            return errno;
        }
    return 0;
}

void port_blank(void *at, uint64_t size)
{
    mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

void port_unmap(void *base, uint64_t ring_offset, uint64_t capacity) { munmap(base, ring_offset + 2 * capacity); }
