/* memory.c - the type `shmqueue._core.Memory`: the bytes of a record in hand, in the ring itself.
 * A reservation's can be written to, a claim's only be read. Whatever shows the bytes refers to it, and the record is in
 * hand as long as it lives, so that nobody ever sees, or overwrites, what is somebody else's. */
#include "binding.h"

void memory_end(struct memory *memory, bool is_done)
{
    memory->is_over = true;
    memory->is_done = is_done;
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
    handle->n_memories++;
    return memory;
}

static int get_buffer(struct memory *memory, Py_buffer *view, int flags)
{
    if (!memory->is_over && shmq_process() == memory->process)
        return PyBuffer_FillInfo(view, (PyObject *)memory, (void *)memory->in.payload, (Py_ssize_t)memory->in.len,
                                 !memory->is_reserved, flags);
    PyErr_SetString(PyExc_BufferError, "it is over, or another process's");
    return -1;
}

static PyObject *memory_phase(struct memory *memory, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(memory->in.phase);
}

static PyObject *memory_is_ours(struct memory *memory, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(shmq_process() == memory->process);
}

static int memory_traverse(struct memory *memory, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(memory));
    Py_VISIT(memory->handle);
    return 0;
}

static void memory_dealloc(struct memory *memory)
{
    PyTypeObject *type = Py_TYPE(memory);
    PyObject_GC_UnTrack(memory);
    if (shmq_process() == memory->process) {
        memory->handle->n_memories--;
        if (memory->is_reserved)
            handle_end_reservation(memory->handle, &memory->in, memory->is_done);
        else
            handle_end_hand(memory->handle, &memory->in, memory->is_done);
    }
    Py_DECREF(memory->handle);
    type->tp_free(memory);
    Py_DECREF(type);
}

static PyGetSetDef attributes[] = {
    {"phase", (getter)memory_phase, NULL, "Address of its first byte in the ring, modulo 64.", NULL},
    {"is_ours", (getter)memory_is_ours, NULL, "Whether this process has it in hand.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The bytes of a record in hand, in the ring itself."},
    {Py_tp_getset, attributes},
    {Py_bf_getbuffer, get_buffer},
    {Py_tp_traverse, memory_traverse},
    {Py_tp_dealloc, memory_dealloc},
    {0, NULL},
};

PyType_Spec memory_spec = {
    "shmqueue._core.Memory",
    sizeof(struct memory),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    slots,
};
