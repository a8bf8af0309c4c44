/* views.c - what becomes of arrays and memoryviews when the lease or reservation that they show is over.
 *
 * A record stays in hand as long as its `Memory` lives (memory.c), and every view holds on to that; so no view shows, or
 * writes to, what is somebody else's. But the variable of a with block, and what was made of it, outlive the block. So
 * those are made unusable, in place, where that is safe: where every reference to the object is known to be a slot of a
 * plain container of the item or of a variable, or a variable itself. Any other reference may be an extension's that
 * keeps the object's address; then the object stays as it is, and the record in hand.
 *
 * No Python code runs between counting and acting, so that nobody can take another reference meanwhile. A slot is
 * counted once: containers are remembered, and variables that functions share (cells) don't count. */
#include "binding.h"

#define MAX_FOUND 1000
#define MAX_CONTAINERS 256
#define MAX_SLOTS 4096 /* of one container; larger ones aren't looked into */
#define MAX_FRAMES 20
#define ROUNDS 8 /* what is unusable lets go of its base, which then may be too */

struct search {
    PyObject *memory, *array_type, *unusable; /* what __setstate__ gets */
    struct {
        PyObject *object;
        Py_ssize_t slots;
    } found[MAX_FOUND];
    PyObject *containers[MAX_CONTAINERS];
    int n_found, n_containers;
};

/* A new reference, or NULL without an exception. Names are interned, else types' caches would keep one of each call. */
static PyObject *attribute(PyObject *object, const char *name)
{
    PyObject *interned = PyUnicode_InternFromString(name);
    PyObject *value = interned != NULL ? PyObject_GetAttr(object, interned) : NULL;
    Py_XDECREF(interned);
    if (value == NULL)
        PyErr_Clear(); /* of a released memoryview, for one */
    return value;
}

static bool is_view(const struct search *s, PyObject *object)
{
    return PyMemoryView_Check(object) || (PyObject *)Py_TYPE(object) == s->array_type;
}

/* Has an array an address in the memory? One that an iterator made has, whatever its base. */
static bool is_inside(const struct search *s, PyObject *array)
{
    const struct shmq_in *in = &((struct memory *)s->memory)->in;
    Py_buffer view;
    if (PyObject_GetBuffer(array, &view, PyBUF_STRIDES) < 0) {
        PyErr_Clear();
        return false;
    }
    uintptr_t offset = (uintptr_t)view.buf - (uintptr_t)in->payload;
    PyBuffer_Release(&view);
    return offset < in->len;
}

/* Does a memoryview, or an array of numpy's own type, show the memory? */
static bool shows(const struct search *s, PyObject *object)
{
    PyObject *at = Py_NewRef(object);
    bool is_array = !PyMemoryView_Check(object), is_foreign = false;
    while (at != NULL && at != s->memory && !is_foreign) {
        is_foreign = !is_view(s, at) && at != Py_None;
        const char *next = is_foreign || at == Py_None ? NULL : PyMemoryView_Check(at) ? "obj" : "base";
        Py_SETREF(at, next != NULL ? attribute(at, next) : NULL);
    }
    Py_XDECREF(at);
    return at != NULL || (is_foreign && is_array && is_inside(s, object));
}

/* Remember a container. False: it was known, or there are too many. */
static bool remember(struct search *s, PyObject *container)
{
    for (int i = 0; i < s->n_containers; i++)
        if (s->containers[i] == container)
            return false;
    if (s->n_containers == MAX_CONTAINERS)
        return false;
    s->containers[s->n_containers++] = Py_NewRef(container);
    return true;
}

static void see_container(struct search *s, PyObject *container);

/* A slot of a container, or a variable, in which is an array or memoryview. */
static void see(struct search *s, PyObject *object)
{
    int i = 0;
    while (i < s->n_found && s->found[i].object != object)
        i++;
    if (i == MAX_FOUND || (i == s->n_found && !shows(s, object)))
        return;
    if (i == s->n_found) {
        s->found[i].object = Py_NewRef(object);
        s->found[s->n_found++].slots = 0;
    }
    s->found[i].slots++;
}

/* The dict of an instance of a class in Python that derives from nothing else. New reference, or NULL. */
static PyObject *plain_dict(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    if (!(type->tp_flags & Py_TPFLAGS_HEAPTYPE) || type->tp_base != &PyBaseObject_Type || PyTuple_GET_SIZE(type->tp_mro) != 2)
        return NULL;
    PyObject *dict = PyObject_GenericGetDict(object, NULL);
    if (dict == NULL)
        PyErr_Clear();
    return dict;
}

static void see_slots(struct search *s, PyObject *container, bool want_views)
{
    PyObject *value;
    if (PyDict_CheckExact(container)) {
        for (Py_ssize_t i = 0; PyDict_Next(container, &i, NULL, &value);)
            if (is_view(s, value) == want_views)
                (want_views ? see : see_container)(s, value);
        return;
    }
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(container); i++) {
        value = PySequence_Fast_GET_ITEM(container, i);
        if (is_view(s, value) == want_views)
            (want_views ? see : see_container)(s, value);
    }
}

static void see_container(struct search *s, PyObject *container)
{
    bool is_plain = PyDict_CheckExact(container) || PyList_CheckExact(container) || PyTuple_CheckExact(container);
    PyObject *slots = is_plain ? Py_NewRef(container) : plain_dict(container);
    if (slots != NULL && PyObject_Size(slots) <= MAX_SLOTS && remember(s, slots)) {
        see_slots(s, slots, true);
        see_slots(s, slots, false);
    }
    Py_XDECREF(slots);
}

