// The arithmetic of a row of pixels in shared memory: reduced over the classes, and turned into its gradient where it
// stands.
//
// A thread has a word of neighbouring pixels (two of float32, four of 16 bits), or a part of their classes where
// `groups` threads share them. Nothing is kept in registers but a pixel's terms, so the number of classes is no
// template argument.
//
// The label's logit gives its place to the lowest finite number, whose exponential is 0: the loops over the classes
// need not ask which of them is the label.
//
// Invariants: all threads of a block call reduce and put together; a thread beyond the image or the strip takes part
// with no classes of its own. The order of every sum is fixed.
#pragma once

#include "staging.cuh"

namespace eroseg::cuda {

// What is left of a word's pixels after their reduction. Exponentials are relative to 2^scaled: the kernel computes
// exp(z - m) as 2^(z log2(e) - scaled) with m the largest logit but the label's and scaled = m log2(e), rounded once,
// so S = sum over c != y of exp(z_c - m) comes out with a factor close to 1 that its gradient does not feel and the
// log-odds are corrected for.
template <int kPixels>
struct Terms {
  int label[kPixels];       // -1 on void pixels and beyond the image
  float log_odds[kPixels];  // L; NaN where logits are not finite
  bool right[kPixels];
  float norm[kPixels];  // sum over c != y of (exp(z_c - m) / S)^2
  // What Rows::put needs: exp(z_c - m) / S is factor * 2^(z_c log2(e) - power).
  struct Kept {
    int channel;  // the label's among this thread's; -1 if it is another group's or has none
    float power, factor;
  };
  Kept kept[kPixels];
};

// Shared memory that groups exchange through: two numbers for each of them, the label's logit and whether it is tied,
// for each pixel.
__host__ __device__ constexpr int exchanged_of_pixel(int groups) {
  return groups == 1 ? 0 : (2 * groups + 2) * static_cast<int>(sizeof(float));
}

template <class Type, Layout kLayout, bool kSquares>
class Rows {
 public:
  static constexpr int kPixels = Word<Type>::kElements;
  using Element = typename Type::Element;

  // `exchange` has exchanged_of_pixel for the pixels of all slots.
  __device__ __forceinline__ Rows(const Input& input, const Place& place, const Staging<Type, kLayout>& staging,
                                  int groups, unsigned char* exchange)
      : input_(input),
        place_(place),
        staging_(staging),
        exchange_(reinterpret_cast<float*>(exchange)),
        groups_(groups),
        channels_(static_cast<int>(input.shape.channels)),
        first_class_(static_cast<int>(input.shape.classes() - input.shape.channels)) {
    // The virtual class 0 of binary segmentation has no channel.
    first_channel_ = place.first < first_class_ ? 0 : place.first - first_class_;
    count_ = place.count - (place.count > 0 && place.first < first_class_ ? first_class_ : 0);
  }

  // Begins to bring the labels of row y of the image, if there is one, to the L2: its reduction waits for them.
  __device__ __forceinline__ void prefetch_labels(int y) const {
    if (y < 0 || y >= static_cast<int>(input_.shape.height) || place_.pixels == 0 || place_.group > 0) return;
    with_labels(input_.labels, [&](const auto* data) { prefetch(data + place_.index(y)); });
  }

  // Reduces row y, which stands in stage s. Pixels whose logits are not finite are set to 0 there.
  __device__ __forceinline__ Terms<kPixels> reduce(int y, int s) {
    Terms<kPixels> terms;
    Element* const row = own_part(y, s);
    read_labels(input_.labels, first_class_ + channels_, place_.index(y), place_.pixels, terms.label);
    int channel[kPixels];
    float of_label[kPixels], virtual_logit[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      channel[v] = channel_here(terms.label[v]);
      of_label[v] = 0.0f;
      if (channel[v] >= 0) {
        Element& element = row[offset_of(v, channel[v])];
        of_label[v] = Type::to_float(element);
        element = Type::kLowestFinite;
      }
      virtual_logit[v] = first_class_ > 0 && terms.label[v] != 0 ? 0.0f : -kInf;
    }

    float largest[kPixels], lowest[kPixels];
    bool is_tied[kPixels], is_any_tied = false;
    find_extremes(row, largest, lowest);
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
    if (groups_ > 1) exchange_maxima(terms.label, channel, of_label, is_tied, largest);

    float gap[kPixels], scaled[kPixels], sum[kPixels], squares[kPixels];
    bool is_any_huge = false;
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      gap[v] = of_label[v] - largest[v];
      terms.right[v] = terms.label[v] >= 0 && gap[v] >= 0.0f && !is_tied[v];
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
      // The sum is not a number if a logit is NaN or +inf, but would not feel -inf.
      if (lowest[v] == -kInf || of_label[v] - of_label[v] != 0.0f) sum[v] = not_a_number();
      squares[v] = kSquares ? sum[v] * sum[v] : 0.0f;
    }
    for_each(row, [&](int v, float z) {
      const float e = exp2_approx(fmaf(z, kLog2E, -scaled[v]));
      sum[v] += e;
      if constexpr (kSquares) squares[v] = fmaf(e, e, squares[v]);
    });
    if (groups_ > 1) {
      exchange_sums(sum);
      if constexpr (kSquares) {
        __syncthreads();  // all have read the sums
        exchange_sums(squares);
      }
    }

