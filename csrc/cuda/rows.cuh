// Rows of pixels in registers: read once, reduced over the classes, and their gradient written.
//
// A thread holds a word of neighbouring pixels (one of float32, two of 16 bits) for up to kPer classes, all in
// registers: the class loops are unrolled, so that every load of a row is issued before the first is used. With more
// than kPer classes, `groups` threads share a pixel; they exchange the maximum and the sum through shared memory.
// channels_last rows pass through shared memory as they lie in global memory, to be read and written in whole words of
// 16 bytes; from there on nothing differs.
//
// Invariants: all threads of a block call load, reduce and write together, since these have barriers; a thread beyond
// the image or the strip takes part with no pixels of its own. The order of every sum is fixed.
#pragma once

#include <type_traits>

#include "strips.h"
#include "types.cuh"

namespace eroseg::cuda {

// All groups but the last have so many classes.
__host__ __device__ constexpr int classes_of_group(int classes, int groups) { return (classes + groups - 1) / groups; }

// What a block works on, and a thread's part of it.
struct Place {
  int64_t image;
  int begin, end;    // own rows
  int left, width;   // own pixels of the strip
  int x;             // first pixel of this thread's word
  int slot;          // of the thread in the row
  bool own;          // whether the word belongs to the strip, not to its halo
  int group;         // of classes
  int first, count;  // the group's classes

  template <class Type>
  static __device__ __forceinline__ Place of(const Shape& shape, const Strips& strips) {
    constexpr int kPixels = Type::kPixels;
    Place place;
    const int64_t per_image = static_cast<int64_t>(strips.count) * strips.bands;
    const int within = static_cast<int>(blockIdx.x % per_image);
    place.image = blockIdx.x / per_image;
    const int band = within % strips.bands;
    const int height = static_cast<int>(shape.height), image_width = static_cast<int>(shape.width);
    place.begin = band * strips.rows;
    place.end = place.begin + strips.rows < height ? place.begin + strips.rows : height;
    place.left = within / strips.bands * strips.width;
    place.width = place.left + strips.width < image_width ? strips.width : image_width - place.left;

    // Own words first, so that they are aligned in memory; then the halo on the left, then the one on the right.
    place.slot = static_cast<int>(threadIdx.x);
    const int own_words = strips.width / kPixels, halo_words = strips.halo / kPixels;
    const int beyond = place.slot - own_words;
    place.own = beyond < 0;
    if (beyond < 0) {
      place.x = place.left + place.slot * kPixels;
    } else if (beyond < halo_words) {
      place.x = place.left - strips.halo + beyond * kPixels;
    } else if (beyond < 2 * halo_words) {
      place.x = place.left + strips.width + (beyond - halo_words) * kPixels;
    } else {
      // Of no strip: beyond the image, and beyond the strip's halo.
      const int after = place.left + strips.width + strips.halo;
      place.x = after < image_width ? image_width : after;
    }
    place.group = static_cast<int>(threadIdx.y);
    const int classes = static_cast<int>(shape.classes());
    const int per = classes_of_group(classes, strips.groups);
    place.first = place.group * per;
    place.count = classes - place.first < per ? classes - place.first : per;
    return place;
  }

