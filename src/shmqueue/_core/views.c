/* views.c - what becomes of arrays and memoryviews when the lease or reservation that they show is over.
 *
 * A record stays in hand as long as its `Memory` lives (memory.c), and every view holds on to that; so no view shows, or
 * writes to, what is somebody else's. But the variable of a with block, and what was made of it, outlive the block. So
 * those are made unusable, in place, where that is safe: where every reference to the object is known to be a variable,
 * or one of a container that keeps nothing but references: those of the interpreter and instances of classes that are
 * written in Python. Any other reference may be an extension's that keeps the object's address; then the object stays
 * as it is, and the record in hand.
 *
 * References of containers are those that they show the garbage collector, which has to be able to rely on the number.
 * No Python code runs between counting and acting, so that nobody can take another reference meanwhile. A reference is
 * counted once: containers are remembered. */
#include "binding.h"

#define MAX_FOUND 1000
#define MAX_CONTAINERS 256
#define MAX_REFERENCES 4096 /* of one container; those beyond aren't looked at */
#define MAX_FRAMES 20
#define ROUNDS 8 /* what is unusable lets go of its base, which then may be too */

struct search {
    PyObject *memory, *array_type, *unusable; /* what __setstate__ gets */
    PyObject *deque_type;
    traverseproc class_traverse; /* of what a class statement makes */
    struct {
        PyObject *object;
        Py_ssize_t references;
        bool has_cell;
    } found[MAX_FOUND];
    PyObject *containers[MAX_CONTAINERS];
    int n_found, n_containers, n_done; /* containers: the first n_done were looked into */
    int n_references;                  /* of the one that is being looked into */
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

/* Does an object keep other objects and nothing of them, such as an address? */
static bool is_container(const struct search *s, PyObject *object)
{
    const PyTypeObject *type = Py_TYPE(object);
    if (!PyObject_IS_GC(object))
        return false;
    while (type->tp_traverse == s->class_traverse && type->tp_base != NULL)
        type = type->tp_base;
    return type == &PyBaseObject_Type || type == (PyTypeObject *)s->deque_type || type == &PyCFunction_Type ||
           PyList_Check(object) || PyTuple_Check(object) || PyDict_Check(object);
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

/* A reference to an array or memoryview. One variable that functions share, a cell, may come up in several of them. */
static void see_view(struct search *s, PyObject *object, bool is_cell)
{
    int i = 0;
    while (i < s->n_found && s->found[i].object != object)
        i++;
    if (i == MAX_FOUND || (i == s->n_found && !shows(s, object)))
        return;
    if (i == s->n_found) {
        s->found[i].object = Py_NewRef(object);
        s->found[i].references = 0;
        s->found[s->n_found++].has_cell = false;
    }
    s->found[i].references += !is_cell || !s->found[i].has_cell;
    s->found[i].has_cell |= is_cell;
}

static void see(struct search *s, PyObject *object, bool is_cell)
{
    if (is_view(s, object))
        see_view(s, object, is_cell);
    else if (is_container(s, object))
        remember(s, object);
}

static int see_reference(PyObject *object, void *search)
{
    struct search *s = search;
    see(s, object, false);
    return ++s->n_references == MAX_REFERENCES;
}

/* Look into the containers that were seen, and those in them. */
static void look_into(struct search *s)
{
    for (; s->n_done < s->n_containers; s->n_done++) {
        PyObject *container = s->containers[s->n_done];
        s->n_references = 0;
        Py_TYPE(container)->tp_traverse(container, see_reference, s);
    }
}

/* Call a method in C with one argument, or none. False, without an exception: it failed. */
static bool call(PyObject *object, const char *name, PyObject *argument)
{
    PyObject *method = attribute(object, name);
    PyObject *none = method == NULL ? NULL : argument == NULL ? PyObject_CallNoArgs(method) : PyObject_CallOneArg(method, argument);
    if (none == NULL)
        PyErr_Clear(); /* somebody has a view of the view */
    Py_XDECREF(none);
    Py_XDECREF(method);
    return none != NULL;
}

/* Make unusable what is only referred to by what was seen. Arrays are also made read-only, else they could be filled. */
static void act(struct search *s)
{
    bool has_changed = true;
    for (int round = 0; round < ROUNDS && has_changed; round++) {
        has_changed = false;
        for (int i = 0; i < s->n_found; i++) {
            PyObject *object = s->found[i].object;
            if (Py_REFCNT(object) != s->found[i].references + 1 || !shows(s, object))
                continue;
            has_changed |= PyMemoryView_Check(object)
                               ? call(object, "release", NULL)
                               : call(object, "__setstate__", s->unusable) && call(object, "setflags", Py_False);
        }
    }
}

/* The variables of a function. Before CPython 3.13 `locals` is a copy that the frame keeps, as a dict: what is found is
 * deleted from it, so that it doesn't count. And all of it is deleted where nobody else has it, as it would keep what the
 * variables let go of. False: the copy was counted as a container before it was renewed just now. */
static bool see_variables(struct search *s, PyObject *code, PyObject *locals)
{
    static const char *const kinds[] = {"co_cellvars", "co_freevars", "co_varnames"};
    PyObject *names[3] = {NULL};
    bool is_copy = PyDict_CheckExact(locals);
    if (is_copy && !remember(s, locals))
        return false;
    s->n_done = s->n_containers;
    for (int kind = 0; kind < 3 && (names[kind] = attribute(code, kinds[kind])) != NULL; kind++) {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names[kind]); i++) {
            PyObject *name = PyTuple_GET_ITEM(names[kind], i);
            if (kind == 2 && PySequence_Contains(names[0], name) != 0)
                continue; /* an argument that functions share */
            PyObject *value = PyObject_GetItem(locals, name);
            if (value != NULL)
                see(s, value, kind < 2);
            if (value != NULL && is_copy && is_view(s, value) && shows(s, value))
                PyDict_DelItem(locals, name);
            Py_XDECREF(value);
            PyErr_Clear(); /* a name without a value */
        }
    }
    for (int kind = 0; kind < 3; kind++)
        Py_XDECREF(names[kind]);
    act(s);
    if (Py_REFCNT(s->memory) > 1)
        look_into(s);
    if (is_copy && Py_REFCNT(locals) == 3) /* the frame's, the caller's, and that of s->containers */
        PyDict_Clear(locals);
    return true;
}

