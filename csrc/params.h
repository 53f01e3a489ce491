// The parameters of the operations as plain pointers and numbers, for the CPU and the CUDA kernels alike.
#pragma once

#include <cstdint>

#include "interpolation.h"
#include "pixel_math.h"
#include "tau.h"

namespace eroseg {

enum class FloatType { kFloat32, kFloat16, kBFloat16 };
enum class LabelType { kInt64, kInt32, kUInt8 };

// [B, C, height, width] logits, dense, either NCHW or channels_last; their gradient lies in the same way.
struct Planes {
  const void* data;
  FloatType type;
  bool channels_last;
  int64_t height, width;
  EROSEG_INLINE int64_t pixels() const { return height * width; }
};

// The image batch that an operation runs over, at the labels' resolution.
struct Shape {
  int64_t batch, channels, height, width;
  // One-logit binary segmentation has a class 0 whose logit is the constant 0.
  EROSEG_INLINE int64_t classes() const { return channels == 1 ? 2 : channels; }
  EROSEG_INLINE int64_t pixels() const { return height * width; }
};

// Whether a label or a predicted class is one of the classes 0 to `classes` - 1.
EROSEG_INLINE bool is_class(int64_t value, int64_t classes) {
  return static_cast<uint64_t>(value) < static_cast<uint64_t>(classes);
}

struct Labels {
  const void* data;  // [B, H, W], dense
  LabelType type;
  int64_t ignore_index;
};

// What every operation on logits reads. Logits of another size stand for their bilinear interpolation.
struct Input {
  Shape shape;
  Planes logits;
  Labels labels;
  bool align_corners;
  EROSEG_INLINE bool interpolates() const { return logits.height != shape.height || logits.width != shape.width; }
  EROSEG_INLINE Axis rows() const { return {logits.height, shape.height, align_corners}; }
  EROSEG_INLINE Axis columns() const { return {logits.width, shape.width, align_corners}; }
};

struct ErosionGrad {
  Input input;
  const float* tau;           // [B]
  const float* previous;      // [B, H, W] or null
  const float* class_weight;  // [B, classes] or null
  Confidence confidence;
  Front front;
  Direction direction;
  int radius;
  float slope;
  bool targeted;
  void* grad;       // like the logits
  float* log_odds;  // [B, H, W]
};

struct PixelGrad {
  Input input;
  MethodSettings method;
  const float* class_weight;  // [B, classes] or null
  void* grad;                 // like the logits
};

struct ConfidenceMap {
  Input input;
  Confidence confidence;
  float* out;  // [B, H, W]
};

struct Confusion {
  Input input;
  const int64_t* prediction;  // [B, H, W], or null: arg max of the logits
  int64_t classes;
  int64_t* counts;  // [classes, classes], to which the matrix is added
};

// [batch, n] rows of scores; valid may be null.
struct Scores {
  const float* scores;
  const bool* valid;
  int64_t batch, n;
};

struct KthValue : Scores {
  const int64_t* k;  // [batch, count]
  int64_t count;
  float* out;  // [batch, count]
};

struct NextTau : Scores {
  const double* stats;  // [batch, 4]
  TauSettings settings;
  float* tau;  // [batch]
};

// [B, K, H, W] images, all of one dense layout; steps change x_adv in place.
struct Step {
  float* x_adv;
  const float* x;
  const float* grad;
  const bool* mask;  // [B, 1, H, W] dense, or null
  int64_t batch, channels, pixels;
  bool channels_last;
  float eps, alpha, low, high;
  EROSEG_INLINE int64_t elements() const { return channels * pixels; }
  // Whether element i of an image may change; not to be called without a mask.
  EROSEG_INLINE bool is_inside(int64_t image, int64_t i) const {
    return mask[image * pixels + (channels_last ? i / channels : i % pixels)];
  }
};

}  // namespace eroseg
