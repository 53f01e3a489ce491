// The Python module eroseg_ext._cuda. Importing it registers the operators for CUDA tensors; besides that it tells what
// it was built for and what the machine has.
#include <Python.h>
#include <cuda_runtime_api.h>

namespace {

PyObject* versions(PyObject*, PyObject*) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return Py_BuildValue("ii", CUDART_VERSION, driver);
}

PyObject* architectures(PyObject*, PyObject*) { return PyUnicode_FromString(EROSEG_CUDA_ARCHITECTURES); }

PyMethodDef methods[] = {
    {"versions", versions, METH_NOARGS,
     "The CUDA runtime linked in and the newest that the driver takes, as 1000 * "
     "major + 10 * minor; 0 without a driver."},
    {"architectures", architectures, METH_NOARGS, "What the kernels are built for, such as '8.0;9.0;12.0+PTX'."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
