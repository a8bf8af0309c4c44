/* port.h - everything the core asks of the operating system. One file per system implements it (port_linux.c).
 * Functions that can fail return 0 or an errno. */
#ifndef SHMQ_PORT_H
#define SHMQ_PORT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Clocks, in ns; a hint to the processor that we spin; processors of the machine, as we may be bound to one and those we
 * wait for to another; random bytes. */
uint64_t port_wall_ns(void);
void port_pause(void);
unsigned port_cpus(void);
int port_random(void *out, size_t n);

/* Sleep while *word == expected, at most timeout_ns: 0 woken or changed, EINTR, ETIMEDOUT. Between processes. */
int port_sleep(_Atomic uint32_t *word, uint32_t expected, uint64_t timeout_ns);
void port_wake(_Atomic uint32_t *word, int n);

/* A number that differs between a process and its forked children, also after a raw clone(). Never 0. */
uint64_t port_cookie(void);
extern _Atomic uint64_t *port_cookie_page; /* the same, for the fast path; 0 in a child that hasn't asked yet */

/* While held, no fork of this process begins: descriptors that hold a lock must not slip into a child. */
void port_fork_guard(void);
void port_fork_unguard(void);

/* What a descriptor leads to. */
struct port_file {
    uint64_t device, inode, links, size;
    bool is_regular;
};
int port_stat(int fd, struct port_file *out);
int port_stat_path(const char *path, struct port_file *out);

/* Files. Create: one without a name in the folder of `path`, with all its bytes allocated; port_link names it. */
int port_open(const char *path, int *fd);
int port_open_to_look(const char *path, int *fd); /* read-only */
bool port_is_to_look(int fd);                     /* is this descriptor one of those? */
int port_create(const char *path, uint64_t size, uint32_t mode, int *fd);
int port_link(int fd, const char *path);
int port_unlink(const char *path);
int port_read(int fd, void *out, size_t n);
int port_write(int fd, const void *data, size_t n);
void port_close(int fd);
uint64_t port_free_bytes(const char *path); /* in the file system of `path`'s folder */

/* Kernel locks on bytes of a file, owned by the open file description and dropped with it.
 * lock: 0, or EAGAIN when another description has it. first_locked: the lowest byte in [from, to] that another
 * description has locked, UINT64_MAX when none; so never ask through a description that holds locks itself. */
int port_lock_byte(int fd, uint64_t byte);
int port_unlock_byte(int fd, uint64_t byte);
int port_first_locked(int fd, uint64_t from, uint64_t to, uint64_t *byte);

/* A page that keeps fd's description, and so its locks, alive until it is unpinned or the process ends; forked
 * children don't get it. */
int port_pin(int fd, void **pin);
void port_unpin(void *pin);

/* Map the segment: `ring_offset` bytes, then `capacity` bytes twice, back to back; where the system has huge pages for
 * such files, by those. prefault: have all pages of a mapping at hand, so that first touches cost no fault. */
int port_map(int fd, uint64_t ring_offset, uint64_t capacity, void **base);
int port_prefault(void *at, uint64_t size);
void port_blank(void *at, uint64_t size); /* private memory, zero, in place of what is mapped there */
void port_unmap(void *base, uint64_t ring_offset, uint64_t capacity);
uint64_t port_page_size(void);
uint32_t port_pid(void);

#endif
