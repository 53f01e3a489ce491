// Checks of the operators' arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

#include "params.h"

namespace eroseg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr double kAnyMagnitude = std::numeric_limits<float>::max();

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

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  if constexpr (std::is_same_v<T, bool>) return ScalarType::Bool;
}

// The checks of one operator. Everything has to be on the device of its first tensor: a kernel follows the pointers
// that it is given.
struct Checks {
  const char* op;
  const Tensor& first;

  void device(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cuda() == first.is_cuda() && tensor.get_device_index() == first.get_device_index(), op,
                    ": ", name, " is on another device than its companions");
  }

  void dimensions(const Tensor& tensor, int64_t count, const char* name) const {
    STD_TORCH_CHECK(tensor.dim() == count, op, ": ", name, " has ", tensor.dim(), " dimensions, wanted ", count);
  }

  // The elements of a contiguous tensor of that shape.
  template <class T>
  const T* data(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) const {
    constexpr ScalarType kWanted = scalar_type_of<T>();
    STD_TORCH_CHECK(tensor.scalar_type() == kWanted, op, ": ", name, " is ",
                    torch::headeronly::toString(tensor.scalar_type()), ", wanted ",
                    torch::headeronly::toString(kWanted));
    layout(tensor, name, shape);
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  template <class T>
  const T* data(const MaybeTensor& tensor, const char* name, const std::vector<int64_t>& shape) const {
    return tensor.has_value() ? data<T>(*tensor, name, shape) : nullptr;
  }

  void layout(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) const {
    STD_TORCH_CHECK(has_shape(tensor, shape), op, ": ", name, " has another shape than its companions need");
    STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous");
    device(tensor, name);
  }

  // Offsets inside an image are of 32 bits on CUDA.
  void short_offsets(int64_t elements, int bits, const char* name) const {
    STD_TORCH_CHECK(!first.is_cuda() || elements < (int64_t{1} << bits), op, ": the ", name, " of one image have ",
                    elements, " elements, wanted fewer than 2^", bits);
  }

  Labels labels(const Tensor& tensor, const Shape& shape, int64_t ignore_index) const {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::Byte, op,
                    ": labels are ", torch::headeronly::toString(type), ", wanted int64, int32 or uint8");
    short_offsets(shape.pixels(), 30, "labels");
    layout(tensor, "labels", {shape.batch, shape.height, shape.width});
    const LabelType known = type == ScalarType::Long  ? LabelType::kInt64
                            : type == ScalarType::Int ? LabelType::kInt32
                                                      : LabelType::kUInt8;
    return {tensor.const_data_ptr(), known, ignore_index};
  }

  // The first tensor as logits, and their labels.
  Input input(const Tensor& labels_of_logits, int64_t ignore_index, bool align_corners) const {
    const ScalarType type = first.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op,
                    ": logits are ", torch::headeronly::toString(type), ", wanted float32, float16 or bfloat16");
    const FloatType known = type == ScalarType::Float  ? FloatType::kFloat32
                            : type == ScalarType::Half ? FloatType::kFloat16
                                                       : FloatType::kBFloat16;
    dimensions(first, 4, "logits");
    dimensions(labels_of_logits, 3, "labels");
    const Shape shape{first.size(0), first.size(1), labels_of_logits.size(1), labels_of_logits.size(2)};
    STD_TORCH_CHECK(shape.channels > 0 && shape.channels <= kMaxClasses, op, ": logits have ", shape.channels,
                    " channels, wanted 1 to ", kMaxClasses);
    STD_TORCH_CHECK(is_nchw(first) || is_nhwc(first), op, ": logits are neither contiguous nor channels_last");
    const Planes logits{first.const_data_ptr(), known, !is_nchw(first), first.size(2), first.size(3)};
    STD_TORCH_CHECK(logits.pixels() > 0 || shape.pixels() == 0, op,
                    ": logits have no pixel, wanted at least one for labels that have");
    short_offsets(shape.channels * logits.pixels(), 31, "logits");
    return {shape, logits, labels(labels_of_logits, shape, ignore_index), align_corners};
  }

  void* gradient(const Tensor& grad, const Input& input) const {
    const Planes& logits = input.logits;
    STD_TORCH_CHECK(grad.scalar_type() == first.scalar_type() &&
                        has_shape(grad, {input.shape.batch, input.shape.channels, logits.height, logits.width}) &&
                        (logits.channels_last ? is_nhwc(grad) : is_nchw(grad)),
                    op, ": grad differs from logits in dtype, shape or memory layout");
    device(grad, "grad");
    return grad.mutable_data_ptr();
  }

  // A choice that crosses the schema as an integer; `count` of them exist.
  template <class Enum>
  Enum choice(int64_t value, int64_t count, const char* name) const {
    STD_TORCH_CHECK(value >= 0 && value < count, op, ": ", name, " is ", value, ", wanted 0 to ", count - 1);
    return static_cast<Enum>(value);
  }

  // For numbers that have to lie in [low, high]; NaN does not.
  template <class T>
  T number(T value, double low, double high, const char* name) const {
    const auto wide = static_cast<double>(value);
    STD_TORCH_CHECK(wide >= low && wide <= high, op, ": ", name, " is ", value, ", wanted a number from ", low, " to ",
                    high);
    return value;
  }

  // What is written must not lie where something else is still to be read. The tensors are dense.
  void apart(const Tensor& written, std::initializer_list<MaybeTensor> read, const char* name) const {
    const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
    const auto end = [&](const Tensor& t) { return begin(t) + t.numel() * static_cast<int64_t>(t.element_size()); };
    for (const MaybeTensor& other : read) {
      if (!other.has_value() || other->numel() == 0 || written.numel() == 0) continue;
      STD_TORCH_CHECK(end(*other) <= begin(written) || end(written) <= begin(*other), op, ": ", name,
                      " is written and overlaps a tensor that is read, wanted memory of its own");
    }
  }
};

}  // namespace eroseg
