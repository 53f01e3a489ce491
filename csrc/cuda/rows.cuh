// The arithmetic of a row of pixels in shared memory: it is reduced over the classes, and turned into its gradient in
// place.
//
// A thread has a vector of neighbouring pixels (two of float32, four of 16 bits), in all classes or in a slice of them
// (class_slice.cuh).
// Nothing is kept in registers but a pixel's terms, so the number of classes is no template argument.
//
// The lowest finite number, whose exponential is 0, replaces the label's logit: the loops over the classes need not
// compare each of them with the label.
//
// Invariants: all threads of a warp call reduce together; a thread beyond the image or the tile takes part with no
// classes of its own. The order of every sum is fixed.
#pragma once

#include "class_slice.cuh"

namespace eroseg::cuda {

// What the reduction leaves of a vector's pixels. Exponentials are relative to 2^scaled: the kernel computes
// exp(z - m) as 2^(z log2(e) - scaled) with m the largest logit but the label's and scaled = m log2(e), rounded once,
// which multiplies S = sum over c != y of exp(z_c - m) by a factor close to 1: it cancels in the gradient, and the
// log-odds are corrected for it.
template <int kPixels>
struct Terms {
  int label[kPixels];       // -1 on void pixels and beyond the image
  float log_odds[kPixels];  // L; NaN where logits are not finite
  bool correct[kPixels];
  float norm[kPixels];  // sum over c != y of (exp(z_c - m) / S)^2
  // What Rows::put needs: exp(z_c - m) / S is factor * 2^(z_c log2(e) - power).
  struct Kept {
    int channel;  // the label's; -1 if another thread has it or there is none
    float power, factor;
  };
  Kept kept[kPixels];
};

template <class Type, bool kSquares>
class Rows {
 public:
  static constexpr int kPixels = Vector<Type>::kElements;
  using Element = typename Type::Element;

  __device__ __forceinline__ Rows(const Input& input, const RowsPlan& plan, const ThreadTile& tile)
      : input_(input), tile_(tile), groups_(plan.tiles.groups), slice_(tile, plan, input.shape) {}

  // Begins to load the labels of row y of the image, if there is one, into the L2, before its reduction needs them.
  __device__ __forceinline__ void prefetch_labels(int y) const {
    if (y < 0 || y >= static_cast<int>(input_.shape.height) || tile_.pixels == 0 || tile_.group > 0) return;
    with_labels(input_.labels, [&](const auto* data) { prefetch(data + tile_.index(y)); });
  }

  // Reduces row y, which stands at `row` beginning with the thread's pixels, and finds its signed confidences of the
  // wanted kind: +inf of void pixels, NaN where logits are not finite.
  __device__ __forceinline__ Terms<kPixels> reduce(int y, Element* row, Confidence kind, float (&confidence)[kPixels]) {
    const bool is_top = kind == Confidence::kTop;
    if (is_top) find_top_confidences(row, confidence);
    const Terms<kPixels> terms = reduce(y, row);
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      const float log_odds = terms.log_odds[v];
      if (!is_top || log_odds != log_odds) {
        confidence[v] = kind == Confidence::kLabel && terms.correct[v] ? fmaxf(log_odds, 0.0f) : log_odds;
      } else if (!terms.correct[v]) {
        confidence[v] = -confidence[v];
      }
      if (terms.label[v] < 0) confidence[v] = kInf;
    }
    return terms;
  }

