// csrc/pixel_math.h for pytest, on NumPy arrays; tests/test_pixel_math.py compiles it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "pixel_math.h"

namespace py = pybind11;
using eroseg::Front;
using eroseg::Method;
using eroseg::MethodSettings;

PYBIND11_MODULE(pixel_math_module, m) {
  m.def("exponential", py::vectorize([](float x) { return eroseg::exponential(x); }));
  m.def("log_positive", py::vectorize([](float x) { return eroseg::log_positive(x); }));
  m.def("sigmoid", py::vectorize([](float x) { return eroseg::sigmoid(x); }));
  m.def("log_sigmoid", py::vectorize([](float x) { return eroseg::log_sigmoid(x); }));
  m.def("front_weight", py::vectorize([](int front, float q, float tau) {
          return eroseg::front_weight(static_cast<Front>(front), q, tau);
        }));
  m.def("method_weight", py::vectorize([](int method, float log_odds, bool weighty, float norm, bool targeted,
                                          float lambda, float q_minus_one) {
          const MethodSettings settings{static_cast<Method>(method), targeted, lambda, q_minus_one};
          return eroseg::method_weight(settings, log_odds, weighty, norm);
        }));
}
