/* views.c - what becomes of arrays and memoryviews when the lease or reservation that they show is over.
 *
 * A record stays in hand as long as its `Memory` lives (memory.c), and every view holds on to that; so no view shows, or
 * writes to, what is somebody else's. But the variable of a with block, and what was made of it, outlive the block. So
 * those are made unusable, in place, where that is safe: where every reference to the object is known to be a variable,
 * or one of a container that keeps nothing but references. Any other reference may be an extension's that keeps the
 * object's address; then the object stays as it is, and the record in hand.
 *
 * Variables are those of the functions that run in this thread, and of those that the exception passed which is being
 * handled. Containers are some types of the interpreter and instances of classes that are written in Python; their
 * references are those that they show the garbage collector, which has to be able to rely on the number. A container to
 * which there is an unknown reference isn't one: whoever has that may rely on what it holds, as a call in C does on the
 * tuple of its arguments, or an array on an object with an __array_interface__.
 *
 * From the first reference that is counted to the last object that is made unusable, no Python code runs and nothing is
 * freed, so that the numbers hold. */
#include "binding.h"

#define MAX_SEEN 4096 /* objects */
#define SLOTS (2 * MAX_SEEN)
#define MAX_EFFORT 1000000 /* about two milliseconds */
#define MAX_FRAMES 100
#define MAX_ERRORS 10 /* that came of each other */
#define ROUNDS 8      /* what is unusable lets go of its base, which then may be too */
/* From CPython 3.14 on functions that call others may pass on what their variables hold without a reference. */
#define MAX_CALLERS (PY_VERSION_HEX < 0x030e0000 ? 20 : 1)

struct seen {
    PyObject *object;
    Py_ssize_t references; /* that are known */
    bool is_shown, has_cell, is_root, is_excluded, has_excluded; /* what it refers to */
};

