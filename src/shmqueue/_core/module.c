/* module.c - the extension module `shmqueue._core`: its types and the core's status codes. */
#include "binding.h"

static int add_status_codes(PyObject *module)
{
    static const struct {
        const char *name;
        int value;
    } codes[] = {
        {"OK", SHMQ_OK},           {"FULL", SHMQ_FULL},       {"EMPTY", SHMQ_EMPTY},   {"TOO_BIG", SHMQ_TOO_BIG},
        {"BUSY", SHMQ_BUSY},       {"INTR", SHMQ_INTR},       {"CLOSED", SHMQ_CLOSED}, {"FORKED", SHMQ_FORKED},
        {"CORRUPT", SHMQ_CORRUPT}, {"VERSION", SHMQ_VERSION}, {"SYSTEM", SHMQ_SYSTEM}, {"NO_SLOT", SHMQ_NO_SLOT},
        {"GONE", SHMQ_GONE},       {"CLAIMED", SHMQ_CLAIMED},
    };
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (PyModule_AddIntConstant(module, codes[i].name, codes[i].value) < 0)
            return -1;
    return 0;
}

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type != NULL && PyModule_AddType(module, type) < 0)
        Py_CLEAR(type);
    return type;
}

static int exec(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    PyTypeObject *handle_type = add_type(module, &handle_spec);
    if (handle_type == NULL)
        return -1;
    Py_DECREF(handle_type);
    state->lease_type = add_type(module, &lease_spec);
    state->memory_type = add_type(module, &memory_spec);
    return state->lease_type == NULL || state->memory_type == NULL ? -1 : add_status_codes(module);
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    struct module_state *state = PyModule_GetState(module);
    Py_VISIT(state->lease_type);
    Py_VISIT(state->memory_type);
    return 0;
}

static int clear(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->lease_type);
    Py_CLEAR(state->memory_type);
    return 0;
}

static void free_module(void *module) { clear(module); }

static PyMethodDef functions[] = {
    {"end_reservation", views_end_reservation, METH_VARARGS, NULL},
    {"before_fork", handles_before_fork, METH_O, NULL},
    {"after_fork_in_parent", handles_after_fork_in_parent, METH_NOARGS, NULL},
    {"after_fork_in_child", handles_after_fork_in_child, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, exec}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmqueue._core",
    .m_doc = "The binding to the core; see shmqueue.queue.",
    .m_size = sizeof(struct module_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
