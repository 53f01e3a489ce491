// The Python module eroseg_ext._C. Importing it registers the operators; besides that it only tells the SIMD level.
#include <Python.h>

#include <exception>

#include "cpu/kernels.h"

namespace {

PyObject* cpu_level(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(eroseg::cpu::kernels().level);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"cpu_level", cpu_level, METH_NOARGS, "The SIMD level of the CPU kernels in use."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
