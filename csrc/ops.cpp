// Every operator schema of the package, on one page. eroseg_ext/ops/reference.py defines what they compute,
// eroseg_ext/ops/fused.py is their Python face, csrc/cpu/ops_cpu.cpp implements them for CPU tensors.
//
// Tensors are dense and of the documented dtypes: ops/fused.py brings them there. Names are integers here, see enums.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(eroseg, m) {
  m.def(
      "erosion_grad(Tensor logits, Tensor labels, Tensor tau, Tensor? previous, Tensor? class_weight, Tensor(a!) grad, "
      "int ignore_index, "
      "int confidence, int front, int direction, int radius, float slope, bool targeted, bool align_corners) "
      "-> (Tensor log_odds, Tensor stats)");
  m.def(
      "pixel_grad(Tensor logits, Tensor labels, Tensor? class_weight, Tensor(a!) grad, int method, float progress, "
      "int ignore_index, bool targeted, float q, bool align_corners) -> Tensor stats");
  m.def("confidence(Tensor logits, Tensor labels, int ignore_index, int confidence, bool align_corners) -> Tensor");
  m.def("kth_value(Tensor scores, Tensor k, Tensor? valid) -> Tensor");
  m.def(
      "next_tau(Tensor log_odds, Tensor stats, int steps_left, float reach, float front_min, float front_max) "
      "-> Tensor");
  m.def(
      "linf_step_(Tensor(a!) x_adv, Tensor x, Tensor grad, float eps, float alpha, float low, float high, "
      "Tensor? mask) -> ()");
  m.def("confusion(Tensor prediction, Tensor labels, int classes, int ignore_index, bool align_corners) -> Tensor");
}
