// Checks of the arguments of the operators, for every backend: tensors in, the jobs of jobs.h out.
//
// ops.py brings tensors to these forms; who calls torch.ops.eroseg directly is told what is wrong.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "jobs.h"
#include "tau.h"

namespace eroseg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline bool has_shape(const Tensor& tensor, const std::vector<int64_t>& shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (tensor.size(static_cast<int64_t>(i)) != shape[i]) return false;
  }
  return true;
}

// Whether the elements lie densely with the dimensions nested in this order, the last one innermost; strides of an
// empty tensor mean nothing.
inline bool is_dense(const Tensor& tensor, const std::vector<int64_t>& order) {
  if (tensor.numel() == 0) return true;
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    if (tensor.size(order[i]) != 1 && tensor.stride(order[i]) != stride) return false;
    stride *= tensor.size(order[i]);
  }
  return true;
}

inline bool is_nchw(const Tensor& tensor) { return is_dense(tensor, {0, 1, 2, 3}); }
inline bool is_nhwc(const Tensor& tensor) { return is_dense(tensor, {0, 2, 3, 1}); }

inline void check(const Tensor& tensor, const char* op, const char* name, ScalarType dtype,
                  const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), ", wanted ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(has_shape(tensor, shape), op, ": ", name, " has another shape than its companions need");
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous");
}

inline FloatType float_type(const Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::Half:
      return FloatType::kFloat16;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": logits are ", torch::headeronly::toString(tensor.scalar_type()),
                      ", wanted float32, float16 or bfloat16");
  }
}

inline LabelType label_type(const Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case ScalarType::Long:
      return LabelType::kInt64;
    case ScalarType::Int:
      return LabelType::kInt32;
    case ScalarType::Byte:
      return LabelType::kUInt8;
    default:
      STD_TORCH_CHECK(false, op, ": labels are ", torch::headeronly::toString(tensor.scalar_type()),
                      ", wanted int64, int32 or uint8");
  }
}

inline Labels checked_labels(const Tensor& labels, const Shape& shape, int64_t ignore_index, const char* op) {
  const LabelType type = label_type(labels, op);
  check(labels, op, "labels", labels.scalar_type(), {shape.batch, shape.height, shape.width});
  return {labels.const_data_ptr(), type, ignore_index};
}

inline Input checked_input(const Tensor& logits, const Tensor& labels, int64_t ignore_index, const char* op) {
  const FloatType type = float_type(logits, op);
  STD_TORCH_CHECK(logits.dim() == 4 && logits.size(1) > 0, op, ": logits have ", logits.dim(),
                  " dimensions, wanted [B, C, H, W] with C > 0");
  const Shape shape{logits.size(0), logits.size(1), logits.size(2), logits.size(3)};
  STD_TORCH_CHECK(is_nchw(logits) || is_nhwc(logits), op, ": logits are neither contiguous nor channels_last");
  return {shape, {logits.const_data_ptr(), type, !is_nchw(logits)}, checked_labels(labels, shape, ignore_index, op)};
}

// A choice that crosses the schema as an integer; `count` of them exist.
template <class Enum>
Enum checked_choice(int64_t value, int64_t count, const char* op, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value < count, op, ": ", name, " is ", value, ", wanted 0 to ", count - 1);
  return static_cast<Enum>(value);
}

// For numbers that have to lie in [low, high]; NaN does not.
inline double checked_number(double value, double low, double high, const char* op, const char* name) {
  STD_TORCH_CHECK(value >= low && value <= high, op, ": ", name, " is ", value, ", wanted a number from ", low, " to ",
                  high);
  return value;
}
constexpr double kAnyMagnitude = std::numeric_limits<float>::max();

// What is written must not lie where something else is still to be read. The tensors are dense.
inline void check_apart(const Tensor& written, std::initializer_list<MaybeTensor> read, const char* op,
                        const char* name) {
  const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
  const auto end = [&](const Tensor& t) { return begin(t) + t.numel() * static_cast<int64_t>(t.element_size()); };
  for (const MaybeTensor& other : read) {
    if (!other.has_value() || other->numel() == 0 || written.numel() == 0) continue;
    STD_TORCH_CHECK(end(*other) <= begin(written) || end(written) <= begin(*other), op, ": ", name,
                    " is written and overlaps a tensor that is read, wanted memory of its own");
  }
}

inline void* checked_grad(const Tensor& grad, const Tensor& logits, const Input& input, const char* op) {
  const Shape& shape = input.shape;
  STD_TORCH_CHECK(grad.scalar_type() == logits.scalar_type() &&
                      has_shape(grad, {shape.batch, shape.channels, shape.height, shape.width}) &&
                      (input.logits.channels_last ? is_nhwc(grad) : is_nchw(grad)),
                  op, ": grad differs from logits in dtype, shape or memory layout");
  return grad.mutable_data_ptr();
}

