/* codec.c - objects to records and back: the fast way for what the fast packer takes and for bytes, by `_encode` and
 * `_decode` of serialization.py for everything else. */
#include "binding.h"

#define METHOD_MSGPACK 0
#define METHOD_OUT_OF_BAND 2
#define BIG_COPY (64 * 1024) /* bytes; from here on the GIL is worth releasing */

/* ---- calls */

struct callable codec_callable(PyObject *object)
{
    struct callable c = {Py_NewRef(object), NULL};
    if (PyCFunction_CheckExact(object) && PyCFunction_GetFlags(object) == (METH_FASTCALL | METH_KEYWORDS)) {
        PyCFunction function = PyCFunction_GetFunction(object);
        memcpy(&c.function, &function, sizeof function);
    }
    return c;
}

static PyObject *call(const struct callable *c, PyObject *const *args, Py_ssize_t nargs)
{
    if (c->function != NULL)
        return c->function(PyCFunction_GET_SELF(c->object), args, nargs, NULL);
    return PyObject_Vectorcall(c->object, args, (size_t)nargs, NULL);
}

/* Is the exception that is set what packers and unpackers raise for what they can't do? Anything else may be a signal
 * handler's, and passes. */
static bool is_refusal(void)
{
    return PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_ValueError) ||
           PyErr_ExceptionMatches(PyExc_OverflowError) || PyErr_ExceptionMatches(PyExc_RecursionError) ||
           PyErr_ExceptionMatches(PyExc_BufferError);
}

/* ---- msgpack's bin format, so that bytes are copied once */

static size_t bin_head(uint8_t *head, size_t len)
{
    int n = len < 256 ? 1 : len < 65536 ? 2 : 4;
    head[0] = (uint8_t)(n == 1 ? 0xc4 : n == 2 ? 0xc5 : 0xc6);
    for (int i = 0; i < n; i++)
        head[1 + i] = (uint8_t)(len >> 8 * (n - 1 - i));
    return (size_t)n + 1;
}

size_t codec_is_bytes(const struct shmq_in *in)
{
    uint8_t first = in->len > 1 ? in->payload[0] : 0, head[8];
    size_t n = first == 0xc4 ? 2 : first == 0xc5 ? 3 : first == 0xc6 ? 5 : 0;
    if (in->method != METHOD_MSGPACK || n == 0 || in->len < n)
        return 0;
    return bin_head(head, in->len - n) == n && memcmp(head, in->payload, n) == 0 ? n : 0;
}

/* ---- msgpack's lengths, to tell objects apart that were packed by one call */

/* What follows the first byte, from 0xc0 on: bytes of a big-endian number, bytes beside that, and whether the number
 * counts bytes (0), objects (1) or pairs of them (2). */
static const struct {
    uint8_t number, fixed, objects;
} formats[32] = {
    [0x04] = {1, 0, 0}, {2, 0, 0}, {4, 0, 0},                       /* bin */
    [0x07] = {1, 1, 0}, {2, 1, 0}, {4, 1, 0},                       /* ext */
    [0x0a] = {0, 4, 0}, {0, 8, 0},                                  /* float */
    [0x0c] = {0, 1, 0}, {0, 2, 0}, {0, 4, 0}, {0, 8, 0},            /* uint */
    [0x10] = {0, 1, 0}, {0, 2, 0}, {0, 4, 0}, {0, 8, 0},            /* int */
    [0x14] = {0, 2, 0}, {0, 3, 0}, {0, 5, 0}, {0, 9, 0}, {0, 17, 0}, /* fixext */
    [0x19] = {1, 0, 0}, {2, 0, 0}, {4, 0, 0},                       /* str */
    [0x1c] = {2, 0, 1}, {4, 0, 1},                                  /* array */
    [0x1e] = {2, 0, 2}, {4, 0, 2},                                  /* map */
};

/* Bytes of the object that begins at `start`; 0: it has no end before `end`. */
static size_t object_size(const uint8_t *start, const uint8_t *end)
{
    const uint8_t *at = start;
    for (uint64_t objects = 1; objects > 0; objects--) {
        if (at >= end)
            return 0;
        uint8_t first = *at++;
        uint64_t skip = 0;
        if ((first & 0xf0) == 0x80) {
            objects += 2 * (first & 0xfu);
        } else if ((first & 0xf0) == 0x90) {
            objects += first & 0xfu;
        } else if ((first & 0xe0) == 0xa0) {
            skip = first & 0x1fu;
        } else if ((first & 0xe0) == 0xc0) {
            uint64_t number = 0;
            if (end - at < formats[first & 0x1f].number)
                return 0;
            for (int i = 0; i < formats[first & 0x1f].number; i++)
                number = number << 8 | *at++;
            objects += number * formats[first & 0x1f].objects;
            skip = formats[first & 0x1f].fixed + (formats[first & 0x1f].objects ? 0 : number);
        }
        if ((uint64_t)(end - at) < skip)
            return 0;
        at += skip;
    }
    return (size_t)(at - start);
}