struct search {
    PyObject *memory, *array_type, *unusable; /* what __setstate__ gets */
    PyObject *deque_type, *defaultdict_type, *numpy; /* the last one is a name */
    PyObject *kept;              /* a list of what must not be freed yet */
    traverseproc class_traverse; /* of what a class statement makes */
    PyObject *frames[MAX_FRAMES], *locals[MAX_FRAMES]; /* callers first */
    int n_callers, n_frames;
    uintptr_t sum; /* of the addresses that the variables hold */
    struct seen seen[MAX_SEEN]; /* views and containers */
    int n_seen, n_done, effort;
    uint16_t slots[SLOTS]; /* by address: 1 + index in `seen`, or 0 */
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

/* What a class written in Python derives from, in the end. NULL: a class of numpy's, some of which keep addresses. */
static const PyTypeObject *base_in_c(const struct search *s, const PyTypeObject *type)
{
    for (; type->tp_traverse == s->class_traverse && type->tp_base != NULL; type = type->tp_base) {
        PyObject *module = PyDict_GetItemString(type->tp_dict, "__module__");
        if (module != NULL && PyUnicode_Check(module) && PyUnicode_Tailmatch(module, s->numpy, 0, PY_SSIZE_T_MAX, -1) == 1)
            return NULL;
    }
    return type;
}

/* Does an object keep other objects and nothing of them, such as an address? */
static bool is_container(const struct search *s, PyObject *object)
{
    if (!PyObject_IS_GC(object))
        return false;
    const PyTypeObject *type = base_in_c(s, Py_TYPE(object));
    return type == &PyBaseObject_Type || type == &PyList_Type || type == &PyTuple_Type || type == &PyDict_Type ||
           type == &PySet_Type || type == &PyFrozenSet_Type || type == &PyODict_Type || type == &PyFunction_Type ||
           type == &PyCFunction_Type || type == (PyTypeObject *)s->deque_type ||
           type == (PyTypeObject *)s->defaultdict_type;
}

/* The place of an object in the table, or the empty one where it belongs. */
static uint16_t *slot_of(struct search *s, PyObject *object)
{
    uint32_t slot = (uint32_t)((uintptr_t)object >> 4) * UINT32_C(2654435761) % SLOTS;
    while (s->slots[slot] != 0 && s->seen[s->slots[slot] - 1].object != object)
        slot = (slot + 1) % SLOTS;
    return &s->slots[slot];
}

/* A reference to an object. One variable that functions share, a cell, may come up in several of them. */
static void see(struct search *s, PyObject *object, bool is_cell)
{
    bool is_one = is_view(s, object);
    if (!is_one && !is_container(s, object))
        return;
    uint16_t *slot = slot_of(s, object);
    if (*slot == 0 && s->n_seen == MAX_SEEN)
        return;
    if (*slot == 0) {
        s->seen[s->n_seen] = (struct seen){.object = Py_NewRef(object), .is_shown = is_one && shows(s, object)};
        *slot = (uint16_t)++s->n_seen;
    }
    struct seen *found = &s->seen[*slot - 1];
    found->references += !is_cell || !found->has_cell;
    found->has_cell |= is_cell;
}

/* What is looked into whoever else refers to it: the item, and variables. */
static void see_root(struct search *s, PyObject *container)
{
    see(s, container, false);
    if (*slot_of(s, container) != 0)
        s->seen[*slot_of(s, container) - 1].is_root = true;
}

/* Most objects are no containers, which costs little to find out. */
static int makes_tired(struct search *s, PyObject *object)
{
    s->effort += PyObject_IS_GC(object) ? 16 : 1;
    return s->effort >= MAX_EFFORT;
}

static int see_reference(PyObject *object, void *search)
{
    struct search *s = search;
    see(s, object, false);
    return makes_tired(s, object);
}

static int exclude_reference(PyObject *object, void *search)
{
    struct search *s = search;
    if (*slot_of(s, object) != 0)
        s->seen[*slot_of(s, object) - 1].is_excluded = true;
    return makes_tired(s, object);
}

/* Visit what a container refers to. A function keeps the variables that it shares with others, and its defaults. */
static void visit(struct search *s, PyObject *container, visitproc visitor)
{
    if (!PyFunction_Check(container)) {
        Py_TYPE(container)->tp_traverse(container, visitor, s);
        return;
    }
    PyObject *closure = PyFunction_GET_CLOSURE(container), *defaults = PyFunction_GET_DEFAULTS(container);
    for (Py_ssize_t i = 0; closure != NULL && i < PyTuple_GET_SIZE(closure); i++) {
        PyObject *value = PyCell_GET(PyTuple_GET_ITEM(closure, i));
        if (value != NULL && visitor == see_reference)
            see(s, value, true);
        else if (value != NULL)
            visitor(value, s);
    }
    if (defaults != NULL)
        visitor(defaults, s);
}

/* Look into the containers that were seen, and those in them. */
static void look_into_containers(struct search *s)
{
    for (; s->n_done < s->n_seen && s->effort < MAX_EFFORT; s->n_done++) /* the table grows meanwhile */
        if (!is_view(s, s->seen[s->n_done].object))
            visit(s, s->seen[s->n_done].object, see_reference);
}

/* Exclude containers to which there is an unknown reference, and what they refer to. */
static void exclude_containers(struct search *s)
{
    for (bool has_changed = true; has_changed;) {
        has_changed = false;
        for (int i = 0; i < s->n_done; i++) {
            struct seen *at = &s->seen[i];
            if (is_view(s, at->object) || at->is_root || at->has_excluded ||
                (!at->is_excluded && Py_REFCNT(at->object) == at->references + 1))
                continue;
            at->has_excluded = has_changed = true;
            s->effort = 0;
            visit(s, at->object, exclude_reference);
        }
    }
}

/* Call a method in C with one argument, or none. False, without an exception: it failed. */
static bool call(PyObject *object, const char *name, PyObject *argument)
{
    PyObject *method = attribute(object, name);
    PyObject *none = NULL;
    if (method != NULL)
        none = argument == NULL ? PyObject_CallNoArgs(method) : PyObject_CallOneArg(method, argument);
    if (none == NULL)
        PyErr_Clear(); /* somebody has a view of the view */
    Py_XDECREF(none);
    Py_XDECREF(method);
    return none != NULL;
}

/* Make unusable what is only referred to by what was seen. Arrays are also made read-only, else they could be filled. */
static void act(struct search *s)
{
    bool has_changed = s->kept != NULL;
    for (int round = 0; round < ROUNDS && has_changed; round++) {
        has_changed = false;
        for (int i = 0; i < s->n_seen; i++) {
            PyObject *object = s->seen[i].object;
            if (!s->seen[i].is_shown || s->seen[i].is_excluded || Py_REFCNT(object) != s->seen[i].references + 1 || !shows(s, object))
                continue;
            bool is_array = !PyMemoryView_Check(object);
            PyObject *base = attribute(object, is_array ? "base" : "obj");
            if (base == NULL || PyList_Append(s->kept, base) < 0) {
                Py_XDECREF(base);
                PyErr_Clear();
                continue;
            }
            if (is_array ? call(object, "__setstate__", s->unusable) && call(object, "setflags", Py_False)
                         : call(object, "release", NULL))
                has_changed = true;
            if (*slot_of(s, base) != 0)
                s->seen[*slot_of(s, base) - 1].references++; /* that of the list */
            Py_DECREF(base);
        }
    }
}

/* Frames whose variables are to be looked at. Before CPython 3.13 that makes, or renews, a copy of them, which the frame
 * keeps; so for all of them before anything is counted. */
static void add_frame(struct search *s, PyObject *frame)
{
    for (int i = 0; i < s->n_frames; i++)
        if (s->frames[i] == frame)
            return;
    PyObject *locals = s->n_frames < MAX_FRAMES ? attribute(frame, "f_locals") : NULL;
    if (locals != NULL) {
        s->frames[s->n_frames] = Py_NewRef(frame);
        s->locals[s->n_frames++] = locals;
    }
}

static void add_callers(struct search *s, PyObject *frame, int most)
{
    Py_XINCREF(frame);
    for (int i = 0; i < most && frame != NULL && frame != Py_None; i++) {
        add_frame(s, frame);
        Py_SETREF(frame, attribute(frame, "f_back"));
    }
    Py_XDECREF(frame);
}

static bool is_caller_of(PyObject *frame, PyObject *at)
{
    for (Py_XINCREF(at); at != NULL && at != frame;)
        Py_SETREF(at, attribute(at, "f_back"));
    Py_XDECREF(at);
    return at != NULL;
}

/* The frames that the exception keeps which is being handled, and those before it. */
static void add_frames_of_errors(struct search *s, PyObject *here)
{
    PyObject *type, *error, *trace;
    PyErr_GetExcInfo(&type, &error, &trace);
    Py_XDECREF(type);
    for (int i = 0; i < MAX_ERRORS && error != NULL && PyExceptionInstance_Check(error); i++) {
        Py_XSETREF(trace, PyException_GetTraceback(error));
        for (int n = 0; n < MAX_FRAMES && trace != NULL && trace != Py_None; n++) {
            PyObject *frame = attribute(trace, "tb_frame");
            if (frame != NULL && (MAX_CALLERS > 1 || frame == here || !is_caller_of(frame, here)))
                add_frame(s, frame);
            Py_XDECREF(frame);
            Py_SETREF(trace, attribute(trace, "tb_next"));
        }
        Py_SETREF(error, PyException_GetContext(error));
    }
    Py_XDECREF(error);
    Py_XDECREF(trace);
}

static const char *const kinds[] = {"co_cellvars", "co_freevars", "co_varnames"};

/* Call `visit` for each variable of a function, by name; once, should a name be of several kinds. */
static void for_variables(struct search *s, int i, void (*visit)(struct search *s, int i, PyObject *name, bool is_cell))
{
    PyObject *code = attribute(s->frames[i], "f_code"), *names[3] = {NULL};
    for (int kind = 0; code != NULL && kind < 3 && (names[kind] = attribute(code, kinds[kind])) != NULL; kind++)
        for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(names[kind]); k++) {
            PyObject *name = PyTuple_GET_ITEM(names[kind], k);
            bool is_known = (kind > 0 && PySequence_Contains(names[0], name) != 0) ||
                            (kind > 1 && PySequence_Contains(names[1], name) != 0);
            if (!is_known)
                visit(s, i, name, kind < 2);
            PyErr_Clear(); /* a name without a value */
        }
    for (int kind = 0; kind < 3; kind++)
        Py_XDECREF(names[kind]);
    Py_XDECREF(code);
}

