/* handle.c - the type `shmqueue._core.Handle`: put, get and the status calls, translated.
 * What can be done at once is done with the GIL held (about 100 ns). What has to wait, or copies much, is done without
 * it, in slices, between which Python's signal handlers run. */
#include "binding.h"
#include "docs.h"

#define BIG_PUT (64 * 1024)          /* bytes; from here on the GIL is worth releasing */
#define BATCH_BYTES (64 * 1024)      /* payload bytes after which a batch is sent off */
#define LOOK_NS UINT64_C(2000000000) /* how long clear() and check() wait for a lock */

#define ATTACH_NS UINT64_C(5000000000) /* and attaching for others that attach or detach */

#define NO_ITEM -1
#define SIZE_HEADER 8 /* bytes that a record takes beside its payload */

/* size: bytes that a put needs, 0 for a get, NO_ITEM for anything else. */
SHMQ_COLD static PyObject *fail(struct handle *self, int status, int64_t size, PyObject *timeout)
{
    PyObject *result =
        PyObject_CallMethod((PyObject *)self, "_failed", "iLO", status, (long long)size, timeout ? timeout : Py_None);
    Py_XDECREF(result); /* it raises */
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_SystemError, "_failed() returned");
    return NULL;
}

/* A forked child's first call makes the attachment its own. 0, or -1 with an exception. */
SHMQ_COLD static int ready(struct handle *self)
{
    int rc = self->q == NULL ? SHMQ_CLOSED : shmq_usable(self->q);
    if (rc == SHMQ_FORKED) {
        Py_CLEAR(self->kept); /* the parent's to raise */
        Py_BEGIN_ALLOW_THREADS rc = shmq_adopt(self->q);
        Py_END_ALLOW_THREADS
    }
    if (rc == SHMQ_OK)
        return 0;
    fail(self, rc, NO_ITEM, NULL);
    return -1;
}

/* ---- arguments */

struct wait {
    PyObject *timeout; /* as given, for messages */
    int block;
    double seconds; /* < 0: without end */
};

#define WAIT_FOR_EVER {NULL, 1, -1}
#define DONT_WAIT {NULL, 0, -1}
#define UNKNOWN 1 /* a deadline not worked out yet; on the way of most calls nobody asks for the time */

static int parse_wait(struct handle *self, PyObject *block, PyObject *timeout, struct wait *w)
{
    *w = (struct wait){timeout, block == NULL ? 1 : PyObject_IsTrue(block), -1};
    if (w->block < 0)
        return -1;
    if (!w->block || timeout == NULL || timeout == Py_None) {
        w->timeout = NULL;
        return 0;
    }
    PyObject *seconds = PyObject_CallMethod((PyObject *)self, "_seconds", "(O)", timeout);
    w->seconds = seconds != NULL ? PyFloat_AsDouble(seconds) : -1;
    Py_XDECREF(seconds);
    return PyErr_Occurred() ? -1 : 0;
}

static uint64_t deadline_of(const struct wait *w)
{
    if (!w->block)
        return shmq_now_ns(); /* so that no retry waits longer for a lock than the first would have */
    if (w->seconds < 0 || w->seconds > 9e9)
        return SHMQ_FOREVER;
    return shmq_now_ns() + (uint64_t)(w->seconds * 1e9);
}

/* Positional and keyword arguments of a METH_FASTCALL method into values[n], NULL where not given. */
static int parse(const char *method, const char *const *names, Py_ssize_t n, Py_ssize_t required, PyObject *const *args,
                 Py_ssize_t nargs, PyObject *kwnames, PyObject **values)
{
    for (Py_ssize_t i = 0; i < n; i++)
        values[i] = i < nargs ? args[i] : NULL;
    if (nargs > n) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %zd arguments (%zd given)", method, n, nargs);
        return -1;
    }
    for (Py_ssize_t k = 0; kwnames != NULL && k < PyTuple_GET_SIZE(kwnames); k++) {
        PyObject *name = PyTuple_GET_ITEM(kwnames, k);
        Py_ssize_t i = 0;
        while (i < n && PyUnicode_CompareWithASCIIString(name, names[i]) != 0)
            i++;
        if (i == n || values[i] != NULL) {
            PyErr_Format(PyExc_TypeError,
                         i == n ? "%s() got an unexpected keyword argument '%U'"
                                : "%s() got multiple values for argument '%U'",
                         method, name);
            return -1;
        }
        values[i] = args[nargs + k];
    }
    for (Py_ssize_t i = 0; i < required; i++)
        if (values[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() missing required argument: '%s'", method, names[i]);
            return -1;
        }
    return 0;
}

/* A number from 1 on, as its name says; -1 with an exception. */
static Py_ssize_t at_least_1(struct handle *self, const char *name, PyObject *value)
{
    PyObject *checked = PyObject_CallMethod((PyObject *)self, "_at_least_1", "sO", name, value);
    Py_ssize_t n = checked != NULL ? PyLong_AsSsize_t(checked) : -1;
    Py_XDECREF(checked);
    return n;
}

/* ---- put */

/* Put records until `deadline`, at least one. A status, or -1 with an exception. */
static int put_out(struct handle *self, const struct shmq_out *outs, uint32_t n, uint32_t *done, const struct wait *w,
                   uint64_t *deadline)
{
    int rc = SHMQ_BUSY;
    if (outs[0].size < BIG_PUT)
        rc = shmq_put_try(self->q, outs, n, done);
    while (rc == SHMQ_FORKED || rc == SHMQ_INTR || rc == SHMQ_BUSY ||
           (rc == SHMQ_FULL && (w->block || shmq_is_sweep_due(self->q)))) {
        if (rc == SHMQ_INTR ? PyErr_CheckSignals() < 0 : rc == SHMQ_FORKED && ready(self) < 0)
            return -1;
        if (*deadline == UNKNOWN)
            *deadline = deadline_of(w);
        Py_BEGIN_ALLOW_THREADS rc = shmq_put_wait(self->q, outs, n, done, *deadline);
        Py_END_ALLOW_THREADS if (rc == SHMQ_FULL || rc == SHMQ_BUSY) break; /* the deadline has passed */
    }
    return rc;
}

