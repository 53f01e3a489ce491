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

// How logits lie in memory: as planes [C][H][W], where the pixels of a word can be read and written at once or, in rows
// of odd length, cannot; or as pixels [H][W][C].
enum class Layout { kPlanes, kOddPlanes, kChannelsLast };

// What is left of a word's pixels after their reduction. Exponentials are relative to 2^scaled: the kernel computes
// exp(z - m) as 2^(z log2(e) - scaled) with scaled = m log2(e), rounded once, so S comes out with a factor close to 1
// that its gradient does not feel and the log-odds are corrected for.
template <int kPixels>
struct Terms {
  int label[kPixels];       // -1 on void pixels and beyond the image
  float scaled[kPixels];    // m log2(e), m the largest logit but the label's; 0 where logits are not finite
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
constexpr int resident_wanted(int per, Layout layout) { return per <= kFewPer && layout == Layout::kPlanes ? 2 : 1; }

inline bool fits_rows(const Shape& shape) { return shape.classes() <= kMostClasses; }

inline int groups_for(int64_t classes) {
  const int64_t groups = (classes + kFewPer - 1) / kFewPer;
  return static_cast<int>(groups <= kMostGroups ? groups : (classes + kMostPer - 1) / kMostPer);
}

// Whether every word of every row of the planes at `data` is aligned as such.
inline bool are_words_aligned(const void* data, const Shape& shape, int pixels_of_word) {
  return shape.width % pixels_of_word == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(uint32_t) == 0;
}

// Calls f(Type{}, per, layout), the latter as integral constants, with `per` registers for a group's classes.
template <class F>
cudaError_t for_rows(const Input& input, const void* grad, const F& f) {
  const int classes = static_cast<int>(input.shape.classes());
  const int wanted = classes_of_group(classes, groups_for(classes));
  return for_type(input.logits.type, [&](auto type) {
    constexpr int kPixels = decltype(type)::kPixels;
    const bool aligned =
        are_words_aligned(input.logits.data, input.shape, kPixels) && are_words_aligned(grad, input.shape, kPixels);
    const auto with = [&](auto per) {
      if (input.logits.channels_last) return f(type, per, std::integral_constant<Layout, Layout::kChannelsLast>{});
      if constexpr (kPixels > 1) {
        if (!aligned) return f(type, per, std::integral_constant<Layout, Layout::kOddPlanes>{});
      }
      return f(type, per, std::integral_constant<Layout, Layout::kPlanes>{});
    };
    if (wanted <= 4) return with(std::integral_constant<int, 4>{});
    if (wanted <= 12) return with(std::integral_constant<int, 12>{});
    if (wanted <= kFewPer) return with(std::integral_constant<int, kFewPer>{});
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

template <class Type, int kPer, Layout kLayout, bool kSquares>
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

  // Reads row y of the image into registers; pixels beyond the image are the nearest one inside, so that no load
  // depends on them. Registers beyond the group's classes have no meaning.
  __device__ __forceinline__ void load(int y, uint32_t (&z)[kPer]) {
    if constexpr (kLayout == Layout::kChannelsLast) {
      const int from = place_.left - halo_ < 0 ? 0 : place_.left - halo_;
      const int to = place_.left + place_.width + halo_ < width_ ? place_.left + place_.width + halo_ : width_;
      const Element* row = image_ + (y * width_ + from) * channels_;
      Element* staged = staged_like(row);
      copy<false>(const_cast<Element*>(row), staged, (to - from) * channels_);
      __syncthreads();
      read(staged, channels_, 1, place_.x - from, to - from, z);
    } else {
      read(image_ + y * width_, 1, height_ * width_, place_.x, width_, z);
    }
  }

  // Reduces the row in z. Pixels whose logits are not finite are set to 0 there.
  __device__ __forceinline__ Terms<kPixels> reduce(int y, uint32_t (&z)[kPer]) {
    Terms<kPixels> terms;
    int local[kPixels];
    float of_label[kPixels], largest[kPixels];
    bool is_tied[kPixels];
    const int classes = first_class_ + channels_;
    const int64_t index = (place_.image * height_ + y) * width_ + place_.x;
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      terms.label[v] = v < pixels_ ? read_label(input_.labels, classes, index + v) : -1;
      local[v] = local_label(terms.label[v]);
      largest[v] = -kInf;
      of_label[v] = 0.0f;
    }
    // The largest logit but the label's. The label's is taken out of its register: its exponential is then 0, as are
    // those of registers beyond the classes.
    typename Type::Poison poison;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (i < place_.count) poison.add(z[i]);
      float value[kPixels];
      Type::unpack(z[i], value);
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        of_label[v] = local[v] == i ? value[v] : of_label[v];
        value[v] = local[v] == i ? -kInf : value[v];
        largest[v] = fmaxf(largest[v], value[v]);
      }
      z[i] = Type::repack(value);
    }
    // On ties the lowest class is the arg max.
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      is_tied[v] = false;
      if (local[v] > 0 && of_label[v] == largest[v]) is_tied[v] = has_below(z, v, local[v], of_label[v]);
    }
    if (groups_ > 1) exchange_maxima(terms.label, local, of_label, is_tied, largest);