template <class T>
const T* data_or_null(const MaybeTensor& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

inline Step checked_step(const Tensor& x_adv, const Tensor& x, const Tensor& grad, const MaybeTensor& mask, double eps,
                         double alpha, double low, double high, const char* op) {
  STD_TORCH_CHECK(x_adv.dim() == 4, op, ": x_adv has ", x_adv.dim(), " dimensions, wanted [B, K, H, W]");
  const std::vector<int64_t> shape{x_adv.size(0), x_adv.size(1), x_adv.size(2), x_adv.size(3)};
  const bool channels_last = !is_nchw(x_adv);
  for (const Tensor* tensor : {&x_adv, &x, &grad}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && has_shape(*tensor, shape) &&
                        (channels_last ? is_nhwc(*tensor) : is_nchw(*tensor)),
                    op, ": x_adv, x and grad differ in shape or layout, or are not float32");
  }
  if (mask.has_value()) check(*mask, op, "mask", ScalarType::Bool, {shape[0], 1, shape[2], shape[3]});
  check_apart(x_adv, {x, grad, mask}, op, "x_adv");
  checked_number(eps, 0, kAnyMagnitude, op, "eps");
  checked_number(alpha, 0, kAnyMagnitude, op, "alpha");
  checked_number(low, -kAnyMagnitude, kAnyMagnitude, op, "low");
  checked_number(high, low, kAnyMagnitude, op, "high");
  Step step{};
  step.x_adv = static_cast<float*>(x_adv.mutable_data_ptr());
  step.x = static_cast<const float*>(x.const_data_ptr());
  step.grad = static_cast<const float*>(grad.const_data_ptr());
  step.mask = data_or_null<bool>(mask);
  step.channels = shape[1];
  step.pixels = shape[2] * shape[3];
  step.channels_last = channels_last;
  step.eps = static_cast<float>(eps);
  step.alpha = static_cast<float>(alpha);
  step.low = static_cast<float>(low);
  step.high = static_cast<float>(high);
  return step;
}

// All of the job but log_odds, which the caller allocates.
inline ErosionGrad checked_erosion_grad(const Tensor& logits, const Tensor& labels, const Tensor& tau,
                                        const MaybeTensor& previous, const MaybeTensor& class_weight,
                                        const Tensor& grad, int64_t ignore_index, int64_t confidence, int64_t front,
                                        int64_t direction, int64_t radius, double slope, int64_t within,
                                        bool targeted) {
  constexpr const char* kOp = "erosion_grad";
  ErosionGrad job{};
  job.input = checked_input(logits, labels, ignore_index, kOp);
  const Shape& shape = job.input.shape;
  check(tau, kOp, "tau", ScalarType::Float, {shape.batch});
  if (previous.has_value()) {
    check(*previous, kOp, "previous", ScalarType::Float, {shape.batch, shape.height, shape.width});
  }
  if (class_weight.has_value()) {
    check(*class_weight, kOp, "class_weight", ScalarType::Float, {shape.batch, shape.classes()});
  }
  STD_TORCH_CHECK(radius >= 0 && radius <= kMaxRadius, kOp, ": radius is ", radius, ", wanted 0 to ", kMaxRadius);
  job.tau = static_cast<const float*>(tau.const_data_ptr());
  job.previous = data_or_null<float>(previous);
  job.class_weight = data_or_null<float>(class_weight);
  job.confidence = checked_choice<Confidence>(confidence, 2, kOp, "confidence");
  job.front = checked_choice<Front>(front, 2, kOp, "front");
  job.direction = checked_choice<Direction>(direction, 2, kOp, "direction");
  job.within = checked_choice<Within>(within, 2, kOp, "within");
  job.radius = static_cast<int>(radius);
  job.slope = static_cast<float>(checked_number(slope, 0, kAnyMagnitude, kOp, "slope"));
  job.targeted = targeted;
  job.grad = checked_grad(grad, logits, job.input, kOp);
  check_apart(grad, {logits, labels, tau, previous, class_weight}, kOp, "grad");
  return job;
}