static PyObject *put(struct handle *self, PyObject *data, PyObject *method, const struct wait *w)
{
    struct encoded e;
    uint64_t deadline = UNKNOWN;
    uint32_t done;
    if (self->q == NULL)
        return fail(self, SHMQ_CLOSED, 0, NULL);
    if (codec_encode(self, data, method, &e) < 0)
        return NULL;
    int rc = put_out(self, &e.out, 1, &done, w, &deadline);
    uint64_t size = e.out.size;
    codec_release(&e);
    if (rc == SHMQ_OK)
        Py_RETURN_NONE;
    return rc < 0 ? NULL : fail(self, rc, (int64_t)size, w->timeout);
}

static PyObject *handle_put(struct handle *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"data", "block", "timeout", "serialization_method"};
    PyObject *v[4];
    struct wait w = WAIT_FOR_EVER;
    if (nargs == 1 && kwnames == NULL)
        return put(self, args[0], NULL, &w);
    if (parse("put", names, 4, 1, args, nargs, kwnames, v) < 0 || parse_wait(self, v[1], v[2], &w) < 0)
        return NULL;
    return put(self, v[0], v[3], &w);
}

static PyObject *handle_put_nowait(struct handle *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"data", "serialization_method"};
    PyObject *v[2];
    struct wait w = DONT_WAIT;
    if (parse("put_nowait", names, 2, 1, args, nargs, kwnames, v) < 0)
        return NULL;
    return put(self, v[0], v[1], &w);
}

/* ---- put_many */

struct batch {
    struct encoded e[SHMQ_MAX_BATCH];
    struct shmq_out out[SHMQ_MAX_BATCH];
    PyObject *data[SHMQ_MAX_BATCH];
    uint32_t n, n_read, max; /* encoded; read from the iterable, so many at least */
    uint64_t bytes;
    bool one_by_one; /* as something in it can't be packed together with others */
};

static void empty_batch(struct batch *b)
{
    for (uint32_t i = 0; i < b->n; i++)
        codec_release(&b->e[i]);
    for (uint32_t i = 0; i < b->n_read; i++)
        Py_DECREF(b->data[i]);
}

/* Send the whole batch off. On return b->n items from `*sent` on are still there. A status, or -1. */
SHMQ_COLD static int send_batch(struct handle *self, struct batch *b, uint32_t *sent, const struct wait *w,
                                uint64_t *deadline)
{
    int rc = SHMQ_OK;
    *sent = 0;
    for (uint32_t i = 0; i < b->n; i++)
        b->out[i] = b->e[i].out;
    while (rc == SHMQ_OK && *sent < b->n) {
        uint32_t done = 0;
        rc = put_out(self, b->out + *sent, b->n - *sent, &done, w, deadline);
        *sent += done;
    }
    return rc;
}

/* The exception that is set learns how far we came: the items not put (NULL: none), then the rest of the iterable. A signal handler
 * may raise meanwhile; then that is what the caller gets, and it learns the same. */
static void describe_rest(struct handle *self, PyObject *left, PyObject *rest, Py_ssize_t accepted)
{
    PyObject *type, *error, *trace, *result = NULL;
    if (left == NULL)
        left = Py_None;
    for (int tries = 0; tries < 10 && result == NULL; tries++) {
        PyErr_Fetch(&type, &error, &trace);
        PyErr_NormalizeException(&type, &error, &trace);
        result = PyObject_CallMethod((PyObject *)self, "_put_so_far", "OnOO", error, accepted, left, rest);
        if (result != NULL || PyErr_ExceptionMatches(PyExc_TypeError)) { /* one that takes no attributes */
            PyErr_Clear();
            PyErr_Restore(type, error, trace);
            break;
        }
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(trace);
    }
    Py_XDECREF(result);
}

/* Encode what was read, all together if that can be. 0 or -1; b->n says how far it came. */
static int encode_read(struct handle *self, PyObject *method, struct batch *b)
{
    uint32_t n = b->n_read - b->n;
    int rc = n > 1 ? codec_encode_all(self, b->data + b->n, n, method, &b->e[b->n]) : 1;
    if (n > 1 && rc != 0)
        b->one_by_one = true;
    if (rc < 0)
        return -1;
    for (; b->n < b->n_read; b->n++) {
        if (rc == 1 && codec_encode(self, b->data[b->n], method, &b->e[b->n]) < 0)
            return -1;
        b->bytes += b->e[b->n].out.size;
    }
    return 0;
}

/* How many items to read next: as many as there is room for, if they are like the last one. */
static uint32_t n_to_read(const struct batch *b)
{
    uint64_t n = b->one_by_one || b->n == 0 ? 1 : (BATCH_BYTES - b->bytes) / b->e[b->n - 1].out.size;
    return n == 0 ? 1 : n < b->max - b->n ? (uint32_t)n : b->max - b->n;
}

/* Read items until the batch is full. 0: go on; 1: the iterable has ended; -1: an exception. */
static int fill_batch(struct handle *self, PyObject *iterator, PyObject *method, struct batch *b)
{
    int more = 0;
    b->n = b->n_read = 0;
    b->bytes = 0;
    b->one_by_one = false;
    while (more == 0 && b->n < b->max && b->bytes < BATCH_BYTES) {
        for (uint32_t left = n_to_read(b); left > 0 && more == 0; left--) {
            PyObject *data = PyIter_Next(iterator);
            if (data != NULL)
                b->data[b->n_read++] = data;
            else
                more = PyErr_Occurred() ? -1 : 1;
        }
        if (more >= 0 && encode_read(self, method, b) < 0)
            more = -1;
    }
    return more;
}

/* What was read and isn't in the queue, from an item on. */
static PyObject *list_of_rest(struct batch *b, uint32_t from)
{
    PyObject *list = PyList_New(0);
    for (uint32_t i = from; list != NULL && i < b->n_read; i++)
        if (PyList_Append(list, b->data[i]) < 0)
            Py_CLEAR(list);
    return list;
}

/* One round: read a batch and put it. 0: go on; 1: all done; -1: an exception. A bad item's error comes when those
 * before it are in, so that it is the first of the rest. */
