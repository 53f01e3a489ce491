// Where bilinear interpolation takes its values from, as torch's F.interpolate does; for the CPU and CUDA alike.
#pragma once

#include "pixel_math.h"

namespace eroseg {

// A position between the elements `index` and `index + 1`, the second weighing `next` and the first the rest. At the
// last element `index + 1` stands for it once more.
struct Tap {
  int64_t index;
  float next;
};

// One axis: `size` positions over `from` elements.
struct Axis {
  int64_t from, size;
  bool align_corners;

  EROSEG_INLINE float shift() const { return align_corners ? 0.0f : 0.5f; }

  EROSEG_INLINE float scale() const {
    if (!align_corners) return static_cast<float>(from) / static_cast<float>(size);
    return size > 1 ? static_cast<float>(from - 1) / static_cast<float>(size - 1) : 0.0f;
  }

  // The place of a position among the elements.
  EROSEG_INLINE float source(int64_t position) const {
    const float source = scale() * (static_cast<float>(position) + shift()) - shift();
    return source < 0.0f ? 0.0f : source;
  }

  // The weight of the element behind `index`, which a position lies behind.
  EROSEG_INLINE float next(int64_t position, int64_t index) const {
    const float next = source(position) - static_cast<float>(index);
    return next < 1.0f ? next : 1.0f;
  }

  EROSEG_INLINE Tap at(int64_t position) const {
    if (from == size) return {position, 0.0f};
    const auto whole = static_cast<int64_t>(source(position));
    const int64_t index = whole < from ? whole : from - 1;
    return {index, next(position, index)};
  }

  // The first position whose index is at least that; `size` if there is none.
  EROSEG_INLINE int64_t first_at(int64_t index) const {
    const float guess = (static_cast<float>(index) + shift()) / scale() - shift();
    int64_t position = guess >= static_cast<float>(size) ? size : guess > 0.0f ? static_cast<int64_t>(guess) : 0;
    while (position > 0 && at(position - 1).index >= index) --position;
    while (position < size && at(position).index < index) ++position;
    return position;
  }
};

}  // namespace eroseg