inline PixelGrad checked_pixel_grad(const Tensor& logits, const Tensor& labels, const MaybeTensor& class_weight,
                                    const Tensor& grad, int64_t method, double progress, int64_t ignore_index,
                                    bool targeted, double q) {
  constexpr const char* kOp = "pixel_grad";
  PixelGrad job{};
  job.input = checked_input(logits, labels, ignore_index, kOp);
  const Shape& shape = job.input.shape;
  if (class_weight.has_value()) {
    check(*class_weight, kOp, "class_weight", ScalarType::Float, {shape.batch, shape.classes()});
  }
  job.method = {checked_choice<Method>(method, 7, kOp, "method"), targeted,
                static_cast<float>(checked_number(progress, 0, 1, kOp, "progress") / 2),
                static_cast<float>(checked_number(q, 0, kAnyMagnitude, kOp, "q") - 1)};
  job.class_weight = data_or_null<float>(class_weight);
  job.grad = checked_grad(grad, logits, job.input, kOp);
  check_apart(grad, {logits, labels, class_weight}, kOp, "grad");
  return job;
}

inline void check_kth_value(const Tensor& scores, const Tensor& k, const MaybeTensor& valid) {
  constexpr const char* kOp = "kth_value";
  STD_TORCH_CHECK(scores.dim() == 2 && k.dim() == 2, kOp, ": scores and k have ", scores.dim(), " and ", k.dim(),
                  " dimensions, wanted [B, N] and [B, K]");
  const int64_t batch = scores.size(0), n = scores.size(1);
  check(scores, kOp, "scores", ScalarType::Float, {batch, n});
  check(k, kOp, "k", ScalarType::Long, {batch, k.size(1)});
  if (valid.has_value()) check(*valid, kOp, "valid", ScalarType::Bool, {batch, n});
}

inline TauSettings checked_next_tau(const Tensor& log_odds, const Tensor& stats, int64_t steps_left, double reach,
                                    double front_min, double front_max) {
  constexpr const char* kOp = "next_tau";
  STD_TORCH_CHECK(log_odds.dim() == 3, kOp, ": log_odds has ", log_odds.dim(), " dimensions, wanted [B, H, W]");
  check(log_odds, kOp, "log_odds", ScalarType::Float, {log_odds.size(0), log_odds.size(1), log_odds.size(2)});
  check(stats, kOp, "stats", ScalarType::Double, {log_odds.size(0), 4});
  STD_TORCH_CHECK(steps_left >= 0, kOp, ": steps_left is ", steps_left, ", wanted at least 0");
  return {steps_left, checked_number(reach, 0, kAnyMagnitude, kOp, "reach"),
          checked_number(front_min, 0, 1, kOp, "front_min"), checked_number(front_max, 0, 1, kOp, "front_max")};
}

inline Erode checked_erode(const Tensor& scores, const MaybeTensor& valid, int64_t radius, const Tensor& cone,
                           const MaybeTensor& predicted) {
  constexpr const char* kOp = "erode";
  STD_TORCH_CHECK(scores.dim() == 3, kOp, ": scores has ", scores.dim(), " dimensions, wanted [B, H, W]");
  const std::vector<int64_t> map{scores.size(0), scores.size(1), scores.size(2)};
  check(scores, kOp, "scores", ScalarType::Float, map);
  check(cone, kOp, "cone", ScalarType::Float, {map[0]});
  if (valid.has_value()) check(*valid, kOp, "valid", ScalarType::Bool, map);
  if (predicted.has_value()) check(*predicted, kOp, "predicted", ScalarType::Int, map);
  STD_TORCH_CHECK(radius >= 0 && radius <= kMaxRadius, kOp, ": radius is ", radius, ", wanted 0 to ", kMaxRadius);
  return {map[1], map[2], static_cast<int>(radius)};
}

inline Confusion checked_confusion(const Tensor& prediction, const Tensor& labels, int64_t classes,
                                   int64_t ignore_index) {
  constexpr const char* kOp = "confusion";
  Confusion job{};
  job.classes = classes;
  STD_TORCH_CHECK(classes > 1, kOp, ": classes is ", classes, ", wanted at least 2");
  if (prediction.dim() == 4) {
    job.input = checked_input(prediction, labels, ignore_index, kOp);
    STD_TORCH_CHECK(job.input.shape.classes() == classes, kOp, ": logits have ", job.input.shape.classes(),
                    " classes, wanted classes = ", classes);
  } else {
    STD_TORCH_CHECK(prediction.dim() == 3, kOp, ": prediction has ", prediction.dim(), " dimensions, wanted 3 or 4");
    job.input.shape = {prediction.size(0), classes, prediction.size(1), prediction.size(2)};
    const Shape& shape = job.input.shape;
    check(prediction, kOp, "prediction", ScalarType::Long, {shape.batch, shape.height, shape.width});
    job.input.labels = checked_labels(labels, shape, ignore_index, kOp);
    job.prediction = static_cast<const int64_t*>(prediction.const_data_ptr());
  }
  return job;
}

}  // namespace eroseg
