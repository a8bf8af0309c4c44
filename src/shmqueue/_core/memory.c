/* memory.c - the type `shmqueue._core.Memory`: the bytes of a record in hand, in the ring itself.
 * A reservation's can be written to, a claim's only be read. It ends once; while somebody still has a view of it, the
 * record stays in hand, so that a view never shows what isn't its own. */
#include "binding.h"

static void let_go(struct memory *memory)
{
    struct shmq_in in = memory->in;
    memory->in.hand = -1;
    if (in.hand < 0 || shmq_process() != memory->process)
        return;
    if (memory->is_reserved)
        handle_end_reservation(memory->handle, &in, memory->is_done);
    else
        handle_end_hand(memory->handle, &in, memory->is_done);
}

void memory_end(struct memory *memory, bool is_done)
{
    if (memory->is_over)
        return;
    memory->is_over = true;
    memory->is_done = is_done;
    if (memory->exports == 0)
        let_go(memory);
}

struct memory *memory_new(PyTypeObject *type, struct handle *handle, const struct shmq_in *in, bool is_reserved)
{
    struct memory *memory = (struct memory *)type->tp_alloc(type, 0);
    if (memory == NULL)
        return NULL;
    memory->handle = (struct handle *)Py_NewRef((PyObject *)handle);
    memory->in = *in;
    memory->process = shmq_process();
    memory->is_reserved = is_reserved;
    return memory;
}

static int get_buffer(struct memory *memory, Py_buffer *view, int flags)
{
    if (memory->is_over || shmq_process() != memory->process) {
        PyErr_SetString(PyExc_BufferError, "it is over, or another process's");
        return -1;
    }
    if (PyBuffer_FillInfo(view, (PyObject *)memory, (void *)memory->in.payload, (Py_ssize_t)memory->in.len,
                          !memory->is_reserved, flags) < 0)
        return -1;
    memory->exports++;
    return 0;
}

static void release_buffer(struct memory *memory, Py_buffer *Py_UNUSED(view))
{
    if (--memory->exports == 0 && memory->is_over)
        let_go(memory);
}

static PyObject *memory_method_end(struct memory *memory, PyObject *is_done)
{
    int done = PyObject_IsTrue(is_done);
    if (done < 0)
        return NULL;
    memory_end(memory, done);
    Py_RETURN_NONE;
}

static PyObject *memory_exports(struct memory *memory, void *Py_UNUSED(closure))
{
    return PyLong_FromSsize_t(memory->exports);
}

static PyObject *memory_phase(struct memory *memory, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(memory->in.phase);
}

static PyObject *memory_is_ours(struct memory *memory, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(shmq_process() == memory->process);
}

static void memory_dealloc(struct memory *memory)
{
    PyTypeObject *type = Py_TYPE(memory);
    memory_end(memory, false);
    Py_XDECREF(memory->handle);
    type->tp_free(memory);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"end", (PyCFunction)memory_method_end, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"exports", (getter)memory_exports, NULL, "Views of it that there are.", NULL},
    {"phase", (getter)memory_phase, NULL, "Address of its first byte in the ring, modulo 64.", NULL},
    {"is_ours", (getter)memory_is_ours, NULL, "Whether this process has it in hand.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The bytes of a record in hand, in the ring itself."},
    {Py_tp_methods, methods},
    {Py_tp_getset, attributes},
    {Py_bf_getbuffer, get_buffer},
    {Py_bf_releasebuffer, release_buffer},
    {Py_tp_dealloc, memory_dealloc},
    {0, NULL},
};

PyType_Spec memory_spec = {
    "shmqueue._core.Memory",
    sizeof(struct memory),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    slots,
};