static int put_round(struct handle *self, PyObject *iterator, PyObject *method, struct batch *b, const struct wait *w,
                     uint64_t *deadline, Py_ssize_t *accepted)
{
    PyObject *type, *error, *trace;
    uint32_t sent = 0;
    int more = fill_batch(self, iterator, method, b);
    PyErr_Fetch(&type, &error, &trace);
    int rc = send_batch(self, b, &sent, w, deadline);
    *accepted += sent;
    if (rc != SHMQ_OK) {
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(trace);
        if (rc > 0)
            fail(self, rc, (int64_t)b->out[sent].size, w->timeout);
        PyErr_Fetch(&type, &error, &trace);
    }
    if (type != NULL) {
        more = -1;
        PyObject *left = list_of_rest(b, sent);
        PyErr_Restore(type, error, trace);
        if (left != NULL)
            describe_rest(self, left, iterator, *accepted);
        Py_XDECREF(left);
    }
    empty_batch(b);
    return more;
}

static PyObject *handle_put_many(struct handle *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"items", "block", "timeout", "serialization_method"};
    PyObject *v[4];
    struct wait w;
    uint64_t deadline;
    Py_ssize_t accepted = 0;
    int more = 0;
    if (parse("put_many", names, 4, 1, args, nargs, kwnames, v) < 0)
        return NULL;
    PyObject *iterator = PyObject_CallMethod((PyObject *)self, "_iterate", "(O)", v[0]);
    if (iterator != NULL && (parse_wait(self, v[1], v[2], &w) < 0 || ready(self) < 0)) {
        describe_rest(self, NULL, iterator, 0);
        Py_CLEAR(iterator);
    }
    struct batch *b = iterator ? PyMem_Malloc(sizeof *b) : NULL;
    if (iterator == NULL)
        return NULL;
    if (b == NULL)
        PyErr_NoMemory();
    else /* what a generator gave must not wait in here for its next item */
        b->max = PyList_CheckExact(v[0]) || PyTuple_CheckExact(v[0]) || PyRange_Check(v[0]) ? SHMQ_MAX_BATCH : 1;
    deadline = deadline_of(&w);
    while (b != NULL && more == 0)
        more = put_round(self, iterator, v[3], b, &w, &deadline, &accepted);
    PyMem_Free(b);
    Py_XDECREF(iterator);
    return more == 1 ? PyLong_FromSsize_t(accepted) : NULL;
}

/* ---- get */

static bool is_none(int rc) { return rc == SHMQ_EMPTY || rc == SHMQ_CLAIMED; }

/* Take the oldest record, waiting by `w`. On OK the handle is held if the record is in hand. A status, or -1. */
static int take(struct handle *self, uint8_t *scratch, struct shmq_in *in, const struct wait *w, uint64_t *deadline)
{
    int rc = shmq_get_try(self->q, scratch, in);
    if (rc == SHMQ_OK && in->hand >= 0)
        shmq_hold(self->q); /* can't be refused: the GIL keeps closing out */
    while (rc == SHMQ_FORKED || rc == SHMQ_INTR || rc == SHMQ_BUSY ||
           (is_none(rc) && (w->block || shmq_is_sweep_due(self->q)))) {
        if (rc == SHMQ_INTR ? PyErr_CheckSignals() < 0 : rc == SHMQ_FORKED && ready(self) < 0)
            return -1;
        if (*deadline == UNKNOWN)
            *deadline = deadline_of(w);
        Py_BEGIN_ALLOW_THREADS rc = shmq_hold(self->q);
        if (rc == SHMQ_OK) {
            rc = shmq_get_wait(self->q, scratch, in, *deadline);
            if (rc != SHMQ_OK || in->hand < 0)
                shmq_let_go(self->q);
        }
        Py_END_ALLOW_THREADS if (is_none(rc) || rc == SHMQ_BUSY) break; /* the deadline has passed */
    }
    return rc;
}

/* ---- scratch
 * A bytearray of SHMQ_SMALL bytes that a small payload is copied to and decoded from, kept for the next get: making a
 * bytes object each time costs as much as the rest of a get. Whoever uses it has taken it out of the handle. */

static PyObject *borrow_scratch(struct handle *self)
{
    PyObject *scratch = self->scratch;
    self->scratch = NULL;
    return scratch != NULL ? scratch : PyByteArray_FromStringAndSize(NULL, SHMQ_SMALL); /* one byte more */
}

/* Show no more of it than the payload; its size is ours to set, as nobody else has seen it yet. */
static void set_scratch_size(PyObject *scratch, Py_ssize_t size)
{
    PyByteArray_AS_STRING(scratch)[size] = 0;
    Py_SET_SIZE(scratch, size);
}

/* Keep it, unless decoding has left somebody else with it or with a view of it. */
static void return_scratch(struct handle *self, PyObject *scratch)
{
    if (self->scratch == NULL && Py_REFCNT(scratch) == 1 && ((PyByteArrayObject *)scratch)->ob_exports == 0) {
        Py_SET_SIZE(scratch, SHMQ_SMALL); /* PyByteArray_AS_STRING() of an empty one is no place to write to */
        self->scratch = scratch;
    } else {
        Py_DECREF(scratch);
    }
}

/* ---- records as objects */

/* The last one out of a handle that was shut down detaches it, and may have to wait for other processes then. */
static void let_go(struct handle *self)
{
    if (shmq_usable(self->q) == SHMQ_OK) {
        shmq_let_go(self->q);
        return;
    }
    Py_BEGIN_ALLOW_THREADS shmq_let_go(self->q);
    Py_END_ALLOW_THREADS
}

/* Let go of a record in hand after copying it, or give it back. */
void handle_end_hand(struct handle *self, const struct shmq_in *in, bool is_done)
{
    if (in->hand < 0)
        return;
    if (is_done)
        shmq_release(self->q, in->hand);
    else
        shmq_give_back_from(self->q, in->hand, in->pos);
    let_go(self);
}

void handle_tell_shown(struct handle *self, struct memory *memory)
{
    if (Py_REFCNT(memory) == 1)
        return;
    PyObject *none = PyObject_CallMethod((PyObject *)self, "_tell_shown", "I", memory->in.len);
    if (none == NULL)
        PyErr_Clear();
    Py_XDECREF(none);
}

/* Let go of a reservation. */
void handle_end_reservation(struct handle *self, const struct shmq_in *room, bool is_done)
{
    if (is_done)
        shmq_commit(self->q, room);
    else
        shmq_abandon(self->q, room);
    let_go(self);
}