  // How many of the word's pixels lie in the image: 0 to Type::kPixels.
  template <class Type>
  __device__ __forceinline__ int pixels(int image_width) const {
    const int n = x < 0 ? 0 : image_width - x;
    return n < 0 ? 0 : (n < Type::kPixels ? n : Type::kPixels);
  }
};

// What is left of a word's pixels after their reduction.
template <int kPixels>
struct Terms {
  int label[kPixels];       // -1 on void pixels and beyond the image
  float largest[kPixels];   // m, the largest logit but the label's; 0 where logits are not finite
  float sum[kPixels];       // S = sum over c != y of exp(z_c - m); 1 where logits are not finite
  float squares[kPixels];   // sum over c != y of exp(2 (z_c - m))
  float log_odds[kPixels];  // L; NaN where logits are not finite
  bool right[kPixels];
};

// Threads of a block at most: with two or three blocks on a multiprocessor, one reads while another computes.
constexpr int kMostThreads = 256;
constexpr int kMostGroups = kMostThreads / kWarp;
// A group's classes, preferably; with many classes, so many at most.
constexpr int kFewPer = 21, kMostPer = 32;
// More classes than this do not stay in registers.
constexpr int64_t kMostClasses = kMostGroups * kMostPer;

// Blocks that must fit on a multiprocessor: what the registers allow without spilling.
constexpr int resident_wanted(int per, bool channels_last) { return per <= kFewPer && !channels_last ? 2 : 1; }

inline bool fits_rows(const Shape& shape) { return shape.classes() <= kMostClasses; }

inline int groups_for(int64_t classes) {
  const int64_t groups = (classes + kFewPer - 1) / kFewPer;
  return static_cast<int>(groups <= kMostGroups ? groups : (classes + kMostPer - 1) / kMostPer);
}

// Calls f(Type{}, per, channels_last), the latter as integral constants, with `per` registers for a group's classes.
template <class F>
cudaError_t for_rows(const Input& input, const F& f) {
  const int classes = static_cast<int>(input.shape.classes());
  const int wanted = classes_of_group(classes, groups_for(classes));
  return for_type(input.logits.type, [&](auto type) {
    const auto with = [&](auto per) {
      return input.logits.channels_last ? f(type, per, std::true_type{}) : f(type, per, std::false_type{});
    };
    if (wanted <= 4) return with(std::integral_constant<int, 4>{});
    if (wanted <= 12) return with(std::integral_constant<int, 12>{});
    if (wanted <= 21) return with(std::integral_constant<int, 21>{});
    return with(std::integral_constant<int, kMostPer>{});
  });
}

// Shared memory for the exchange between groups, whole words of 16 bytes.
__host__ __device__ inline int exchange_bytes(const Strips& strips, int pixels_of_word) {
  const int pixels = strips.slots * pixels_of_word;
  return strips.groups == 1 ? 0 : (2 * strips.groups + 2) * pixels * static_cast<int>(sizeof(float));
}

// All shared memory of Rows: the exchange, then a staged row of channels_last logits, at any offset from 16 bytes.
inline int64_t rows_bytes(const Strips& strips, int pixels_of_word, const Input& input) {
  const int64_t size = input.logits.type == FloatType::kFloat32 ? 4 : 2;
  const int64_t staged = (strips.width + 2 * strips.halo) * input.shape.channels * size + 16;
  return exchange_bytes(strips, pixels_of_word) + (input.logits.channels_last ? staged : 0);
}

template <class Type, int kPer, bool kChannelsLast, bool kSquares>
class Rows {
 public:
  static constexpr int kPixels = Type::kPixels;
  using Element = typename Type::Element;

  // `memory` has rows_bytes and is aligned to 16 of them.
  __device__ __forceinline__ Rows(const Input& input, const Strips& strips, const Place& place, unsigned char* memory)
      : input_(input),
        place_(place),
        halo_(strips.halo),
        groups_(strips.groups),
        exchange_(reinterpret_cast<float*>(memory)),
        staging_(memory + exchange_bytes(strips, kPixels)),
        channels_(static_cast<int>(input.shape.channels)),
        first_class_(static_cast<int>(input.shape.classes() - input.shape.channels)),
        height_(static_cast<int>(input.shape.height)),
        width_(static_cast<int>(input.shape.width)),
        pixels_(place.pixels<Type>(width_)),
        image_(static_cast<const Element*>(input.logits.data) + place.image * channels_ * height_ * width_) {}

  // Reads row y of the image into registers.
  __device__ __forceinline__ void load(int y, uint32_t (&z)[kPer]) {
    if constexpr (kChannelsLast) {
      const int from = place_.left - halo_ < 0 ? 0 : place_.left - halo_;
      const int to = place_.left + place_.width + halo_ < width_ ? place_.left + place_.width + halo_ : width_;
      const Element* row = image_ + (static_cast<int64_t>(y) * width_ + from) * channels_;
      Element* staged = staged_like(row);
      copy<false>(const_cast<Element*>(row), staged, (to - from) * channels_);
      __syncthreads();
      read(staged + (place_.x - from) * channels_, channels_, 1, z);
    } else {
      read(image_ + y * width_ + place_.x, 1, height_ * width_, z);
    }
  }

  // Reduces the row in z; void pixels and pixels that are not finite are made harmless there: their gradient comes out
  // as 0 if their weight is 0.
  __device__ __forceinline__ Terms<kPixels> reduce(int y, uint32_t (&z)[kPer]) {
    Terms<kPixels> terms;
    float of_label[kPixels], before[kPixels], poison[kPixels];
    const int classes = first_class_ + channels_;
    const int64_t index = (place_.image * height_ + y) * width_ + place_.x;
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      terms.label[v] = v < pixels_ ? read_label(input_.labels, classes, index + v) : -1;
      terms.largest[v] = before[v] = -kInf;
      of_label[v] = poison[v] = 0.0f;
    }
    // `before` is the largest of the classes before the label: on ties the lowest class is the arg max.
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (i >= place_.count) continue;
      float value[kPixels];
      Type::unpack(z[i], value);
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        poison[v] += value[v] * 0.0f;
        if (terms.label[v] == place_.first + i) {
          of_label[v] = value[v];
          before[v] = terms.largest[v];
        } else {
          terms.largest[v] = fmaxf(terms.largest[v], value[v]);
        }
      }
    }
    if (groups_ > 1) exchange_maxima(terms, of_label, before);