    float gap[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      gap[v] = of_label[v] - largest[v];
      terms.right[v] = terms.label[v] >= 0 && gap[v] >= 0.0f && !is_tied[v];
      if (absolute(largest[v]) > kHuge) {
        shift(v, largest[v], z);
        largest[v] = 0.0f;
      }
      terms.scaled[v] = largest[v] * kLog2E;
      terms.sum[v] = poison.of(v);
      terms.squares[v] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      float value[kPixels];
      Type::unpack(z[i], value);
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        const float e = exp2_approx(fmaf(value[v], kLog2E, -terms.scaled[v]));
        terms.sum[v] += e;
        if constexpr (kSquares) terms.squares[v] += e * e;
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
      const float factor = fmaf(largest[v], kLog2E, -terms.scaled[v]);  // of S, as a power of 2
      const float log_odds = gap[v] - (log_positive(terms.sum[v]) - factor * kLn2);
      terms.log_odds[v] = finite ? log_odds : Bits<float>::from(0x7fc00000);
      if (!finite) {
        forget(v, z);
        terms.scaled[v] = 0.0f;
        terms.sum[v] = 1.0f;
      }
    }
    return terms;
  }

  // Writes weight * dl/dz of row y; z and the rest are the row's. A weight of 0 writes zeros.
  __device__ __forceinline__ void write(int y, const uint32_t (&z)[kPer], const int (&label)[kPixels],
                                        const float (&scaled)[kPixels], const float (&sum)[kPixels],
                                        const float (&weight)[kPixels], void* grad) {
    float scale[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) scale[v] = weight[v] / sum[v];
    Element* image = static_cast<Element*>(grad) + place_.image * channels_ * height_ * width_;
    if constexpr (kLayout == Layout::kChannelsLast) {
      Element* row = image + (y * width_ + place_.left) * channels_;
      Element* staged = staged_like(row);
      __syncthreads();  // all have read what was staged before
      if (place_.own) put(staged, channels_, 1, place_.slot * kPixels, z, label, scaled, scale, weight);
      __syncthreads();
      copy<true>(row, staged, place_.width * channels_);
      __syncthreads();
    } else if (place_.own) {
      put(image + y * width_, 1, height_ * width_, place_.x, z, label, scaled, scale, weight);
    }
  }

 private:
  // Beyond this, z log2(e) - scaled would be off by more than it is.
  static constexpr float kHuge = 1e6f;

  // The label's register in this thread, -1 if it is another group's or the pixel is void.
  __device__ __forceinline__ int local_label(int label) const {
    const int local = label - place_.first;
    return label >= 0 && local >= 0 && local < place_.count ? local : -1;
  }

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

  // Reads this thread's word and classes from a row of `width` pixels, of which its first is number x.
  __device__ __forceinline__ void read(const Element* row, int pixel_stride, int class_stride, int x, int width,
                                       uint32_t (&z)[kPer]) {
    const auto inside = [&](int at, int last) { return at < 0 ? 0 : (at < last ? at : last); };
    constexpr int kReads = kLayout == Layout::kPlanes ? 1 : kPixels;
    const Element* at[kReads];
#pragma unroll
    for (int v = 0; v < kReads; ++v) {
      const int last = kLayout == Layout::kPlanes ? width - kPixels : width - 1;
      at[v] = row + inside(x + v, last) * pixel_stride + (place_.first - first_class_) * class_stride;
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      z[i] = i < first_class_ ? 0u : Type::kLowest;
      if (i < place_.count && i >= first_class_) {
        if constexpr (kLayout == Layout::kPlanes) {
          z[i] = *reinterpret_cast<const uint32_t*>(at[0]);
        } else {
          Element elements[kPixels];
#pragma unroll
          for (int v = 0; v < kPixels; ++v) elements[v] = *at[v];
          z[i] = joined(elements);
        }
      }
#pragma unroll
      for (int v = 0; v < kReads; ++v) at[v] += class_stride;
    }
  }

  static __device__ __forceinline__ uint32_t joined(const Element (&elements)[kPixels]) {
    if constexpr (kPixels == 1) {
      return static_cast<uint32_t>(Bits<float>::of(elements[0]));
    } else {
      return static_cast<uint32_t>(elements[0]) | static_cast<uint32_t>(elements[1]) << 16;
    }
  }

  static __device__ __forceinline__ Element element(uint32_t word, int v) {
    if constexpr (kPixels == 1) {
      return Bits<float>::from(static_cast<int32_t>(word));
    } else {
      return static_cast<Element>(word >> 16 * v);
    }
  }

  // Whether a class below the label's has its logit, too.
  static __device__ bool has_below(const uint32_t (&z)[kPer], int v, int local, float of_label) {
    bool found = false;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      float value[kPixels];
      Type::unpack(z[i], value);
      found = found || (i < local && value[v] == of_label);
    }
    return found;
  }

  // Sets pixel v to 0 in all classes.
  __device__ __forceinline__ void forget(int v, uint32_t (&z)[kPer]) const {
    const uint32_t kept = kPixels == 1 ? 0u : (v == 0 ? 0xffff0000u : 0x0000ffffu);
#pragma unroll
    for (int i = 0; i < kPer; ++i) z[i] &= kept;
  }

  // Subtracts from pixel v in all classes. Huge logits differ by 0 or by so much that no exponential is left of the
  // lower one: it does not matter that the difference is rounded.
  __device__ __forceinline__ void shift(int v, float by, uint32_t (&z)[kPer]) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      float value[kPixels];
      Type::unpack(z[i], value);
      value[v] -= by;
      z[i] = Type::pack(value);
    }
  }

  // Writes this thread's word and classes to a row, of which its first pixel is number x.
  __device__ __forceinline__ void put(Element* row, int pixel_stride, int class_stride, int x,
                                      const uint32_t (&z)[kPer], const int (&label)[kPixels],
                                      const float (&scaled)[kPixels], const float (&scale)[kPixels],
                                      const float (&weight)[kPixels]) const {
    int local[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) local[v] = local_label(label[v]);
    if (pixels_ == 0) return;
    Element* at = row + x * pixel_stride + (place_.first - first_class_) * class_stride;
#pragma unroll
    for (int i = 0; i < kPer; ++i, at += class_stride) {
      float value[kPixels];
      Type::unpack(z[i], value);
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        const float g = exp2_approx(fmaf(value[v], kLog2E, -scaled[v])) * scale[v];
        value[v] = local[v] == i ? -weight[v] : g;
      }
      const uint32_t word = Type::pack(value);
      const bool exists = i < place_.count && i >= first_class_;
      if constexpr (kLayout == Layout::kPlanes) {
        if (exists) *reinterpret_cast<uint32_t*>(at) = word;
      } else {
#pragma unroll
        for (int v = 0; v < kPixels; ++v) {
          if (exists && v < pixels_) at[v * pixel_stride] = element(word, v);
        }
      }
    }
  }

  // Shared memory between groups: [groups] maxima, [groups] sums, the label's logit and whether it is tied, each for
  // every pixel of the row. Of the last two only the label's group knows what to write.
  __device__ __forceinline__ float& shared_value(int part, int v) {
    return exchange_[(part * static_cast<int>(blockDim.x) + place_.slot) * kPixels + v];
  }

  __device__ __forceinline__ void exchange_maxima(const int (&label)[kPixels], const int (&local)[kPixels],
                                                  float (&of_label)[kPixels], bool (&is_tied)[kPixels],
                                                  float (&largest)[kPixels]) {
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      shared_value(place_.group, v) = largest[v];
      if (local[v] >= 0) {
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
    const int per = classes_of_group(first_class_ + channels_, groups_);
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
  int halo_, groups_;
  float* exchange_;
  unsigned char* staging_;
  int channels_, first_class_, height_, width_, pixels_;
  const Element* image_;
};

}  // namespace eroseg::cuda
