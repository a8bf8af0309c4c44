/* binding.h - what the files of the binding share: the handle object, and records as objects (codec.c). */
#ifndef SHMQUEUE_BINDING_H
#define SHMQUEUE_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "shmq.h"

/* A Python callable, called at C speed when it is a C function of the usual kind. */
struct callable {
    PyObject *object;
    PyObject *(*function)(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames); /* or NULL */
};

/* A handle. Policy and messages live in the Python class that inherits from it (queue.py): `_encode`, `_decode`,
 * `_failed`, `_seconds`. */
struct handle {
    PyObject_HEAD struct shmq *q;
    struct callable pack;   /* pack(data, None, pack_options) -> bytes, or raises */
    struct callable unpack; /* unpack(bytes or bytearray) -> object, or raises */
    PyObject *pack_options;
    PyObject *kept;    /* list of errors that get_many() kept for the next calls, or NULL */
    PyObject *scratch; /* a bytearray for small payloads, while no get uses it */
    Py_ssize_t n_memories; /* that are alive */
};

/* An object on its way into the ring. */
struct encoded {
    struct shmq_out out;
    struct shmq_part inline_parts[2];
    struct shmq_part *parts;
    Py_buffer *views; /* n_views buffers kept */
    Py_ssize_t n_views;
    PyObject *owner; /* what else is kept alive */
    uint8_t head[8];
};

struct callable codec_callable(PyObject *object);

/* Encode `data`. method: NULL for the default. 0, or -1 with an exception. Release what was encoded afterwards. */
int codec_encode(struct handle *self, PyObject *data, PyObject *method, struct encoded *e);
void codec_release(struct encoded *e);

/* The same for n objects by one call of the packer, which is faster. 1: they have to be encoded one by one. */
int codec_encode_all(struct handle *self, PyObject *const *data, uint32_t n, PyObject *method, struct encoded *e);

/* A record's payload as an object of ours: the one copy. bytes, or for the out-of-band method a writable memoryview. */
PyObject *codec_copy(const struct shmq_in *in);

/* Does the payload hold nothing but bytes (a msgpack bin)? Then its head's length, else 0. */
size_t codec_is_bytes(const struct shmq_in *in);

/* The object of a payload that codec_copy() made. */
PyObject *codec_decode(struct handle *self, uint32_t method, uint32_t phase, PyObject *payload);

/* The objects of n records, a list, by one call of the unpacker. NULL without an exception: decode them one by one. */
PyObject *codec_decode_all(struct handle *self, const struct shmq_in *in, uint32_t n);

/* The bytes of a record in hand (memory.c), reserved or claimed, and the hand itself, as long as somebody refers to it. */
struct memory {
    PyObject_HEAD struct handle *handle;
    struct shmq_in in;
    uint64_t process; /* whose it is; in a forked child its end does nothing */
    bool is_reserved, is_over, is_done;
};

struct memory *memory_new(PyTypeObject *type, struct handle *handle, const struct shmq_in *in, bool is_reserved);

/* When nobody refers to it any more, commit or release the record (done), else abandon it or give it back. */
void memory_end(struct memory *memory, bool is_done);

/* The lease or reservation of the memory ends. Make unusable what shows it, as far as that is safe: what `item` holds,
 * a list of the item, and what variables do of the frame (NULL: none), of those that called it, and of those that an
 * exception keeps. Never fails. The caller has one reference to the memory. */
void views_let_go(PyObject *memory, PyObject *item, PyObject *frame);

/* An item that is claimed (lease.c): it stays in the queue until it is released or given back. */
struct lease {
    PyObject_HEAD struct handle *handle;
    PyObject *item;   /* NULL while it isn't decoded */
    struct shmq_in in; /* in.hand < 0: the lease is over */
    uint64_t process; /* whose claim it is; in a forked child ending it does nothing */
    bool is_in_place;
    struct memory *memory; /* of an item in place, until the lease is over: what the item shows, and the claim's holder */
};

void lease_end(struct lease *lease, bool is_done);
void handle_end_hand(struct handle *self, const struct shmq_in *in, bool is_done);
/* Warn if something still shows the memory of a lease that is over. The caller has one reference to it. */
void handle_tell_shown(struct handle *self, struct memory *memory);
void handle_end_reservation(struct handle *self, const struct shmq_in *room, bool is_done);

struct module_state {
    PyTypeObject *lease_type, *memory_type;
};

extern PyType_Spec handle_spec, lease_spec, memory_spec;

/* end_reservation(held, is_done, frame): `held` is a list of the memory and the buffer, and is emptied. False: something
 * still shows the memory, so that the reservation couldn't be committed. */
PyObject *views_end_reservation(PyObject *module, PyObject *args);

/* Functions of the module; their argument is a dict of weak references to handles. */
PyObject *handles_before_fork(PyObject *module, PyObject *handles);
PyObject *handles_after_fork_in_parent(PyObject *module, PyObject *handles);
PyObject *handles_after_fork_in_child(PyObject *module, PyObject *handles);

#endif