#pragma unroll
    for (int v = 0; v < kPixels; ++v) terms.sum[v] = poison[v], terms.squares[v] = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      float value[kPixels];
      Type::unpack(z[i], value);
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        const float e = exp2_approx((value[v] - terms.largest[v]) * kLog2E);
        if (terms.label[v] != place_.first + i) {
          terms.sum[v] += e;
          if constexpr (kSquares) terms.squares[v] += e * e;
        }
      }
    }
    if (groups_ > 1) {
      exchange_sums(terms.sum);
      if constexpr (kSquares) {
        __syncthreads();  // all have read the sums
        exchange_sums(terms.squares);
      }
    }

#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      const bool finite = terms.sum[v] == terms.sum[v];
      const float gap = of_label[v] - terms.largest[v];
      terms.right[v] = terms.label[v] >= 0 && gap >= 0.0f && of_label[v] > before[v];
      terms.log_odds[v] = finite ? gap - log_positive(terms.sum[v]) : Bits<float>::from(0x7fc00000);
      if (!finite) {
        forget(v, z);
        terms.largest[v] = 0.0f;
        terms.sum[v] = 1.0f;
      }
    }
    return terms;
  }

  // Writes weight * dl/dz of row y; z and terms are the row's. A weight of 0 writes zeros.
  __device__ __forceinline__ void write(int y, const uint32_t (&z)[kPer], const int (&label)[kPixels],
                                        const float (&largest)[kPixels], const float (&sum)[kPixels],
                                        const float (&weight)[kPixels], void* grad) {
    float scale[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) scale[v] = weight[v] / sum[v];
    Element* image = static_cast<Element*>(grad) + place_.image * channels_ * height_ * width_;
    if constexpr (kChannelsLast) {
      Element* row = image + (static_cast<int64_t>(y) * width_ + place_.left) * channels_;
      Element* staged = staged_like(row);
      __syncthreads();  // all have read what was staged before
      if (place_.own) put(staged + place_.slot * kPixels * channels_, channels_, 1, z, label, largest, scale, weight);
      __syncthreads();
      copy<true>(row, staged, place_.width * channels_);
      __syncthreads();
    } else if (place_.own) {
      put(image + y * width_ + place_.x, 1, height_ * width_, z, label, largest, scale, weight);
    }
  }

 private:
  static constexpr float kLog2E = 1.44269504f;

  // Where memory like `row` is staged: at the same offset from 16 bytes, so that both ends copy in words of 16 bytes.
  __device__ __forceinline__ Element* staged_like(const Element* row) const {
    return reinterpret_cast<Element*>(staging_ + (reinterpret_cast<uintptr_t>(row) & 15u));
  }

  // Copies n elements between global and shared memory, all threads together.
  template <bool kToGlobal>
  static __device__ __forceinline__ void copy(Element* global, Element* staged, int n) {
    const auto move = [&](auto* outside, auto* inside) {
      if constexpr (kToGlobal) {
        *outside = *inside;
      } else {
        *inside = *outside;
      }
    };
    constexpr int kElements = 16 / static_cast<int>(sizeof(Element));
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(global) / sizeof(Element)) & (kElements - 1);
    const int to_boundary = (kElements - misaligned) & (kElements - 1);
    const int head = to_boundary < n ? to_boundary : n;
    const int body = (n - head) / kElements;
    const int tail = head + body * kElements;
    const int self = thread_of_block(), all = threads_of_block();
    auto* wide_global = reinterpret_cast<Wide*>(global + head);
    auto* wide_staged = reinterpret_cast<Wide*>(staged + head);