/* The object of a record that is still where it was put, in the ring or on the heap. */
SHMQ_COLD static PyObject *to_object(struct handle *self, struct shmq_in *in)
{
    size_t head = codec_is_bytes(in);
    struct shmq_in body = *in;
    body.payload += head;
    body.len -= (uint32_t)head;
    PyObject *payload = codec_copy(&body); /* without memory for it the record goes back to the front */
    handle_end_hand(self, in, payload != NULL);
    free(in->heap);
    if (payload == NULL || head > 0)
        return payload;
    PyObject *object = codec_decode(self, in->method, in->phase, payload);
    Py_DECREF(payload);
    return object;
}

/* Raise the oldest of the errors that were kept. */
static PyObject *raise_kept(struct handle *self)
{
    if (shmq_usable(self->q) == SHMQ_CLOSED)
        return fail(self, SHMQ_CLOSED, 0, NULL);
    PyObject *error = Py_NewRef(PyList_GET_ITEM(self->kept, 0));
    if (PySequence_DelItem(self->kept, 0) == 0)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
    return NULL;
}

static bool has_kept(const struct handle *self)
{
    return self->kept != NULL && PyList_GET_SIZE(self->kept) > 0 && shmq_usable(self->q) != SHMQ_FORKED;
}

/* Is the exception that is set one that has an item's bytes? */
static bool is_undecodable(void)
{
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    bool has_payload = PyObject_HasAttrString(error, "payload");
    PyErr_Restore(type, error, trace);
    return has_payload;
}

/* Keep the exception that is set for the next call. */
static int keep_error(struct handle *self)
{
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    if (self->kept == NULL)
        self->kept = PyList_New(0);
    int rc = self->kept != NULL ? PyList_Append(self->kept, error) : -1;
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(trace);
    return rc;
}

/* The object of a small payload that was copied to the scratch; bytes are taken from where they are. */
static PyObject *small_to_object(struct handle *self, struct shmq_in *in, PyObject *scratch)
{
    if (codec_is_bytes(in))
        return to_object(self, in);
    set_scratch_size(scratch, in->len);
    return codec_decode(self, in->method, in->phase, scratch);
}

/* Take one object. NULL with *status: a status, or -1 for an exception. */
static PyObject *get_one(struct handle *self, const struct wait *w, uint64_t *deadline, int *status)
{
    PyObject *object = NULL, *scratch = borrow_scratch(self);
    struct shmq_in in;
    *status = -1;
    if (scratch == NULL)
        return NULL;
    uint8_t *start = (uint8_t *)PyByteArray_AS_STRING(scratch);
    if ((*status = take(self, start, &in, w, deadline)) == SHMQ_OK) {
        object = in.payload != start ? to_object(self, &in) : small_to_object(self, &in, scratch);
        if (object == NULL)
            *status = -1;
    }
    return_scratch(self, scratch);
    return object;
}

static PyObject *get(struct handle *self, const struct wait *w)
{
    uint64_t deadline = UNKNOWN;
    int status;
    if (self->q == NULL)
        return fail(self, SHMQ_CLOSED, 0, NULL);
    if (has_kept(self))
        return raise_kept(self);
    PyObject *object = get_one(self, w, &deadline, &status);
    return object != NULL || status < 0 ? object : fail(self, status, 0, w->timeout);
}

static PyObject *handle_get(struct handle *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"block", "timeout"};
    PyObject *v[2];
    struct wait w = WAIT_FOR_EVER;
    if (nargs == 0 && kwnames == NULL)
        return get(self, &w);
    if (parse("get", names, 2, 0, args, nargs, kwnames, v) < 0 || parse_wait(self, v[0], v[1], &w) < 0)
        return NULL;
    return get(self, &w);
}

static PyObject *handle_get_nowait(struct handle *self, PyObject *Py_UNUSED(none))
{
    struct wait w = DONT_WAIT;
    return get(self, &w);
}

static PyObject *handle_next(struct handle *self)
{
    struct wait w = WAIT_FOR_EVER;
    return get(self, &w);
}

/* ---- get_many */

/* The exception that is set, such as Ctrl-C, learns what was taken before it. */
static void describe_received(struct handle *self, PyObject *list)
{
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    PyObject *result = PyObject_CallMethod((PyObject *)self, "_got_so_far", "OO", error, list);
    if (result == NULL)
        PyErr_Clear(); /* one that takes no attributes */
    Py_XDECREF(result);
    PyErr_Restore(type, error, trace);
}

/* Append the objects of a batch in hand. What follows one that can't be decoded goes back to the front; after any other
 * exception all of it does. 0 or -1 */
static int append_batch(struct handle *self, PyObject *list, const struct shmq_in *in, uint32_t n)
{
    Py_ssize_t before = PyList_GET_SIZE(list);
    uint64_t process = shmq_process();
    PyObject *all = n > 1 ? codec_decode_all(self, in, n) : NULL;
    uint32_t i = all != NULL ? n : 0;
    int rc = all != NULL ? PyList_SetSlice(list, before, before, all) : PyErr_Occurred() ? -1 : 0;
    Py_XDECREF(all);
    for (; i < n && rc == 0 && shmq_process() == process; i++) {
        struct shmq_in one = in[i];
        one.hand = -1; /* the batch is let go of as a whole */
        PyObject *scratch = borrow_scratch(self), *object = NULL;
        if (scratch != NULL) {
            if (!codec_is_bytes(&one))
                memcpy(PyByteArray_AS_STRING(scratch), one.payload, one.len);
            object = small_to_object(self, &one, scratch);
            return_scratch(self, scratch);
        }
        rc = object == NULL ? -1 : PyList_Append(list, object);
        Py_XDECREF(object);
    }
    if (shmq_process() != process)
        return rc; /* decoding has forked, and this is the child: the batch is the parent's */
    if (rc < 0 && !is_undecodable()) { /* Ctrl-C, perhaps: as if nothing had happened */
        PyObject *type, *error, *trace;
        PyErr_Fetch(&type, &error, &trace);
        i = PyList_SetSlice(list, before, PyList_GET_SIZE(list), NULL) == 0 ? 0 : i;
        PyErr_Restore(type, error, trace);
    }
    if (i < n)
        shmq_give_back_from(self->q, in[0].hand, in[i].pos);
    else
        shmq_release(self->q, in[0].hand);
    return rc;
}