  // Reduces row y, which stands at `row`. Pixels whose logits are not finite are set to 0 there.
  __device__ __forceinline__ Terms<kPixels> reduce(int y, Element* row) {
    Terms<kPixels> terms;
    read_labels(input_.labels, static_cast<int>(input_.shape.classes()), tile_.index(y), tile_.pixels, terms.label);
    int channel[kPixels];
    float of_label[kPixels], virtual_logit[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      channel[v] = slice_.channel_of(terms.label[v]);
      of_label[v] = 0.0f;
      if (channel[v] >= 0) {
        Element& element = slice_.at(row, v, channel[v]);
        of_label[v] = Type::to_float(element);
        element = Type::kLowestFinite;
      }
      virtual_logit[v] = slice_.first_class() > 0 && terms.label[v] != 0 ? 0.0f : -kInf;
    }

    float largest[kPixels];
    bool is_tied[kPixels], is_any_tied = false;
    slice_.find_largest(row, largest);
    // On ties the lowest class is the arg max.
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      largest[v] = fmaxf(largest[v], virtual_logit[v]);
      is_tied[v] = channel[v] >= 0 && of_label[v] == largest[v];
      is_any_tied = is_any_tied || is_tied[v];
    }
    if (is_any_tied) {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        is_tied[v] = is_tied[v] && (of_label[v] == virtual_logit[v] || has_below(row, v, channel[v], of_label[v]));
      }
    }
    if (groups_ > 1) merge_maxima(terms.label, channel, of_label, is_tied, largest);

    float gap[kPixels], scaled[kPixels], sum[kPixels], squares[kPixels];
    bool is_any_huge = false;
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      gap[v] = of_label[v] - largest[v];
      terms.correct[v] = terms.label[v] >= 0 && gap[v] >= 0.0f && !is_tied[v];
      is_any_huge = is_any_huge || absolute(largest[v]) > kHuge;
    }
    if (is_any_huge) {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        if (absolute(largest[v]) > kHuge) {
          shift(row, v, channel[v], largest[v]);
          virtual_logit[v] -= largest[v];
          largest[v] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      scaled[v] = largest[v] * kLog2E;
      sum[v] = exp2_approx(fmaf(virtual_logit[v], kLog2E, -scaled[v]));
      // Another logit that is NaN or +inf makes the sum NaN by itself; -inf adds 0.
      if (of_label[v] - of_label[v] != 0.0f) sum[v] = not_a_number();
      squares[v] = kSquares ? sum[v] * sum[v] : 0.0f;
    }
    slice_.for_each(row, [&](int v, float z) {
      const float e = exp2_approx(fmaf(z, kLog2E, -scaled[v]));
      sum[v] += e;
      if constexpr (kSquares) squares[v] = fmaf(e, e, squares[v]);
    });
    if (groups_ > 1) {
      merge_sums(sum);
      if constexpr (kSquares) merge_sums(squares);
    }

    bool is_all_finite = true;
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      if (sum[v] == 0.0f) sum[v] = not_a_number();  // -inf in all classes but the label
      const bool finite = sum[v] == sum[v];
      is_all_finite = is_all_finite && finite;
      terms.correct[v] = terms.correct[v] && finite;
      const float power_of_sum = log2_approx(sum[v]);
      const float error = fmaf(largest[v], kLog2E, -scaled[v]);  // of the sum, as a power of 2
      terms.log_odds[v] = finite ? gap[v] - (power_of_sum - error) * kLn2 : not_a_number();
      terms.norm[v] = squares[v] / (sum[v] * sum[v]);
      // The precision of 16 bits allows the factor to be added to the exponent: one operation less for each logit.
      terms.kept[v] = {channel[v], scaled[v], 1.0f};
      if constexpr (kScalesExponent) {
        terms.kept[v].power += power_of_sum;
      } else {
        terms.kept[v].factor = reciprocal(sum[v]);
      }
    }
    if (!is_all_finite) {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        if (sum[v] == sum[v]) continue;
        terms.kept[v] = {channel[v], 0.0f, 1.0f};
        slice_.each_channel([&](int c) {
          slice_.at(row, v, c) = to_element<Type>(0.0f);
          return true;
        });
      }
    }
    return terms;
  }

  // Turns a row that has been reduced into weight * dl/dz, or minus that if is_negative. Weights are not negative; 0
  // gives zeros.
  __device__ __forceinline__ void put(Element* row, const typename Terms<kPixels>::Kept (&kept)[kPixels],
                                      const float (&weight)[kPixels], bool is_negative) {
    float power[kPixels], scale[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      power[v] = kept[v].power - (kScalesExponent ? log2_approx(weight[v]) : 0.0f);
      scale[v] = kScalesExponent ? 1.0f : kept[v].factor * weight[v];
    }
    const auto magnitude = [&](int v, float z) {
      const float e = exp2_approx(fmaf(z, kLog2E, -power[v]));
      return kScalesExponent ? e : e * scale[v];
    };
    if (is_negative) {
      slice_.transform(row, [&](int v, float z) { return -magnitude(v, z); });
    } else {
      slice_.transform(row, magnitude);
    }
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      if (kept[v].channel >= 0) {
        slice_.at(row, v, kept[v].channel) = to_element<Type>(is_negative ? weight[v] : -weight[v]);
      }
    }
  }

 private:
  static constexpr bool kScalesExponent = sizeof(Element) == 2;
  // Larger logits are shifted first: beyond this the exponent loses its low bits. It must stay far below kLowestFinite,
  // whose exponential has to be 0.
  static constexpr float kHuge = kScalesExponent ? 1e3f : 1e6f;

  // Log-odds of the largest logit, plus log(C - 1), not below 0. Exponentials are relative to the second largest logit.
  // The sum includes the largest one, clamped to 1, which is subtracted afterwards: the sum is at least 2, so that
  // costs no precision.
  __device__ __forceinline__ void find_top_confidences(const Element* row, float (&confidence)[kPixels]) const {
    const float virtual_logit = slice_.first_class() > 0 ? 0.0f : -kInf;
    float largest[kPixels], second[kPixels], sum[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) largest[v] = virtual_logit, second[v] = -kInf;
    slice_.for_each(row, [&](int v, float z) {
      second[v] = fmaxf(second[v], fminf(largest[v], z));
      largest[v] = fmaxf(largest[v], z);
    });
#pragma unroll 1
    for (int offset = 1; offset < groups_; offset *= 2) {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        const float other = __shfl_xor_sync(kAllLanes, largest[v], offset);
        second[v] = fmaxf(fmaxf(second[v], __shfl_xor_sync(kAllLanes, second[v], offset)), fminf(largest[v], other));
        largest[v] = fmaxf(largest[v], other);
      }
    }
    const auto relative = [&](int v, float z) { return exp2_approx(fminf((z - second[v]) * kLog2E, 0.0f)); };