static void add_variable(struct search *s, int i, PyObject *name, bool is_cell)
{
    (void)is_cell;
    PyObject *value = PyObject_GetItem(s->locals[i], name);
    s->sum = s->sum * 31 + (uintptr_t)value;
    Py_XDECREF(value);
}

static void see_variable(struct search *s, int i, PyObject *name, bool is_cell)
{
    PyObject *value = PyObject_GetItem(s->locals[i], name);
    if (value != NULL)
        see(s, value, is_cell);
    s->sum = s->sum * 31 + (uintptr_t)value;
    Py_XDECREF(value);
}

static void forget_variable(struct search *s, int i, PyObject *name, bool is_cell)
{
    (void)is_cell;
    PyDict_DelItem(s->locals[i], name);
}

/* Is it a function's frame, and not that of a module or class, whose variables are a dict? */
static bool is_function(PyObject *frame)
{
    PyObject *code = attribute(frame, "f_code"), *flags = code != NULL ? attribute(code, "co_flags") : NULL;
    bool is_one = flags != NULL && (PyLong_AsLong(flags) & CO_OPTIMIZED) != 0;
    Py_XDECREF(code);
    Py_XDECREF(flags);
    return is_one;
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

/* Has this thread a trace or profile function? In its calls the copy of variables isn't only a copy. */
static bool is_traced(void)
{
    PyObject *trace = of_module("sys", "gettrace"), *profile = of_module("sys", "getprofile");
    Py_XSETREF(trace, trace != NULL ? PyObject_CallNoArgs(trace) : NULL);
    Py_XSETREF(profile, profile != NULL ? PyObject_CallNoArgs(profile) : NULL);
    bool is_one = trace != Py_None || profile != Py_None;
    Py_XDECREF(trace);
    Py_XDECREF(profile);
    return is_one;
}

/* Have the copies of variables, which were made one after the other, been those of one instant? Making one frees what an
 * older one kept, and that may run any code. */
static bool are_of_one_instant(struct search *s)
{
    uintptr_t sum = s->sum;
    s->sum = 0;
    for (int i = 0; i < s->n_frames; i++)
        if (is_function(s->frames[i])) {
            PyObject *again = attribute(s->frames[i], "f_locals");
            Py_XDECREF(again); /* before CPython 3.13 the same dict */
            for_variables(s, i, add_variable);
        }
    return s->sum == sum;
}

/* A copy of variables would keep what they let go of. A caller's: no other thread is at work there. */
static void forget_copy(struct search *s, int i)
{
    if (PyDict_CheckExact(s->locals[i]) && Py_REFCNT(s->locals[i]) == 2 && is_function(s->frames[i]) && !is_traced())
        for_variables(s, i, forget_variable);
}

/* Look up what the search needs. An unusable array has no dimensions and holds an object that only raises (views.py). */
static void prepare(struct search *s, PyObject *memory)
{
    PyObject *over = of_module("shmqueue.views", "OVER"), *dtype = of_module("numpy", "dtype");
    PyObject *objects = dtype != NULL ? PyObject_CallOneArg(dtype, (PyObject *)&PyBaseObject_Type) : NULL;
    s->memory = memory;
    s->deque_type = of_module("collections", "deque");
    s->defaultdict_type = of_module("collections", "defaultdict");
    s->array_type = of_module("numpy", "ndarray");
    s->class_traverse = over != NULL ? Py_TYPE(over)->tp_traverse : NULL;
    s->unusable = over != NULL && objects != NULL ? Py_BuildValue("(i()OO[O])", 1, objects, Py_False, over) : NULL;
    s->kept = PyList_New(0);
    s->numpy = PyUnicode_InternFromString("numpy");
    s->n_callers = s->n_frames = s->n_seen = s->n_done = s->effort = 0;
    s->sum = 0;
    memset(s->slots, 0, sizeof s->slots);
    Py_XDECREF(over);
    Py_XDECREF(dtype);
    Py_XDECREF(objects);
    PyErr_Clear();
}

static void clean_up(struct search *s)
{
    for (int i = 0; i < s->n_seen; i++)
        Py_DECREF(s->seen[i].object);
    for (int i = 0; i < s->n_frames; i++) {
        if (i < s->n_callers)
            forget_copy(s, i);
        Py_DECREF(s->frames[i]);
        Py_DECREF(s->locals[i]);
    }
    Py_XDECREF(s->kept);
    Py_XDECREF(s->unusable);
    Py_XDECREF(s->array_type);
    Py_XDECREF(s->deque_type);
    Py_XDECREF(s->defaultdict_type);
    Py_XDECREF(s->numpy);
}

void views_let_go(PyObject *memory, PyObject *item, PyObject *frame)
{
    struct search *s = Py_REFCNT(memory) > 1 ? PyMem_Malloc(sizeof *s) : NULL;
    if (s == NULL)
        return;
    for (int pass = 0; pass < 2 && Py_REFCNT(memory) > 1; pass++) { /* mostly it is the caller's variables alone */
        int had_gc = PyGC_Disable(); /* finalizers are Python code */
        prepare(s, memory);
        add_callers(s, frame, pass > 0 ? MAX_CALLERS : 1);
        s->n_callers = s->n_frames;
        if (pass > 0)
            add_frames_of_errors(s, frame);
        see_root(s, item);
        look_into_containers(s);
        for (int i = 0; i < s->n_frames; i++) {
            see_root(s, s->locals[i]);
            if (is_function(s->frames[i]))
                for_variables(s, i, see_variable);
        }
        look_into_containers(s);
        exclude_containers(s);
        if (are_of_one_instant(s))
            act(s);
        if (had_gc)
            PyGC_Enable();
        clean_up(s);
    }
    PyMem_Free(s);
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