/* Append a batch of those that are there now, as far as it makes the list no longer than `max`. A status, or -1. */
static int append_ready_batch(struct handle *self, PyObject *list, Py_ssize_t max)
{
    struct shmq_in in[SHMQ_MAX_BATCH];
    Py_ssize_t room = max - PyList_GET_SIZE(list);
    uint32_t n = room < (Py_ssize_t)SHMQ_MAX_BATCH ? (uint32_t)room : SHMQ_MAX_BATCH;
    int rc = shmq_get_batch_try(self->q, in, &n);
    return rc == SHMQ_OK ? append_batch(self, list, in, n) : rc;
}

/* Append up to `max` objects that are there now. A status (EMPTY: no more), or -1 with an exception. */
static int append_ready(struct handle *self, PyObject *list, Py_ssize_t max)
{
    struct wait now = DONT_WAIT;
    uint64_t deadline = UNKNOWN;
    while (PyList_GET_SIZE(list) < max) {
        int rc = append_ready_batch(self, list, max);
        if (rc == SHMQ_EMPTY || rc == SHMQ_BUSY) { /* the next one isn't of the plain kind, or there is none */
            PyObject *object = get_one(self, &now, &deadline, &rc);
            if (object != NULL)
                rc = PyList_Append(list, object);
            Py_XDECREF(object);
        }
        if (rc != SHMQ_OK)
            return rc;
    }
    return SHMQ_OK;
}

/* Wait for the first object, then take what is there. */
static int fill_list(struct handle *self, PyObject *list, Py_ssize_t max, const struct wait *w)
{
    uint64_t deadline = UNKNOWN;
    struct shmq_info info;
    int rc = append_ready_batch(self, list, max > 0 ? max : (Py_ssize_t)SHMQ_MAX_BATCH);
    if (rc == SHMQ_EMPTY || rc == SHMQ_BUSY) {
        PyObject *first = get_one(self, w, &deadline, &rc);
        if (first == NULL)
            return rc;
        rc = PyList_Append(list, first);
        Py_DECREF(first);
    }
    if (rc != SHMQ_OK)
        return rc;
    if (max == 0 && (rc = shmq_info(self->q, &info)) == SHMQ_OK) /* all there now, however fast more come */
        max = PyList_GET_SIZE(list) + (Py_ssize_t)info.qsize;
    return rc == SHMQ_OK ? append_ready(self, list, max) : rc;
}

static PyObject *handle_get_many(struct handle *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"max_items", "block", "timeout"};
    PyObject *v[3];
    struct wait w;
    Py_ssize_t max = 0;
    if (parse("get_many", names, 3, 0, args, nargs, kwnames, v) < 0 || parse_wait(self, v[1], v[2], &w) < 0 ||
        ready(self) < 0)
        return NULL;
    if (v[0] != NULL && v[0] != Py_None && (max = at_least_1(self, names[0], v[0])) < 0)
        return NULL;
    if (has_kept(self))
        return raise_kept(self);
    int rc = shmq_hold(self->q);
    if (rc != SHMQ_OK)
        return fail(self, rc, 0, NULL);
    uint64_t process = shmq_process();
    PyObject *list = PyList_New(0);
    rc = list == NULL ? -1 : fill_list(self, list, max, &w);
    if (shmq_process() == process)
        let_go(self);
    if (list != NULL && PyList_GET_SIZE(list) > 0) {
        if (rc >= 0)
            return list;
        if (is_undecodable()) { /* it comes at the next call */
            if (keep_error(self) == 0)
                return list;
        } else {
            describe_received(self, list);
        }
    }
    Py_XDECREF(list);
    return rc < 0 ? NULL : fail(self, rc, 0, w.timeout);
}

/* ---- lease */

/* Move an item that was handed out too often to the dead-letter queue, still in the bytes that it is. Between the put and
 * the release no Python code runs that could raise. */
static int bury(struct handle *self, struct lease *lease)
{
    const struct shmq_in *in = &lease->in;
    PyObject *payload = codec_copy(in), *letter = NULL, *done = NULL;
    if (payload != NULL)
        letter = PyObject_CallMethod((PyObject *)self, "_letter", "IOI", in->method, payload, in->phase);
    if (letter != NULL)
        done = PyObject_CallMethod(PyTuple_GET_ITEM(letter, 0), "put_nowait", "(O)", PyTuple_GET_ITEM(letter, 1));
    if (done != NULL) {
        lease_end(lease, true);
        Py_SETREF(done, PyObject_CallMethod((PyObject *)self, "_tell_buried", "II", in->len, in->deliveries));
    }
    Py_XDECREF(payload);
    Py_XDECREF(letter);
    Py_XDECREF(done);
    return done != NULL ? 0 : -1;
}

/* The object of a claimed record, over the record itself: bytes are a view of it, large buffers are, all else is decoded
 * from it. */
static PyObject *to_object_in_place(struct handle *self, struct memory *memory)
{
    size_t head = codec_is_bytes(&memory->in);
    PyObject *object = NULL, *payload = PyMemoryView_FromObject((PyObject *)memory);
    if (payload != NULL && head > 0)
        object = PySequence_GetSlice(payload, (Py_ssize_t)head, (Py_ssize_t)memory->in.len);
    else if (payload != NULL)
        object = codec_decode(self, memory->in.method, memory->in.phase, payload);
    Py_XDECREF(payload);
    if (object != NULL || !is_undecodable())
        return object;
    PyErr_Clear(); /* its frames hold on to the memory; so once more, from a copy */
    payload = codec_copy(&memory->in);
    if (payload != NULL)
        object = codec_decode(self, memory->in.method, memory->in.phase, payload);
    Py_XDECREF(payload);
    return object;
}

/* How a lease is wanted. */
struct lease_options {
    Py_ssize_t max_deliveries; /* 0: any number */
    PyTypeObject *memory_type; /* of an item that is to be a view; NULL: a copy is wanted */
};