#pragma unroll 4
    for (int i = self; i < body; i += all) move(wide_global + i, wide_staged + i);
    for (int i = self; i < head; i += all) move(global + i, staged + i);
    for (int i = tail + self; i < n; i += all) move(global + i, staged + i);
  }

  struct alignas(16) Wide {
    uint32_t words[4];
  };

  // Whether the two pixels of a word can be read and written at once.
  __device__ __forceinline__ bool together(const Element* at, int pixel_stride, int class_stride) const {
    return pixel_stride == 1 && pixels_ == kPixels && class_stride % kPixels == 0 &&
           reinterpret_cast<uintptr_t>(at) % sizeof(uint32_t) == 0;
  }

  // The word's pixels of this thread's classes; `at` is the first pixel's first channel. Registers beyond the classes
  // are -inf, words beyond the image 0.
  __device__ __forceinline__ void read(const Element* at, int pixel_stride, int class_stride, uint32_t (&z)[kPer]) {
    const int skipped = place_.first - first_class_;  // channels before this thread's
    at += skipped * class_stride;
    if (together(at, pixel_stride, class_stride)) {
#pragma unroll
      for (int i = 0; i < kPer; ++i, at += class_stride) {
        z[i] = Type::kLowest;
        if (i < place_.count) z[i] = skipped + i < 0 ? 0u : *reinterpret_cast<const uint32_t*>(at);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPer; ++i, at += class_stride) {
        z[i] = Type::kLowest;
        if (i < place_.count) {
          z[i] = 0u;
          for (int v = 0; v < kPixels; ++v) {
            if (v < pixels_ && skipped + i >= 0) put_element(z[i], v, at[v * pixel_stride]);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void put_element(uint32_t& word, int v, Element element) {
    if constexpr (kPixels == 1) {
      word = static_cast<uint32_t>(Bits<float>::of(Type::to_float(element)));
    } else {
      word |= static_cast<uint32_t>(element) << 16 * v;
    }
  }

  static __device__ __forceinline__ Element get_element(uint32_t word, int v) {
    if constexpr (kPixels == 1) {
      return Bits<float>::from(static_cast<int32_t>(word));
    } else {
      return static_cast<Element>(word >> 16 * v);
    }
  }

  // Sets pixel v to 0 in all classes.
  __device__ __forceinline__ void forget(int v, uint32_t (&z)[kPer]) const {
    const uint32_t kept = kPixels == 1 ? 0u : (v == 0 ? 0xffff0000u : 0x0000ffffu);
#pragma unroll
    for (int i = 0; i < kPer; ++i) z[i] &= kept;
  }

  __device__ __forceinline__ void put(Element* at, int pixel_stride, int class_stride, const uint32_t (&z)[kPer],
                                      const int (&label)[kPixels], const float (&largest)[kPixels],
                                      const float (&scale)[kPixels], const float (&weight)[kPixels]) const {
    const int skipped = place_.first - first_class_;
    at += skipped * class_stride;
    const bool whole = together(at, pixel_stride, class_stride);
#pragma unroll
    for (int i = 0; i < kPer; ++i, at += class_stride) {
      if (i >= place_.count || skipped + i < 0) continue;
      float value[kPixels];
      Type::unpack(z[i], value);
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        const float e = exp2_approx((value[v] - largest[v]) * kLog2E);
        value[v] = label[v] == place_.first + i ? -weight[v] : e * scale[v];
      }
      const uint32_t word = Type::pack(value);
      if (whole) {
        *reinterpret_cast<uint32_t*>(at) = word;
      } else {
        for (int v = 0; v < kPixels; ++v) {
          if (v < pixels_) at[v * pixel_stride] = get_element(word, v);
        }
      }
    }
  }

  // Shared memory between groups: [groups] maxima, [groups] sums, the label's logit and `before`, each for every pixel
  // of the row. Of the last two only the label's group knows what to write.
  __device__ __forceinline__ float& shared_value(int part, int v) {
    return exchange_[(part * static_cast<int>(blockDim.x) + place_.slot) * kPixels + v];
  }

  __device__ __forceinline__ void exchange_maxima(Terms<kPixels>& terms, float (&of_label)[kPixels],
                                                  float (&before)[kPixels]) {
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      shared_value(place_.group, v) = terms.largest[v];
      if (terms.label[v] >= place_.first && terms.label[v] < place_.first + place_.count) {
        shared_value(2 * groups_, v) = of_label[v];
        shared_value(2 * groups_ + 1, v) = before[v];
      }
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      const bool valid = terms.label[v] >= 0;
      of_label[v] = valid ? shared_value(2 * groups_, v) : 0.0f;
      before[v] = valid ? shared_value(2 * groups_ + 1, v) : -kInf;
      terms.largest[v] = -kInf;
    }
    const int per = classes_of_group(first_class_ + channels_, groups_);
    for (int group = 0; group < groups_; ++group) {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        const float largest = shared_value(group, v);
        terms.largest[v] = fmaxf(terms.largest[v], largest);
        if (group * per + per <= terms.label[v]) before[v] = fmaxf(before[v], largest);
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
  int halo_, groups_;
  float* exchange_;
  unsigned char* staging_;
  int channels_, first_class_, height_, width_, pixels_;
  const Element* image_;
};

}  // namespace eroseg::cuda
