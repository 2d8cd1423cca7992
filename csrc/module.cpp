// The Python module, empty: loading it registers the kernels of all files beside it with the dispatcher.
#include <Python.h>

#define SAP_FAST_JOIN(a, b) a##b
#define SAP_FAST_INIT(name) SAP_FAST_JOIN(PyInit_, name)

// TORCH_EXTENSION_NAME is the module's own name, which torch's build helper defines.
PyMODINIT_FUNC SAP_FAST_INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef definition = {
      .m_base = PyModuleDef_HEAD_INIT, .m_name = "sap_fast._C", .m_doc = nullptr, .m_size = -1, .m_methods = nullptr,
      .m_slots = nullptr, .m_traverse = nullptr, .m_clear = nullptr, .m_free = nullptr};
  return PyModule_Create(&definition);
}