/* Make unusable what is only referred to by the slots that were seen. */
static void act(struct search *s)
{
    bool has_changed = true;
    for (int round = 0; round < ROUNDS && has_changed; round++) {
        has_changed = false;
        for (int i = 0; i < s->n_found; i++) {
            PyObject *object = s->found[i].object;
            if (Py_REFCNT(object) != s->found[i].slots + 1 || !shows(s, object))
                continue;
            PyObject *method = attribute(object, PyMemoryView_Check(object) ? "release" : "__setstate__"), *none = NULL;
            if (method != NULL)
                none = PyMemoryView_Check(object) ? PyObject_CallNoArgs(method)
                                                  : PyObject_CallOneArg(method, s->unusable);
            has_changed |= none != NULL;
            if (none == NULL)
                PyErr_Clear(); /* somebody has a view of the view */
            Py_XDECREF(none);
            Py_XDECREF(method);
        }
    }
}

/* The variables of a function that are its alone. Before CPython 3.13 `locals` is a copy that the frame keeps, as a dict:
 * what is found is deleted from it, so that it doesn't count, unless it was counted as a container. And all of it is
 * deleted where nobody else has it, as it would keep what the variables let go of. */
static void see_variables(struct search *s, PyObject *code, PyObject *locals)
{
    PyObject *names = attribute(code, "co_varnames"), *cells = attribute(code, "co_cellvars");
    bool is_copy = PyDict_CheckExact(locals) && remember(s, locals);
    for (int pass = 0; names != NULL && cells != NULL && pass < 2 && Py_REFCNT(s->memory) > 1; pass++) {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); i++) {
            PyObject *name = PyTuple_GET_ITEM(names, i);
            PyObject *value = PySequence_Contains(cells, name) == 0 ? PyObject_GetItem(locals, name) : NULL;
            if (value != NULL && is_view(s, value) == (pass == 0))
                (pass == 0 ? see : see_container)(s, value);
            if (value != NULL && pass == 0 && is_copy && is_view(s, value) && shows(s, value))
                PyDict_DelItem(locals, name);
            Py_XDECREF(value);
            PyErr_Clear(); /* a name without a value */
        }
        act(s);
    }
    if (is_copy && Py_REFCNT(locals) == 3) /* the frame's, the caller's, and that of s->containers */
        PyDict_Clear(locals);
    Py_XDECREF(names);
    Py_XDECREF(cells);
}

/* Look at a frame's variables; the frame that called it, a new reference or NULL. */
static PyObject *see_frame(struct search *s, PyObject *frame)
{
    PyObject *code = attribute(frame, "f_code"), *locals = attribute(frame, "f_locals");
    PyObject *flags = code != NULL ? attribute(code, "co_flags") : NULL;
    if (flags != NULL && locals != NULL) {
        if (PyLong_AsLong(flags) & CO_OPTIMIZED)
            see_variables(s, code, locals);
        else
            see_container(s, locals);
    }
    Py_XDECREF(code);
    Py_XDECREF(locals);
    Py_XDECREF(flags);
    return attribute(frame, "f_back");
}

/* (1, (), dtype(object), False, [text]): the state of an array without dimensions. Needs numpy; NULL: it isn't there. */
static PyObject *state_of_unusable(PyObject **array_type)
{
    PyObject *name = PyUnicode_InternFromString("numpy"), *state = NULL, *dtype = NULL;
    PyObject *numpy = name != NULL ? PyImport_GetModule(name) : NULL;
    PyObject *make = numpy != NULL ? attribute(numpy, "dtype") : NULL;
    if (make != NULL && (*array_type = attribute(numpy, "ndarray")) != NULL &&
        (dtype = PyObject_CallOneArg(make, (PyObject *)&PyBaseObject_Type)) != NULL)
        state = Py_BuildValue("(i()OO[s])", 1, dtype, Py_False, "the lease or reservation of this array is over");
    Py_XDECREF(name);
    Py_XDECREF(numpy);
    Py_XDECREF(make);
    Py_XDECREF(dtype);
    PyErr_Clear();
    return state;
}

void views_let_go(PyObject *memory, PyObject *item, PyObject *frame)
{
    if (Py_REFCNT(memory) == 1)
        return;
    int had_gc = PyGC_Disable(); /* finalizers are Python code */
    struct search s = {.memory = memory};
    s.unusable = state_of_unusable(&s.array_type);
    see_container(&s, item);
    act(&s);
    Py_XINCREF(frame);
    for (int i = 0; i < MAX_FRAMES && frame != NULL && frame != Py_None && Py_REFCNT(memory) > 1; i++) {
        Py_SETREF(frame, see_frame(&s, frame));
        act(&s);
    }
    for (int i = 0; i < s.n_found; i++)
        Py_DECREF(s.found[i].object);
    for (int i = 0; i < s.n_containers; i++)
        Py_DECREF(s.containers[i]);
    Py_XDECREF(frame);
    Py_XDECREF(s.unusable);
    Py_XDECREF(s.array_type);
    if (had_gc)
        PyGC_Enable();
}

PyObject *views_end_reservation(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *held, *frame, *buffer;
    int is_done;
    if (!PyArg_ParseTuple(args, "O!pO", &PyList_Type, &held, &is_done, &frame) || (buffer = PyList_New(1)) == NULL)
        return NULL;
    PyObject *memory = Py_NewRef(PyList_GET_ITEM(held, 0));
    PyList_SET_ITEM(buffer, 0, Py_NewRef(PyList_GET_ITEM(held, 1)));
    if (PyList_SetSlice(held, 0, 2, NULL) < 0)
        return NULL;
    views_let_go(memory, buffer, frame);
    Py_DECREF(buffer);
    bool is_shown = Py_REFCNT(memory) > 1;
    memory_end((struct memory *)memory, is_done && !is_shown);
    Py_DECREF(memory);
    return PyBool_FromLong(!is_shown);
}