/* Look at a frame's variables; the frame that called it, a new reference or NULL. */
static PyObject *see_frame(struct search *s, PyObject *frame)
{
    PyObject *code = attribute(frame, "f_code"), *locals = attribute(frame, "f_locals");
    PyObject *flags = code != NULL ? attribute(code, "co_flags") : NULL;
    bool may_go_on = flags != NULL && locals != NULL;
    if (may_go_on && PyLong_AsLong(flags) & CO_OPTIMIZED) {
        may_go_on = see_variables(s, code, locals);
    } else if (may_go_on) {
        see(s, locals, false);
        look_into(s);
    }
    Py_XDECREF(code);
    Py_XDECREF(locals);
    Py_XDECREF(flags);
    return may_go_on ? attribute(frame, "f_back") : NULL;
}

/* What a module has, if that is imported. A new reference, or NULL without an exception. */
static PyObject *of_module(const char *module_name, const char *name)
{
    PyObject *interned = PyUnicode_InternFromString(module_name);
    PyObject *module = interned != NULL ? PyImport_GetModule(interned) : NULL;
    PyObject *value = module != NULL ? attribute(module, name) : NULL;
    Py_XDECREF(interned);
    Py_XDECREF(module);
    PyErr_Clear();
    return value;
}

/* Look up what the search needs. An unusable array has no dimensions and holds an object that only raises (views.py). */
static void prepare(struct search *s)
{
    PyObject *over = of_module("shmqueue.views", "OVER"), *dtype = of_module("numpy", "dtype");
    PyObject *objects = dtype != NULL ? PyObject_CallOneArg(dtype, (PyObject *)&PyBaseObject_Type) : NULL;
    s->deque_type = of_module("collections", "deque");
    s->array_type = of_module("numpy", "ndarray");
    s->class_traverse = over != NULL ? Py_TYPE(over)->tp_traverse : NULL;
    s->unusable = over != NULL && objects != NULL ? Py_BuildValue("(i()OO[O])", 1, objects, Py_False, over) : NULL;
    Py_XDECREF(over);
    Py_XDECREF(dtype);
    Py_XDECREF(objects);
    PyErr_Clear();
}

void views_let_go(PyObject *memory, PyObject *item, PyObject *frame)
{
    if (Py_REFCNT(memory) == 1)
        return;
    int had_gc = PyGC_Disable(); /* finalizers are Python code */
    struct search s = {.memory = memory};
    prepare(&s);
    remember(&s, item);
    look_into(&s);
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
    Py_XDECREF(s.deque_type);
    if (had_gc)
        PyGC_Enable();
}

PyObject *views_end_reservation(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *held, *frame, *buffer;
    int is_done;
    if (!PyArg_ParseTuple(args, "O!pO", &PyList_Type, &held, &is_done, &frame) ||
        (buffer = PyList_GetSlice(held, 1, 2)) == NULL)
        return NULL;
    PyObject *memory = Py_NewRef(PyList_GET_ITEM(held, 0));
    if (PyList_SetSlice(held, 0, 2, NULL) < 0) {
        Py_DECREF(memory);
        Py_DECREF(buffer);
        return NULL;
    }
    views_let_go(memory, buffer, frame);
    Py_DECREF(buffer);
    bool is_shown = Py_REFCNT(memory) > 1;
    memory_end((struct memory *)memory, is_done && !is_shown);
    Py_DECREF(memory);
    return PyBool_FromLong(!is_shown);
}
