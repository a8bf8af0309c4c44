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

/* ---- encode */

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
    e->parts = NULL;
    e->views = NULL;
    e->n_views = 0;
    e->owner = NULL;
    if (method == NULL || (PyLong_CheckExact(method) && PyLong_AsLong(method) == METHOD_MSGPACK)) {
        if (PyBytes_CheckExact(data) && PyBytes_GET_SIZE(data) <= UINT32_MAX)
            return encode_bytes(data, e);
        if (PyByteArray_CheckExact(data) || PyMemoryView_Check(data)) /* the packer would copy them */
            return encode_slowly(self, data, method, e);
        PyObject *args[] = {data, Py_None, self->pack_options};
        e->owner = call(&self->pack, args, 3);
        if (e->owner != NULL) {
            e->inline_parts[0] = (struct shmq_part){PyBytes_AS_STRING(e->owner), (size_t)PyBytes_GET_SIZE(e->owner)};
            e->out = shmq_out(e->inline_parts, 1, METHOD_MSGPACK, false);
            return 0;
        }
        if (!is_refusal())
            return -1;
        PyErr_Clear();
    } else if (PyErr_Occurred()) {
        PyErr_Clear(); /* an int beyond a C long: `_encode` says what is wrong with it */
    }
    return encode_slowly(self, data, method, e);
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
