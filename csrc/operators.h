// The operators, written once for every backend: they check their arguments, allocate the results and call the kernels.
//
// ops/fused.py brings tensors to these forms; who calls torch.ops.eroseg directly is told what is wrong.
//
// A Backend is made from the tensor whose device everything must be on. It has a function for each operator, which gets
// checked parameters (params.h); gradients return their stats.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "arguments.h"

namespace eroseg {

template <class Backend>
std::tuple<Tensor, Tensor> erosion_grad(const Tensor& logits, const Tensor& labels, const Tensor& tau,
                                        const MaybeTensor& previous, const MaybeTensor& class_weight,
                                        const Tensor& grad, int64_t ignore_index, int64_t confidence, int64_t front,
                                        int64_t direction, int64_t radius, double slope, bool targeted,
                                        bool align_corners) {
  const Checks checks{"erosion_grad", logits};
  ErosionGrad job{};
  job.input = checks.input(labels, ignore_index, align_corners);
  const Shape& shape = job.input.shape;
  job.tau = checks.data<float>(tau, "tau", {shape.batch});
  job.previous = checks.data<float>(previous, "previous", {shape.batch, shape.height, shape.width});
  job.class_weight = checks.data<float>(class_weight, "class_weight", {shape.batch, shape.classes()});
  job.confidence = checks.choice<Confidence>(confidence, 3, "confidence");
  job.front = checks.choice<Front>(front, 2, "front");
  job.direction = checks.choice<Direction>(direction, 2, "direction");
  job.radius = checks.choice<int>(radius, kMaxRadius + 1, "radius");
  job.slope = static_cast<float>(checks.number(slope, 0, kAnyMagnitude, "slope"));
  job.targeted = targeted;
  job.grad = checks.gradient(grad, job.input);
  checks.apart(grad, {logits, labels, tau, previous, class_weight}, "grad");
  const Backend backend(logits);
  Tensor log_odds = torch::stable::new_empty(logits, {shape.batch, shape.height, shape.width}, ScalarType::Float);
  job.log_odds = static_cast<float*>(log_odds.mutable_data_ptr());
  return {log_odds, backend.erosion_grad(job)};
}

template <class Backend>
Tensor pixel_grad(const Tensor& logits, const Tensor& labels, const MaybeTensor& class_weight, const Tensor& grad,
                  int64_t method, double progress, int64_t ignore_index, bool targeted, double q, bool align_corners) {
  const Checks checks{"pixel_grad", logits};
  PixelGrad job{};
  job.input = checks.input(labels, ignore_index, align_corners);
  job.class_weight =
      checks.data<float>(class_weight, "class_weight", {job.input.shape.batch, job.input.shape.classes()});
  job.method = {checks.choice<Method>(method, 6, "method"), targeted,
                static_cast<float>(checks.number(progress, 0, 1, "progress") / 2),
                static_cast<float>(checks.number(q, 0, kAnyMagnitude, "q") - 1)};
  job.grad = checks.gradient(grad, job.input);
  checks.apart(grad, {logits, labels, class_weight}, "grad");
  return Backend(logits).pixel_grad(job);
}

template <class Backend>
Tensor confidence(const Tensor& logits, const Tensor& labels, int64_t ignore_index, int64_t kind, bool align_corners) {
  const Checks checks{"confidence", logits};
  ConfidenceMap job{};
  job.input = checks.input(labels, ignore_index, align_corners);
  job.confidence = checks.choice<Confidence>(kind, 3, "confidence");
  const Backend backend(logits);
  const Shape& shape = job.input.shape;
  Tensor out = torch::stable::new_empty(logits, {shape.batch, shape.height, shape.width}, ScalarType::Float);
  job.out = static_cast<float*>(out.mutable_data_ptr());
  backend.confidence(job);
  return out;
}

template <class Backend>
Tensor kth_value(const Tensor& scores, const Tensor& k, const MaybeTensor& valid) {
  const Checks checks{"kth_value", scores};
  checks.dimensions(scores, 2, "scores");
  checks.dimensions(k, 2, "k");
  KthValue job{};
  job.batch = scores.size(0), job.n = scores.size(1), job.count = k.size(1);
  job.scores = checks.data<float>(scores, "scores", {job.batch, job.n});
  job.k = checks.data<int64_t>(k, "k", {job.batch, job.count});
  job.valid = checks.data<bool>(valid, "valid", {job.batch, job.n});
  const Backend backend(scores);
  Tensor out = torch::stable::new_empty(scores, {job.batch, job.count});
  job.out = static_cast<float*>(out.mutable_data_ptr());
  backend.kth_value(job);
  return out;
}

template <class Backend>
Tensor next_tau(const Tensor& log_odds, const Tensor& stats, int64_t steps_left, double reach, double front_min,
                double front_max) {
  const Checks checks{"next_tau", log_odds};
  checks.dimensions(log_odds, 3, "log_odds");
  NextTau job{};
  job.batch = log_odds.size(0), job.n = log_odds.size(1) * log_odds.size(2);
  job.scores = checks.data<float>(log_odds, "log_odds", {job.batch, log_odds.size(1), log_odds.size(2)});
  job.stats = checks.data<double>(stats, "stats", {job.batch, 4});
  STD_TORCH_CHECK(steps_left >= 0, "next_tau: steps_left is ", steps_left, ", wanted at least 0");
  job.settings = {steps_left, checks.number(reach, 0, kAnyMagnitude, "reach"),
                  checks.number(front_min, 0, 1, "front_min"), checks.number(front_max, 0, 1, "front_max")};
  const Backend backend(log_odds);
  Tensor tau = torch::stable::new_empty(log_odds, {job.batch});
  job.tau = static_cast<float*>(tau.mutable_data_ptr());
  backend.next_tau(job);
  return tau;
}

template <class Backend>
void linf_step_(const Tensor& x_adv, const Tensor& x, const Tensor& grad, double eps, double alpha, double low,
                double high, const MaybeTensor& mask) {
  const Checks checks{"linf_step_", x_adv};
  checks.dimensions(x_adv, 4, "x_adv");
  const std::vector<int64_t> shape{x_adv.size(0), x_adv.size(1), x_adv.size(2), x_adv.size(3)};
  const bool channels_last = !is_nchw(x_adv);
  for (const Tensor* tensor : {&x_adv, &x, &grad}) {
    checks.device(*tensor, "x or grad");
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && has_shape(*tensor, shape) &&
                        (channels_last ? is_nhwc(*tensor) : is_nchw(*tensor)),
                    "linf_step_: x_adv, x and grad differ in shape or layout, or are not float32");
  }
  Step step{};
  step.mask = checks.data<bool>(mask, "mask", {shape[0], 1, shape[2], shape[3]});
  checks.apart(x_adv, {x, grad, mask}, "x_adv");
  step.x_adv = static_cast<float*>(x_adv.mutable_data_ptr());
  step.x = static_cast<const float*>(x.const_data_ptr());
  step.grad = static_cast<const float*>(grad.const_data_ptr());
  step.batch = shape[0];
  step.channels = shape[1];
  step.pixels = shape[2] * shape[3];
  step.channels_last = channels_last;
  step.eps = static_cast<float>(checks.number(eps, 0, kAnyMagnitude, "eps"));
  step.alpha = static_cast<float>(checks.number(alpha, 0, kAnyMagnitude, "alpha"));
  step.low = static_cast<float>(checks.number(low, -kAnyMagnitude, kAnyMagnitude, "low"));
  step.high = static_cast<float>(checks.number(high, low, kAnyMagnitude, "high"));
  if (x_adv.numel() > 0) Backend(x_adv).linf_step(step);
}

