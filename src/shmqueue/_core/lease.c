/* lease.c - the type `shmqueue._core.Lease`: an item that was claimed and not taken.
 * Made by Handle.lease() (handle.c). It ends once: at the end of a with block, by hand, or, given back, when nobody knows
 * it any more. Ending is one store, so it needs nobody's lock. */
#include "binding.h"
#include "docs.h"

/* At the user's word, views of the item end too. */
static void end(struct lease *lease, bool is_done, bool is_wanted)
{
    struct shmq_in in = lease->in;
    struct memory *memory = lease->memory;
    PyObject *item = NULL;
    if (memory != NULL && is_wanted && shmq_process() == lease->process && (item = PyList_New(1)) == NULL)
        PyErr_Clear();
    lease->in.hand = -1; /* first: it ends once, whoever comes in between */
    lease->memory = NULL;
    if (item != NULL) {
        PyList_SET_ITEM(item, 0, lease->item != NULL ? lease->item : Py_NewRef(Py_None));
        lease->item = NULL;
        views_let_go((PyObject *)memory, item, (PyObject *)PyEval_GetFrame());
        Py_DECREF(item);
        handle_tell_shown(lease->handle, memory);
    }
    if (memory != NULL) {
        memory_end(memory, is_done);
        Py_DECREF(memory);
    } else if (in.hand >= 0 && !lease->is_in_place && shmq_process() == lease->process) {
        handle_end_hand(lease->handle, &in, is_done);
    }
}

void lease_end(struct lease *lease, bool is_done) { end(lease, is_done, false); }

/* Raise unless the item is still claimed, and by this process. 0, or -1 with an exception. */
static int must_hold(struct lease *lease)
{
    if (lease->in.hand >= 0 && shmq_process() == lease->process)
        return 0;
    PyObject *none = PyObject_CallMethod((PyObject *)lease->handle, "_lease_is_over", "i", lease->in.hand < 0);
    Py_XDECREF(none);
    return -1;
}

/* By hand: once. */
static PyObject *end_now(struct lease *lease, bool is_done)
{
    if (must_hold(lease) < 0)
        return NULL;
    end(lease, is_done, true);
    Py_RETURN_NONE;
}

static PyObject *lease_release(struct lease *lease, PyObject *Py_UNUSED(none)) { return end_now(lease, true); }
static PyObject *lease_give_back(struct lease *lease, PyObject *Py_UNUSED(none)) { return end_now(lease, false); }

static PyObject *lease_enter(struct lease *lease, PyObject *Py_UNUSED(none))
{
    return must_hold(lease) < 0 ? NULL : Py_NewRef(lease->item);
}

static PyObject *lease_exit(struct lease *lease, PyObject *const *args, Py_ssize_t nargs)
{
    end(lease, nargs > 0 && args[0] == Py_None, true);
    Py_RETURN_NONE;
}

static PyObject *lease_item(struct lease *lease, void *Py_UNUSED(closure))
{
    if (lease->item == NULL && lease->is_in_place && must_hold(lease) < 0)
        return NULL;
    return Py_NewRef(lease->item != NULL ? lease->item : Py_None); /* none: the garbage collector cleared it */
}

static PyObject *lease_deliveries(struct lease *lease, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(lease->in.deliveries);
}

static PyObject *lease_is_over(struct lease *lease, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(lease->in.hand < 0);
}

static PyObject *lease_repr(struct lease *lease)
{
    return PyUnicode_FromFormat("<Lease of %R: %R, delivery %u%s>", lease->handle,
                                lease->item != NULL ? lease->item : Py_None, lease->in.deliveries,
                                lease->in.hand < 0 ? ", over" : "");
}

static int lease_traverse(struct lease *lease, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(lease));
    Py_VISIT(lease->handle);
    Py_VISIT(lease->item);
    Py_VISIT(lease->memory);
    return 0;
}

static int lease_clear(struct lease *lease)
{
    lease_end(lease, false); /* while the handle is there */
    Py_CLEAR(lease->item); /* in place, the record is in hand until here */
    return 0;
}

static void lease_dealloc(struct lease *lease)
{
    PyTypeObject *type = Py_TYPE(lease);
    PyObject_GC_UnTrack(lease);
    lease_clear(lease);
    Py_CLEAR(lease->handle);
    type->tp_free(lease);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"release", (PyCFunction)lease_release, METH_NOARGS, lease_release_doc},
    {"give_back", (PyCFunction)lease_give_back, METH_NOARGS, lease_give_back_doc},
    {"__enter__", (PyCFunction)lease_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))lease_exit, METH_FASTCALL, NULL},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"item", (getter)lease_item, NULL, "The item.", NULL},
    {"deliveries", (getter)lease_deliveries, NULL, "How often the item was handed out, this time included.", NULL},
    {"is_over", (getter)lease_is_over, NULL, "Whether it was released or given back.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)lease_doc},
    {Py_tp_methods, methods},
    {Py_tp_getset, attributes},
    {Py_tp_repr, lease_repr},
    {Py_tp_traverse, lease_traverse},
    {Py_tp_clear, lease_clear},
    {Py_tp_dealloc, lease_dealloc},
    {0, NULL},
};

PyType_Spec lease_spec = {
    "shmqueue._core.Lease",
    sizeof(struct lease),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    slots,
};