/* Decode what was claimed, or refuse to: it has been handed out too often. */
static int fill_lease(struct handle *self, struct lease *lease, const struct lease_options *options)
{
    struct shmq_in one = lease->in;
    one.hand = -1; /* stays claimed */
    if (options->max_deliveries != 0 && (Py_ssize_t)one.deliveries > options->max_deliveries)
        return bury(self, lease);
    if (options->memory_type == NULL) {
        lease->item = to_object(self, &one);
    } else {
        lease->memory = memory_new(options->memory_type, self, &lease->in, false);
        lease->is_in_place = lease->memory != NULL;
        if (lease->is_in_place)
            lease->item = to_object_in_place(self, lease->memory);
    }
    return lease->item != NULL ? 0 : -1;
}

/* One lease, or NULL with an exception. */
static struct lease *claim(struct handle *self, struct lease *lease, const struct wait *w,
                           const struct lease_options *options)
{
    uint64_t deadline = UNKNOWN;
    while (lease->item == NULL) {
        int rc = take(self, NULL, &lease->in, w, &deadline);
        if (rc != SHMQ_OK) {
            lease->in.hand = -1;
            if (rc > 0)
                fail(self, rc, 0, w->timeout);
            return NULL;
        }
        lease->process = shmq_process();
        if (fill_lease(self, lease, options) < 0) {
            /* what can't be decoded is off the queue, as with get(): the error has it */
            lease_end(lease, is_undecodable());
            return NULL;
        }
    }
    return lease;
}

static PyObject *handle_lease(struct handle *self, PyTypeObject *defining_class, PyObject *const *args,
                              Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"block", "timeout", "max_deliveries", "copy"};
    struct module_state *state = PyType_GetModuleState(defining_class);
    struct lease_options options = {0, NULL};
    PyObject *v[4];
    struct wait w;
    if (parse("lease", names, 4, 0, args, nargs, kwnames, v) < 0 || parse_wait(self, v[0], v[1], &w) < 0)
        return NULL;
    int is_copy = v[3] != NULL ? PyObject_IsTrue(v[3]) : 1;
    if (is_copy < 0)
        return NULL;
    if (!is_copy)
        options.memory_type = state->memory_type;
    if (v[2] != NULL && v[2] != Py_None) {
        PyObject *can = (options.max_deliveries = at_least_1(self, names[2], v[2])) < 0
                            ? NULL
                            : PyObject_CallMethod((PyObject *)self, "_must_have_dead_name", NULL);
        if (can == NULL)
            return NULL;
        Py_DECREF(can);
    }
    if (self->q == NULL)
        return fail(self, SHMQ_CLOSED, 0, NULL);
    if (has_kept(self))
        return raise_kept(self);
    struct lease *lease = (struct lease *)state->lease_type->tp_alloc(state->lease_type, 0);
    if (lease == NULL)
        return NULL;
    PyObject_GC_UnTrack(lease); /* nobody finds it half made */
    lease->in.hand = -1;
    lease->handle = (struct handle *)Py_NewRef((PyObject *)self);
    PyObject *result = (PyObject *)claim(self, lease, &w, &options);
    if (result == NULL)
        Py_DECREF(lease);
    else
        PyObject_GC_Track(lease);
    return result;
}

/* ---- reserve */

/* _reserve(length, method, block, timeout): the memory of a reservation. */
static PyObject *handle_reserve(struct handle *self, PyTypeObject *defining_class, PyObject *const *args,
                                Py_ssize_t Py_UNUSED(nargs), PyObject *Py_UNUSED(kwnames))
{
    struct module_state *state = PyType_GetModuleState(defining_class);
    unsigned long long len = PyLong_AsUnsignedLongLong(args[0]);
    uint32_t method = (uint32_t)PyLong_AsUnsignedLong(args[1]);
    struct wait w;
    struct shmq_in room;
    int rc;
    if (PyErr_Occurred() || parse_wait(self, args[2], args[3], &w) < 0 || ready(self) < 0)
        return NULL;
    uint64_t deadline = deadline_of(&w);
    do {
        Py_BEGIN_ALLOW_THREADS rc = shmq_hold(self->q);
        if (rc == SHMQ_OK) {
            rc = shmq_reserve(self->q, len, method, &room, deadline);
            if (rc != SHMQ_OK)
                shmq_let_go(self->q);
        }
        Py_END_ALLOW_THREADS if (rc == SHMQ_INTR && PyErr_CheckSignals() < 0) return NULL;
    } while (rc == SHMQ_INTR);
    if (rc != SHMQ_OK)
        return fail(self, rc, (int64_t)(len + SIZE_HEADER), w.timeout);
    struct memory *memory = memory_new(state->memory_type, self, &room, true);
    if (memory == NULL)
        handle_end_reservation(self, &room, false);
    return (PyObject *)memory;
}

/* ---- looking */

/* Ready for a call that can afford to ask whether the segment is still all there. 0, or -1 with an exception. */
static int ready_and_whole(struct handle *self)
{
    if (ready(self) < 0)
        return -1;
    if (shmq_check_file(self->q) == SHMQ_OK)
        return 0;
    fail(self, SHMQ_CORRUPT, NO_ITEM, NULL);
    return -1;
}

/* The same for a look that sees what a death has left, whoever polls. */
static int ready_to_look(struct handle *self)
{
    if (ready_and_whole(self) < 0)
        return -1;
    if (!shmq_is_sweep_due(self->q))
        return 0;
    Py_BEGIN_ALLOW_THREADS shmq_sweep(self->q);
    Py_END_ALLOW_THREADS return ready(self);
}

static PyObject *info_field(struct handle *self, size_t which)
{
    struct shmq_info info;
    if (ready_to_look(self) < 0)
        return NULL;
    int rc = shmq_info(self->q, &info);
    if (rc != SHMQ_OK)
        return fail(self, rc, NO_ITEM, NULL);
    uint64_t used = info.put_pos - info.free_pos;
    switch (which) {
    case 0:
        return PyLong_FromUnsignedLongLong(info.qsize);
    case 1:
        return PyBool_FromLong(info.qsize == 0);
    case 2:
        return PyBool_FromLong(used == shmq_capacity(self->q));
    case 3:
        return PyLong_FromUnsignedLongLong(used);
    default:
        return Py_BuildValue("(KKKK)", (unsigned long long)info.put_pos, (unsigned long long)info.get_pos,
                             (unsigned long long)info.free_pos, (unsigned long long)info.qsize);
    }
}