#pragma unroll
    for (int v = 0; v < kPixels; ++v) sum[v] = slice_.first_class() > 0 ? relative(v, virtual_logit) : 0.0f;
    slice_.for_each(row, [&](int v, float z) { sum[v] += relative(v, z); });
    if (groups_ > 1) merge_sums(sum);
    const float log_of_others = log2_approx(static_cast<float>(input_.shape.classes() - 1));
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      const float log_odds = largest[v] - second[v] - (log2_approx(sum[v] - 1.0f) - log_of_others) * kLn2;
      confidence[v] = fmaxf(log_odds, 0.0f);
    }
  }

  // Whether one of this thread's classes below the label has the label's logit.
  __device__ __forceinline__ bool has_below(Element* row, int v, int label_channel, float of_label) const {
    bool found = false;
    slice_.each_channel([&](int c) {
      found = c < label_channel && Type::to_float(slice_.at(row, v, c)) == of_label;
      return c < label_channel && !found;
    });
    return found;
  }

  // Subtracts from pixel v in all classes but the label's. Huge logits are equal, or so far apart that the exponential
  // of the lower one is 0: it does not matter that their difference is rounded.
  __device__ __forceinline__ void shift(Element* row, int v, int label_channel, float by) const {
    slice_.each_channel([&](int c) {
      Element& element = slice_.at(row, v, c);
      if (c != label_channel) element = to_element<Type>(Type::to_float(element) - by);
      return true;
    });
  }

  // Combines what the threads of a vector know about its pixels, each from its own classes.
  __device__ __forceinline__ void merge_maxima(const int (&label)[kPixels], const int (&channel)[kPixels],
                                               float (&of_label)[kPixels], bool (&is_tied)[kPixels],
                                               float (&largest)[kPixels]) const {
    const int first_lane = thread_of_block() % kWarp - tile_.group;
    const unsigned own_lanes = ((1u << groups_) - 1) << first_lane;
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      const int group = label[v] < 0 ? tile_.group : slice_.group_of(label[v]);
      of_label[v] = __shfl_sync(kAllLanes, of_label[v], first_lane + group);
      if (channel[v] < 0) is_tied[v] = tile_.group < group && largest[v] == of_label[v];
      is_tied[v] = (__ballot_sync(kAllLanes, is_tied[v]) & own_lanes) != 0;
    }
    merge(largest, [](float a, float b) { return fmaxf(a, b); });
  }

  __device__ __forceinline__ void merge_sums(float (&sum)[kPixels]) const {
    merge(sum, [](float a, float b) { return a + b; });
  }

  // f has to be commutative: the result is the same in all threads.
  template <class T, class F>
  __device__ __forceinline__ void merge(T (&value)[kPixels], const F& f) const {
#pragma unroll 1
    for (int offset = 1; offset < groups_; offset *= 2) {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) value[v] = f(value[v], __shfl_xor_sync(kAllLanes, value[v], offset));
    }
  }

  const Input& input_;
  const ThreadTile& tile_;
  const int groups_;
  ClassSlice<Type> slice_;
};

// For kernels whose pixels need no neighbours: goes over the tile's rows, and calls f(y, stage) when row y has arrived
// in that stage and the next row is being fetched.
constexpr int kStagesOfSingleRows = 2;

template <class Staging, class Rows, class F>
__device__ __forceinline__ void for_each_row(const ThreadTile& tile, Staging& staging, const Rows& rows, const F& f) {
  staging.fetch(tile.begin, 0);
  for (int y = tile.begin, stage = 0; y < tile.end; ++y, stage = 1 - stage) {
    staging.arrive();
    if (y + 1 < tile.end) {
      staging.fetch(y + 1, 1 - stage);
      rows.prefetch_labels(y + 1);
    }
    f(y, stage);
  }
}

}  // namespace eroseg::cuda
