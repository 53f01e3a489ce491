// The logits of pixels that lie between the logits in memory.
#pragma once

#include "types.cuh"

namespace eroseg::cuda {

// The value between two, the second of which weighs `next`. One that is not finite spoils it even where it weighs 0.
__device__ __forceinline__ float between(float first, float second, float next) {
  return fmaf(first, 1.0f - next, second * next);
}

// Four neighbouring logits of a class: on the left and on the right.
struct Corners {
  float above[2], below[2];
  // The values above and below of a column of pixels between them.
  __device__ __forceinline__ void in_column(float next, float (&out)[2]) const {
    out[0] = between(above[0], above[1], next);
    out[1] = between(below[0], below[1], next);
  }
};

// Those of every class, the first at (y, x). The last row and the last column stand for those behind them.
template <class Type>
class AllCorners {
 public:
  __device__ __forceinline__ AllCorners(const Input& input, int64_t image, int y, int x) {
    const Planes& logits = input.logits;
    const int channels = static_cast<int>(input.shape.channels), width = static_cast<int>(logits.width);
    const int pixel_stride = logits.channels_last ? channels : 1;
    class_stride_ = logits.channels_last ? 1 : static_cast<int>(logits.pixels());
    at_ =
        static_cast<const Element*>(logits.data) + image * channels * logits.pixels() + (y * width + x) * pixel_stride;
    right_ = x + 1 < width ? pixel_stride : 0;
    down_ = y + 1 < static_cast<int>(logits.height) ? width * pixel_stride : 0;
  }

  __device__ __forceinline__ Corners operator()(int channel) const {
    const Element* at = at_ + channel * class_stride_;
    return {{Type::to_float(at[0]), Type::to_float(at[right_])},
            {Type::to_float(at[down_]), Type::to_float(at[down_ + right_])}};
  }

 private:
  using Element = typename Type::Element;
  const Element* at_;
  int class_stride_, right_, down_;
};

// The logits of a pixel of the labels.
template <class Type>
class InterpolatedPixel {
 public:
  __device__ __forceinline__ InterpolatedPixel(const Input& input, int64_t image, int pixel)
      : InterpolatedPixel(input, image, input.rows().at(pixel / static_cast<int>(input.shape.width)),
                          input.columns().at(pixel % static_cast<int>(input.shape.width))) {}

  __device__ __forceinline__ float operator()(int channel) const {
    float ends[2];
    corners_(channel).in_column(next_column_, ends);
    return between(ends[0], ends[1], next_row_);
  }

 private:
  __device__ __forceinline__ InterpolatedPixel(const Input& input, int64_t image, Tap row, Tap column)
      : corners_(input, image, static_cast<int>(row.index), static_cast<int>(column.index)),
        next_row_(row.next),
        next_column_(column.next) {}

  AllCorners<Type> corners_;
  float next_row_, next_column_;
};

}  // namespace eroseg::cuda