static PyObject *handle_qsize(struct handle *self, PyObject *Py_UNUSED(none)) { return info_field(self, 0); }
static PyObject *handle_empty(struct handle *self, PyObject *Py_UNUSED(none)) { return info_field(self, 1); }
static PyObject *handle_full(struct handle *self, PyObject *Py_UNUSED(none)) { return info_field(self, 2); }
static PyObject *handle_occupancy(struct handle *self, PyObject *Py_UNUSED(none)) { return info_field(self, 3); }
static PyObject *handle_info(struct handle *self, PyObject *Py_UNUSED(none)) { return info_field(self, 4); }

static PyObject *handle_max_buffer_size(struct handle *self, PyObject *Py_UNUSED(none))
{
    return ready(self) < 0 ? NULL : PyLong_FromUnsignedLongLong(shmq_capacity(self->q));
}

static PyObject *handle_clear(struct handle *self, PyObject *Py_UNUSED(none))
{
    uint64_t deadline = shmq_now_ns() + LOOK_NS;
    int rc;
    if (ready_and_whole(self) < 0)
        return NULL;
    do {
        Py_BEGIN_ALLOW_THREADS rc = shmq_clear(self->q, deadline);
        Py_END_ALLOW_THREADS if (rc == SHMQ_INTR && PyErr_CheckSignals() < 0) return NULL;
    } while (rc == SHMQ_INTR);
    if (rc != SHMQ_OK)
        return fail(self, rc, NO_ITEM, NULL);
    Py_CLEAR(self->kept);
    Py_RETURN_NONE;
}

static PyObject *handle_refs(struct handle *self, PyObject *Py_UNUSED(none))
{
    return ready_and_whole(self) < 0 ? NULL : PyLong_FromUnsignedLong(shmq_refs(self->q));
}

static PyObject *handle_ref_add(struct handle *self, PyObject *Py_UNUSED(none))
{
    if (ready_and_whole(self) < 0)
        return NULL;
    shmq_ref_add(self->q);
    Py_RETURN_NONE;
}

static PyObject *handle_ref_drop(struct handle *self, PyObject *Py_UNUSED(none))
{
    return ready_and_whole(self) < 0 ? NULL : PyBool_FromLong(shmq_ref_drop(self->q));
}

static PyObject *handle_uuid(struct handle *self, PyObject *Py_UNUSED(none))
{
    return ready_and_whole(self) < 0 ? NULL : PyBytes_FromStringAndSize((const char *)shmq_uuid(self->q), 16);
}

static PyObject *handle_lock_pid(struct handle *self, PyObject *side)
{
    long which = PyLong_AsLong(side);
    if (PyErr_Occurred() || ready_and_whole(self) < 0)
        return NULL;
    return PyLong_FromUnsignedLong(shmq_lock_pid(self->q, which != 0));
}

struct report {
    char text[8192];
    size_t used;
};

/* Collects lines in C memory: a lock is held, so no Python object may be made here. */
static void collect(void *arg, const char *line)
{
    struct report *r = arg;
    size_t n = strlen(line);
    if (r->used + n + 1 < sizeof r->text) {
        memcpy(r->text + r->used, line, n);
        r->text[r->used + n] = '\n';
        r->used += n + 1;
    }
}

static PyObject *handle_check(struct handle *self, PyObject *Py_UNUSED(none))
{
    struct report r = {.used = 0};
    uint64_t deadline = shmq_now_ns() + LOOK_NS;
    int rc;
    if (ready_and_whole(self) < 0)
        return NULL;
    do {
        r.used = 0;
        Py_BEGIN_ALLOW_THREADS rc = shmq_check(self->q, collect, &r, deadline);
        Py_END_ALLOW_THREADS if (rc == SHMQ_INTR && PyErr_CheckSignals() < 0) return NULL;
    } while (rc == SHMQ_INTR);
    if (rc != SHMQ_OK)
        return fail(self, rc, NO_ITEM, NULL);
    return PyUnicode_DecodeUTF8(r.text, (Py_ssize_t)r.used, "replace");
}

/* ---- life */

/* _attach(path: bytes, capacity: int, mode: int, codec: tuple) -> (status, was_created, fault) */
static PyObject *handle_attach(struct handle *self, PyObject *args)
{
    const char *path;
    unsigned long long capacity;
    unsigned int mode;
    PyObject *pack, *pack_options, *unpack;
    struct shmq_fault fault = {0};
    int rc;
    if (!PyArg_ParseTuple(args, "yKI(OOO)", &path, &capacity, &mode, &pack, &pack_options, &unpack))
        return NULL;
    if (self->q != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "already attached");
        return NULL;
    }
    uint64_t deadline = shmq_now_ns() + ATTACH_NS;
    do {
        Py_BEGIN_ALLOW_THREADS rc = shmq_open(&self->q, path, capacity, mode, deadline, &fault);
        Py_END_ALLOW_THREADS if (rc == SHMQ_INTR && PyErr_CheckSignals() < 0) return NULL;
    } while (rc == SHMQ_INTR);
    self->pack = codec_callable(pack);
    self->pack_options = Py_NewRef(pack_options);
    self->unpack = codec_callable(unpack);
    return Py_BuildValue("(iO(sKKi))", rc, self->q != NULL && shmq_was_created(self->q) ? Py_True : Py_False,
                         fault.what, (unsigned long long)fault.found, (unsigned long long)fault.allowed, fault.error);
}

static PyObject *handle_fault(struct handle *self, PyObject *Py_UNUSED(none))
{
    struct shmq_fault fault = {0};
    if (self->q != NULL)
        fault = *shmq_fault(self->q);
    return Py_BuildValue("(sKKi)", fault.what, (unsigned long long)fault.found, (unsigned long long)fault.allowed,
                         fault.error);
}

/* _close(now: bool) -> status */
static PyObject *handle_close(struct handle *self, PyObject *now)
{
    int rc = SHMQ_OK, is_now = PyObject_IsTrue(now);
    if (is_now < 0)
        return NULL;
    if (self->q != NULL && shmq_close_begin(self->q)) { /* with the GIL held, so that no `_try` call is inside */
        Py_BEGIN_ALLOW_THREADS rc = shmq_close_end(self->q, is_now);
        Py_END_ALLOW_THREADS
    }
    return PyLong_FromLong(rc);
}

static PyObject *handle_is_open(struct handle *self, PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(self->q != NULL && shmq_usable(self->q) != SHMQ_CLOSED);
}

