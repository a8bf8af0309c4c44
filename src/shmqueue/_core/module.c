/* module.c - the extension module `shmqueue._core`: the handle type and the core's status codes. */
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
        {"GONE", SHMQ_GONE},
    };
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (PyModule_AddIntConstant(module, codes[i].name, codes[i].value) < 0)
            return -1;
    return 0;
}

static int exec(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &handle_spec, NULL);
    if (type == NULL || PyModule_AddType(module, (PyTypeObject *)type) < 0) {
        Py_XDECREF(type);
        return -1;
    }
    Py_DECREF(type);
    return add_status_codes(module);
}

static PyMethodDef functions[] = {
    {"before_fork", handles_before_fork, METH_O, NULL},
    {"after_fork_in_parent", handles_after_fork_in_parent, METH_O, NULL},
    {"after_fork_in_child", handles_after_fork_in_child, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, exec}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,  .m_name = "shmqueue._core", .m_doc = "The binding to the core; see shmqueue.queue.",
    .m_methods = functions, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