template <class Backend>
Tensor confusion(const Tensor& prediction, const Tensor& labels, int64_t classes, int64_t ignore_index,
                 bool align_corners) {
  const Checks checks{"confusion", prediction};
  Confusion job{};
  job.classes = classes;
  STD_TORCH_CHECK(classes > 1, "confusion: classes is ", classes, ", wanted at least 2");
  if (prediction.dim() == 4) {
    job.input = checks.input(labels, ignore_index, align_corners);
    STD_TORCH_CHECK(job.input.shape.classes() == classes, "confusion: logits have ", job.input.shape.classes(),
                    " classes, wanted classes = ", classes);
  } else {
    checks.dimensions(prediction, 3, "prediction");
    const Shape shape{prediction.size(0), classes, prediction.size(1), prediction.size(2)};
    job.prediction = checks.data<int64_t>(prediction, "prediction", {shape.batch, shape.height, shape.width});
    job.input.shape = shape;
    job.input.labels = checks.labels(labels, shape, ignore_index);
  }
  const Backend backend(prediction);
  Tensor counts = torch::stable::new_zeros(prediction, {classes, classes}, ScalarType::Long);
  job.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  backend.confusion(job);
  return counts;
}

// Registers the operators of ops.cpp; `m` is what STABLE_TORCH_LIBRARY_IMPL names so.
template <class Backend, class Library>
void implement(Library& m) {
  m.impl("erosion_grad", TORCH_BOX(&erosion_grad<Backend>));
  m.impl("pixel_grad", TORCH_BOX(&pixel_grad<Backend>));
  m.impl("confidence", TORCH_BOX(&confidence<Backend>));
  m.impl("kth_value", TORCH_BOX(&kth_value<Backend>));
  m.impl("next_tau", TORCH_BOX(&next_tau<Backend>));
  m.impl("linf_step_", TORCH_BOX(&linf_step_<Backend>));
  m.impl("confusion", TORCH_BOX(&confusion<Backend>));
}

}  // namespace eroseg