static PyObject *handle_prefault(struct handle *self, PyObject *Py_UNUSED(none))
{
    int rc;
    if (ready(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS rc = shmq_prefault(self->q);
    Py_END_ALLOW_THREADS if (rc != SHMQ_OK) return fail(self, rc, NO_ITEM, NULL);
    Py_RETURN_NONE;
}

static PyObject *handle_keep_items(struct handle *self, PyObject *Py_UNUSED(none))
{
    if (self->q != NULL)
        shmq_keep_items(self->q);
    Py_RETURN_NONE;
}

/* ---- fork hooks: C functions, so that no signal handler can raise in the middle of them */

/* The handles that this thread prepared for its fork: the later steps are for these, whoever is shut down meanwhile. */
static _Thread_local PyObject *forking;

static void for_each_forking(void (*step)(struct handle *self))
{
    for (Py_ssize_t i = 0; forking != NULL && i < PyList_GET_SIZE(forking); i++) {
        struct handle *handle = (struct handle *)PyList_GET_ITEM(forking, i);
        if ((PyObject *)handle != Py_None && handle->q != NULL)
            step(handle);
    }
}

static void before(struct handle *self) { shmq_fork_before(self->q); }
static void in_parent(struct handle *self) { shmq_fork_parent(self->q); }
static void in_child(struct handle *self)
{
    Py_CLEAR(self->kept); /* the parent's to raise */
    if (self->n_memories > 0)
        shmq_fork_move(self->q); /* the parent's views are here too, and show nothing now */
    self->n_memories = 0;
    shmq_fork_child(self->q); /* where it fails, the first call attaches */
}

/* The handles come in a dict of weak references. */
PyObject *handles_before_fork(PyObject *Py_UNUSED(module), PyObject *handles)
{
    PyObject *references = PyDict_Values(handles);
    for (Py_ssize_t i = 0; references != NULL && i < PyList_GET_SIZE(references); i++) {
        PyObject *handle = PyObject_CallNoArgs(PyList_GET_ITEM(references, i));
        if (handle == NULL || PyList_SetItem(references, i, handle) < 0)
            Py_CLEAR(references);
    }
    Py_XSETREF(forking, references);
    if (forking == NULL)
        return NULL;
    for_each_forking(before);
    Py_RETURN_NONE;
}

PyObject *handles_after_fork_in_parent(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    for_each_forking(in_parent);
    Py_CLEAR(forking);
    Py_RETURN_NONE;
}

PyObject *handles_after_fork_in_child(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    for_each_forking(in_child);
    Py_CLEAR(forking);
    Py_RETURN_NONE;
}

static int handle_traverse(struct handle *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->pack.object);
    Py_VISIT(self->unpack.object);
    Py_VISIT(self->kept);
    return 0;
}

static int handle_drop(struct handle *self)
{
    Py_CLEAR(self->pack.object);
    Py_CLEAR(self->pack_options);
    Py_CLEAR(self->unpack.object);
    Py_CLEAR(self->kept);
    Py_CLEAR(self->scratch);
    return 0;
}

static void handle_dealloc(struct handle *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->q != NULL)
        shmq_free(self->q);
    handle_drop(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- the type */

#define FAST (PyCFunction)(void (*)(void))
#define KEYWORDS METH_FASTCALL | METH_KEYWORDS

static PyMethodDef methods[] = {
    {"put", FAST handle_put, KEYWORDS, put_doc},
    {"put_nowait", FAST handle_put_nowait, KEYWORDS, put_nowait_doc},
    {"put_many", FAST handle_put_many, KEYWORDS, put_many_doc},
    {"get", FAST handle_get, KEYWORDS, get_doc},
    {"get_nowait", (PyCFunction)handle_get_nowait, METH_NOARGS, get_nowait_doc},
    {"get_many", FAST handle_get_many, KEYWORDS, get_many_doc},
    {"lease", (PyCFunction)(void (*)(void))handle_lease, METH_METHOD | KEYWORDS, lease_method_doc},
    {"_reserve", (PyCFunction)(void (*)(void))handle_reserve, METH_METHOD | KEYWORDS, NULL},
    {"qsize", (PyCFunction)handle_qsize, METH_NOARGS, qsize_doc},
    {"empty", (PyCFunction)handle_empty, METH_NOARGS, empty_doc},
    {"full", (PyCFunction)handle_full, METH_NOARGS, full_doc},
    {"buffer_occupancy", (PyCFunction)handle_occupancy, METH_NOARGS, occupancy_doc},
    {"max_buffer_size", (PyCFunction)handle_max_buffer_size, METH_NOARGS, max_buffer_size_doc},
    {"clear", (PyCFunction)handle_clear, METH_NOARGS, clear_doc},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, NULL},
    {"_info", (PyCFunction)handle_info, METH_NOARGS, NULL},
    {"_refs", (PyCFunction)handle_refs, METH_NOARGS, NULL},
    {"_ref_add", (PyCFunction)handle_ref_add, METH_NOARGS, NULL},
    {"_ref_drop", (PyCFunction)handle_ref_drop, METH_NOARGS, NULL},
    {"_uuid", (PyCFunction)handle_uuid, METH_NOARGS, NULL},
    {"_lock_pid", (PyCFunction)handle_lock_pid, METH_O, NULL},
    {"_check", (PyCFunction)handle_check, METH_NOARGS, NULL},
    {"_attach", (PyCFunction)handle_attach, METH_VARARGS, NULL},
    {"_fault", (PyCFunction)handle_fault, METH_NOARGS, NULL},
    {"_close", (PyCFunction)handle_close, METH_O, NULL},
    {"_is_open", (PyCFunction)handle_is_open, METH_NOARGS, NULL},
    {"_prefault", (PyCFunction)handle_prefault, METH_NOARGS, NULL},
    {"_keep_items", (PyCFunction)handle_keep_items, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "One attachment to a queue's segment; shmqueue.ShmQueue inherits from it."},
    {Py_tp_methods, methods},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, handle_next},
    {Py_tp_traverse, handle_traverse},
    {Py_tp_clear, handle_drop},
    {Py_tp_dealloc, handle_dealloc},
    {0, NULL},
};

PyType_Spec handle_spec = {
    "shmqueue._core.Handle",
    sizeof(struct handle),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    slots,
};