/* ---- encode */

static bool is_msgpack(PyObject *method)
{
    bool is_it = method == NULL || (PyLong_CheckExact(method) && PyLong_AsLong(method) == METHOD_MSGPACK);
    PyErr_Clear(); /* an int beyond a C long: `_encode` says what is wrong with it */
    return is_it;
}

static PyObject *pack(struct handle *self, PyObject *data)
{
    PyObject *args[] = {data, Py_None, self->pack_options};
    return call(&self->pack, args, 3);
}

static void begin(struct encoded *e)
{
    e->parts = NULL;
    e->views = NULL;
    e->n_views = 0;
    e->owner = NULL;
}

/* The record is these bytes of `packed`, to which it takes over a reference. */
static void encode_packed(struct encoded *e, PyObject *packed, const void *at, size_t len)
{
    e->owner = packed;
    e->inline_parts[0] = (struct shmq_part){at, len};
    e->out = shmq_out(e->inline_parts, 1, METHOD_MSGPACK, false);
}

static int encode_by_python(struct handle *self, PyObject *data, PyObject *method, struct encoded *e)
{
    PyObject *result = method != NULL ? PyObject_CallMethod((PyObject *)self, "_encode", "OO", data, method)
                                      : PyObject_CallMethod((PyObject *)self, "_encode", "Oi", data, METHOD_MSGPACK);
    PyObject *parts;
    unsigned int id;
    int is_aligned;
    if (result == NULL)
        return -1;
    e->owner = result;
    if (!PyArg_ParseTuple(result, "IpO!", &id, &is_aligned, &PyTuple_Type, &parts))
        return -1;
    Py_ssize_t n = PyTuple_GET_SIZE(parts);
    e->parts = PyMem_Calloc((size_t)n + 1, sizeof *e->parts);
    e->views = PyMem_Calloc((size_t)n + 1, sizeof *e->views);
    if (e->parts == NULL || e->views == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (; e->n_views < n; e->n_views++) {
        Py_buffer *view = &e->views[e->n_views];
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(parts, e->n_views), view, PyBUF_SIMPLE) < 0)
            return -1;
        e->parts[e->n_views] = (struct shmq_part){view->buf, (size_t)view->len};
    }
    e->out = shmq_out(e->parts, (uint32_t)n, id, is_aligned != 0);
    return 0;
}

SHMQ_COLD static int encode_slowly(struct handle *self, PyObject *data, PyObject *method, struct encoded *e)
{
    if (encode_by_python(self, data, method, e) == 0)
        return 0;
    codec_release(e);
    return -1;
}

static int encode_bytes(PyObject *data, struct encoded *e)
{
    size_t len = (size_t)PyBytes_GET_SIZE(data);
    e->owner = Py_NewRef(data);
    e->inline_parts[0] = (struct shmq_part){e->head, bin_head(e->head, len)};
    e->inline_parts[1] = (struct shmq_part){PyBytes_AS_STRING(data), len};
    e->out = shmq_out(e->inline_parts, 2, METHOD_MSGPACK, false);
    return 0;
}

int codec_encode(struct handle *self, PyObject *data, PyObject *method, struct encoded *e)
{
    begin(e);
    if (is_msgpack(method)) {
        if (PyBytes_CheckExact(data) && PyBytes_GET_SIZE(data) <= UINT32_MAX)
            return encode_bytes(data, e);
        if (PyByteArray_CheckExact(data) || PyMemoryView_Check(data)) /* the packer would copy them */
            return encode_slowly(self, data, method, e);
        PyObject *packed = pack(self, data);
        if (packed != NULL) {
            encode_packed(e, packed, PyBytes_AS_STRING(packed), (size_t)PyBytes_GET_SIZE(packed));
            return 0;
        }
        if (!is_refusal())
            return -1;
        PyErr_Clear();
    }
    return encode_slowly(self, data, method, e);
}

