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

  EROSEG_INLINE Tap at(int64_t position) const {
    if (from == size) return {position, 0.0f};
    float source;
    if (align_corners) {
      source =
          size > 1 ? static_cast<float>(from - 1) / static_cast<float>(size - 1) * static_cast<float>(position) : 0.0f;
    } else {
      const float scale = static_cast<float>(from) / static_cast<float>(size);
      source = scale * (static_cast<float>(position) + 0.5f) - 0.5f;
      source = source < 0.0f ? 0.0f : source;
    }
    const auto whole = static_cast<int64_t>(source);
    const int64_t index = whole < from ? whole : from - 1;
    const float next = source - static_cast<float>(index);
    return {index, next < 1.0f ? next : 1.0f};
  }

  // The first position whose index is at least that; `size` if there is none.
  EROSEG_INLINE int64_t first_at(int64_t index) const {
    int64_t position = 0;
    while (position < size && at(position).index < index) ++position;
    return position;
  }
};

}  // namespace eroseg