    bool is_all_finite = true;
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      const bool finite = sum[v] == sum[v];
      is_all_finite = is_all_finite && finite;
      const float power_of_sum = log2_approx(sum[v]);
      const float error = fmaf(largest[v], kLog2E, -scaled[v]);  // of the sum, as a power of 2
      terms.log_odds[v] = finite ? gap[v] - (power_of_sum - error) * kLn2 : not_a_number();
      terms.norm[v] = squares[v] / (sum[v] * sum[v]);
      // Numbers of 16 bits allow the factor to be a summand of the exponent: one operation less for each logit.
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
#pragma unroll 1
        for (int c = 0; c < count_; ++c) row[offset_of(v, c)] = to_element<Type>(0.0f);
      }
    }
    return terms;
  }

  // Turns row y in stage s into weight * dl/dz, or minus that if is_negative. Weights are not negative; 0 gives zeros.
  __device__ __forceinline__ void put(int y, int s, const typename Terms<kPixels>::Kept (&kept)[kPixels],
                                      const float (&weight)[kPixels], bool is_negative) {
    Element* const row = own_part(y, s);
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
      transform(row, [&](int v, float z) { return -magnitude(v, z); });
    } else {
      transform(row, magnitude);
    }
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      if (kept[v].channel >= 0) {
        row[offset_of(v, kept[v].channel)] = to_element<Type>(is_negative ? weight[v] : -weight[v]);
      }
    }
  }

 private:
  static constexpr bool kScalesExponent = sizeof(Element) == 2;
  // Beyond this, z log2(e) - scaled would be off by more than it is; 1443, 2^-14 of which is an exponent's last bit,
  // where it has a summand more. And far from the lowest finite number, which must have no exponential left.
  static constexpr float kHuge = kScalesExponent ? 1e3f : 1e6f;

  // This thread's pixels and classes of row y in stage s.
  __device__ __forceinline__ Element* own_part(int y, int s) const {
    return staging_.at(y, s, place_.x, first_channel_);
  }

  __device__ __forceinline__ int offset_of(int pixel, int channel) const { return staging_.offset_of(pixel, channel); }

  // The label among this thread's channels; -1 if it is another group's or has none, or the pixel is void.
  __device__ __forceinline__ int channel_here(int label) const {
    const int channel = label - first_class_ - first_channel_;
    return label >= first_class_ && channel >= 0 && channel < count_ ? channel : -1;
  }

  // The largest and the lowest of this thread's logits for each pixel, whatever NaN there may be among them.
  __device__ __forceinline__ void find_extremes(const Element* row, float (&largest)[kPixels],
                                                float (&lowest)[kPixels]) const {
    if constexpr (kLayout == Layout::kPlanes) {
      Word<Type> high{{Type::kMinusInf, Type::kMinusInf}}, low{{Type::kPlusInf, Type::kPlusInf}};
#pragma unroll 4
      for (int c = 0; c < count_; ++c) {
        const Word<Type> word = *reinterpret_cast<const Word<Type>*>(row + c * offset_of(0, 1));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          high.halves[h] = Type::larger(high.halves[h], word.halves[h]);
          low.halves[h] = Type::smaller(low.halves[h], word.halves[h]);
        }
      }
      high.unpack(largest);
      low.unpack(lowest);
    } else {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) largest[v] = -kInf, lowest[v] = kInf;
      for_each(row, [&](int v, float z) {
        largest[v] = fmaxf(largest[v], z);
        lowest[v] = fminf(lowest[v], z);
      });
    }
  }

  // Calls f(v, z) for pixel v of the word and its logit z, for all of this thread's classes.
  template <class F>
  __device__ __forceinline__ void for_each(const Element* row, const F& f) const {
    transform_or_visit<false>(const_cast<Element*>(row), [&](int v, float z) { return f(v, z), z; });
  }

  // Puts f(v, z) in the place of z.
  template <class F>
  __device__ __forceinline__ void transform(Element* row, const F& f) const {
    transform_or_visit<true>(row, f);
  }

  template <bool kWrite, class F>
  __device__ __forceinline__ void transform_or_visit(Element* row, const F& f) const {
    constexpr int kElements = Word<Type>::kElements;
    if constexpr (kLayout == Layout::kPlanes) {
      over_words<kWrite>(row, count_, offset_of(0, 1), f);
    } else {
      // A pixel's classes begin and end anywhere within a word.
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        Element* at = row + v * channels_;
        const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(at) / sizeof(Element)) % kElements;
        const int to_boundary = (kElements - misaligned) % kElements;
        const int head = to_boundary < count_ ? to_boundary : count_;
        const int words = (count_ - head) / kElements;
        const auto one = [&](int c) {
          const float result = f(v, Type::to_float(at[c]));
          if constexpr (kWrite) at[c] = to_element<Type>(result);
        };
#pragma unroll 1
        for (int c = 0; c < head; ++c) one(c);
        over_words<kWrite>(at + head, words, kElements, [&](int, float z) { return f(v, z); });
#pragma unroll 1
        for (int c = head + words * kElements; c < count_; ++c) one(c);
      }
    }
  }

  // Calls f(i, value) for the values of n words that begin `stride` elements apart, i being their place in the word,
  // and puts the results in their places if kWrite.
  template <bool kWrite, int kAtOnce = 4, class F>
  static __device__ __forceinline__ void over_words(Element* at, int n, int stride, const F& f) {
#pragma unroll 1
    for (; n >= kAtOnce; n -= kAtOnce, at += kAtOnce * stride) over_some_words<kAtOnce, kWrite>(at, stride, f);
    if constexpr (kAtOnce > 1) over_words<kWrite, kAtOnce / 2>(at, n, stride, f);
  }

  // All are read before the first is written: one after the other, each would wait for the one before, since the
  // compiler cannot know that they are different places.
  template <int kCount, bool kWrite, class F>
  static __device__ __forceinline__ void over_some_words(Element* at, int stride, const F& f) {
    Word<Type> words[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) words[k] = *reinterpret_cast<const Word<Type>*>(at + k * stride);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      float value[Word<Type>::kElements];
      words[k].unpack(value);
#pragma unroll
      for (int i = 0; i < Word<Type>::kElements; ++i) value[i] = f(i, value[i]);
      if constexpr (kWrite) words[k] = Word<Type>::pack(value);
    }
    if constexpr (kWrite) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) *reinterpret_cast<Word<Type>*>(at + k * stride) = words[k];
    }
  }

  // Whether a class of this thread's below the label's has its logit, too.
  __device__ __forceinline__ bool has_below(const Element* row, int v, int channel, float of_label) const {
#pragma unroll 1
    for (int c = 0; c < channel; ++c) {
      if (Type::to_float(row[offset_of(v, c)]) == of_label) return true;
    }
    return false;
  }

  // Subtracts from pixel v in all classes but the label's. Huge logits differ by 0 or by so much that no exponential is
  // left of the lower one: it does not matter that the difference is rounded.
  __device__ __forceinline__ void shift(Element* row, int v, int channel, float by) const {
#pragma unroll 1
    for (int c = 0; c < count_; ++c) {
      Element& element = row[offset_of(v, c)];
      if (c != channel) element = to_element<Type>(Type::to_float(element) - by);
    }
  }

  // Shared memory between groups: [groups] maxima, [groups] sums, the label's logit and whether it is tied, each for
  // every pixel of the row. Of the last two only the label's group knows what to write.
  __device__ __forceinline__ float& shared_value(int part, int v) {
    return exchange_[(part * static_cast<int>(blockDim.x) + place_.slot) * kPixels + v];
  }

  __device__ __forceinline__ void exchange_maxima(const int (&label)[kPixels], const int (&channel)[kPixels],
                                                  float (&of_label)[kPixels], bool (&is_tied)[kPixels],
                                                  float (&largest)[kPixels]) {
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      shared_value(place_.group, v) = largest[v];
      if (channel[v] >= 0) {
        shared_value(2 * groups_, v) = of_label[v];
        shared_value(2 * groups_ + 1, v) = is_tied[v] ? 1.0f : 0.0f;
      }
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      of_label[v] = label[v] >= 0 ? shared_value(2 * groups_, v) : 0.0f;
      is_tied[v] = label[v] >= 0 && shared_value(2 * groups_ + 1, v) != 0.0f;
      largest[v] = -kInf;
    }
    const int per = (channels_ + groups_ - 1) / groups_;
    for (int group = 0; group < groups_; ++group) {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        const float of_group = shared_value(group, v);
        largest[v] = fmaxf(largest[v], of_group);
        is_tied[v] = is_tied[v] || (group * per + per <= label[v] && of_group == of_label[v]);
      }
    }
  }

  // Leaves the sum over the groups in all of them. The barrier before the reading orders the next exchange, too: who
  // writes maxima or sums again has passed one that all passed after reading these.
  __device__ __forceinline__ void exchange_sums(float (&sum)[kPixels]) {
#pragma unroll
    for (int v = 0; v < kPixels; ++v) shared_value(groups_ + place_.group, v) = sum[v];
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kPixels; ++v) sum[v] = 0.0f;
    for (int group = 0; group < groups_; ++group) {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) sum[v] += shared_value(groups_ + group, v);
    }
  }

  const Input& input_;
  const Place& place_;
  const Staging<Type, kLayout>& staging_;
  float* exchange_;
  int groups_, channels_, first_class_;
  int first_channel_, count_;
};

}  // namespace eroseg::cuda