/* Pack a list of the objects, and cut that into them. */
int codec_encode_all(struct handle *self, PyObject *const *data, uint32_t n, PyObject *method, struct encoded *e)
{
    bool are_plain = is_msgpack(method);
    for (uint32_t i = 0; i < n; i++) /* the packer would copy bytes */
        are_plain = are_plain && !PyBytes_CheckExact(data[i]) && !PyByteArray_CheckExact(data[i]) &&
                    !PyMemoryView_Check(data[i]);
    PyObject *list = are_plain ? PyList_New(n) : NULL;
    if (list == NULL)
        return are_plain ? -1 : 1;
    for (uint32_t i = 0; i < n; i++)
        PyList_SET_ITEM(list, i, Py_NewRef(data[i]));
    PyObject *packed = pack(self, list);
    Py_DECREF(list);
    if (packed == NULL && !is_refusal())
        return -1;
    PyErr_Clear();
    if (packed == NULL)
        return 1;
    const uint8_t *at = (const uint8_t *)PyBytes_AS_STRING(packed), *end = at + PyBytes_GET_SIZE(packed);
    at += n < 16 ? 1 : 3; /* the list's own head, of 16 bits: a batch is no larger */
    uint32_t done = 0;
    for (size_t len; done < n && (len = object_size(at, end)) > 0; at += len) {
        begin(&e[done]);
        encode_packed(&e[done++], Py_NewRef(packed), at, len);
    }
    Py_DECREF(packed);
    if (done == n && at == end)
        return 0;
    while (done > 0)
        codec_release(&e[--done]);
    return 1;
}

void codec_release(struct encoded *e)
{
    while (e->n_views > 0)
        PyBuffer_Release(&e->views[--e->n_views]);
    PyMem_Free(e->views);
    PyMem_Free(e->parts);
    Py_CLEAR(e->owner);
    e->views = NULL;
    e->parts = NULL;
}

/* ---- decode */

static void copy(void *to, const void *from, size_t n)
{
    if (n < BIG_COPY) {
        memcpy(to, from, n);
        return;
    }
    Py_BEGIN_ALLOW_THREADS memcpy(to, from, n);
    Py_END_ALLOW_THREADS
}

/* A memoryview of len writable bytes whose address has the same phase as in the ring, so that aligned buffers stay
 * aligned. */
static PyObject *copy_aligned(const struct shmq_in *in)
{
    PyObject *block = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)in->len + SHMQ_ALIGN);
    if (block == NULL)
        return NULL;
    char *start = PyByteArray_AS_STRING(block);
    Py_ssize_t shift = (Py_ssize_t)((in->phase - (uintptr_t)start) % SHMQ_ALIGN);
    copy(start + shift, in->payload, in->len);
    PyObject *whole = PyMemoryView_FromObject(block);
    Py_DECREF(block);
    if (whole == NULL)
        return NULL;
    PyObject *part = PySequence_GetSlice(whole, shift, shift + (Py_ssize_t)in->len);
    Py_DECREF(whole);
    return part;
}

PyObject *codec_copy(const struct shmq_in *in)
{
    if (in->method == METHOD_OUT_OF_BAND)
        return copy_aligned(in);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)in->len);
    if (bytes != NULL)
        copy(PyBytes_AS_STRING(bytes), in->payload, in->len);
    return bytes;
}

PyObject *codec_decode(struct handle *self, uint32_t method, uint32_t phase, PyObject *payload)
{
    if (method == METHOD_MSGPACK) {
        PyObject *object = call(&self->unpack, &payload, 1);
        if (object != NULL)
            return object;
        if (!is_refusal())
            return NULL;
        PyErr_Clear();
    }
    return PyObject_CallMethod((PyObject *)self, "_decode", "IOI", (unsigned int)method, payload, (unsigned int)phase);
}

/* Unpack a list of the objects that the payloads are. */
PyObject *codec_decode_all(struct handle *self, const struct shmq_in *in, uint32_t n)
{
    size_t len = 3;
    for (uint32_t i = 0; i < n; i++) {
        len += in[i].len;
        if (in[i].method != METHOD_MSGPACK)
            return NULL;
    }
    PyObject *packed = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)len), *list = NULL;
    if (packed == NULL)
        return NULL;
    uint8_t *at = (uint8_t *)PyBytes_AS_STRING(packed);
    memcpy(at, (uint8_t[]){0xdc, (uint8_t)(n >> 8), (uint8_t)n}, 3);
    bool are_whole = true; /* each by itself, else a wrong one could be read into the next */
    at += 3;
    for (uint32_t i = 0; i < n; at += in[i++].len) {
        memcpy(at, in[i].payload, in[i].len);
        are_whole = are_whole && object_size(at, at + in[i].len) == in[i].len;
    }
    if (are_whole && (list = call(&self->unpack, &packed, 1)) == NULL && is_refusal())
        PyErr_Clear();
    Py_DECREF(packed);
    if (list != NULL && (!PyList_CheckExact(list) || PyList_GET_SIZE(list) != (Py_ssize_t)n))
        Py_CLEAR(list);
    return list;
}
