// Rows of pixels in shared memory: fetched while the row before is at work, reduced over the classes, and turned into
// their gradient where they stand, before they are copied out.
//
// Every thread of a block copies pieces of 16 bytes, whichever pixels these belong to; for the arithmetic it has a word
// of neighbouring pixels (two of float32, four of 16 bits), or a part of their classes where `groups` threads share
// them. Nothing is kept in registers but a pixel's terms, so the number of classes is no template argument.
//
// The label's logit gives its place to the lowest finite number, whose exponential is 0: the loops over the classes
// need not ask which of them is the label.
//
// Invariants: all threads of a block call fetch, arrive, reduce, put and copy_out together; a thread beyond the image
// or the strip takes part with no classes of its own. The order of every sum is fixed.
#pragma once

#include <type_traits>

#include "launchers.h"
#include "strips.h"
#include "types.cuh"

namespace eroseg::cuda {

// How logits lie in memory: as planes [C][H][W], or as pixels [H][W][C].
enum class Layout { kPlanes, kChannelsLast };

// A thread's unit of access to shared memory.
template <class Type>
struct alignas(8) Word {
  // Pixels of a word of planes; classes of a word of a channels_last pixel.
  static constexpr int kElements = 2 * Type::kPixels;
  uint32_t halves[2];

  __device__ __forceinline__ void unpack(float (&out)[kElements]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float part[Type::kPixels];
      Type::unpack(halves[h], part);
#pragma unroll
      for (int v = 0; v < Type::kPixels; ++v) out[h * Type::kPixels + v] = part[v];
    }
  }

  static __device__ __forceinline__ Word pack(const float (&in)[kElements]) {
    Word word;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float part[Type::kPixels];
#pragma unroll
      for (int v = 0; v < Type::kPixels; ++v) part[v] = in[h * Type::kPixels + v];
      word.halves[h] = Type::pack(part);
    }
    return word;
  }
};

constexpr int kBytesOfPiece = 16;  // the largest that an asynchronous copy takes

// What a block works on, and a thread's part of it.
struct Place {
  int64_t image;
  int begin, end;    // own rows
  bool upward;       // whether the block goes from the last of them to the first
  int left, width;   // own pixels of the strip
  int x;             // first pixel of this thread's word
  int pixels;        // of the word that lie in the image and in the strip or its halo
  int slot;          // of the thread in the row
  bool own;          // whether the word belongs to the strip, not to its halo
  int group;         // of classes
  int first, count;  // the group's classes; none for a thread without pixels

  // Of two bands that touch, one is gone over upwards and the other downwards: the rows that both of them read are read
  // at about the same time, and so once from memory.
  template <class Type>
  static __device__ __forceinline__ Place of(const Shape& shape, const Strips& strips) {
    constexpr int kPixels = Word<Type>::kElements;
    Place place;
    const int64_t per_image = static_cast<int64_t>(strips.count) * strips.bands;
    const int within = static_cast<int>(blockIdx.x % per_image);
    place.image = blockIdx.x / per_image;
    const int band = within % strips.bands;
    const int height = static_cast<int>(shape.height), image_width = static_cast<int>(shape.width);
    place.begin = band * strips.rows;
    place.end = place.begin + strips.rows < height ? place.begin + strips.rows : height;
    place.upward = band % 2 != 0;
    place.left = within / strips.bands * strips.width;
    place.width = place.left + strips.width < image_width ? strips.width : image_width - place.left;

    // Own words first, then the halo on the left, then the one on the right.
    place.slot = static_cast<int>(threadIdx.x);
    const int own_words = strips.width / kPixels, halo_words = strips.halo / kPixels;
    const int beyond = place.slot - own_words;
    place.own = beyond < 0;
    place.x = place.left + place.slot * kPixels;
    if (beyond >= 0 && beyond < halo_words) place.x = place.left - strips.halo + beyond * kPixels;
    if (beyond >= halo_words) place.x -= strips.halo;
    const bool some = beyond < 2 * halo_words && place.x >= 0 && place.x < image_width;
    place.pixels = !some ? 0 : (image_width - place.x < kPixels ? image_width - place.x : kPixels);

    place.group = static_cast<int>(threadIdx.y);
    const int classes = static_cast<int>(shape.classes());
    const int per = (classes + strips.groups - 1) / strips.groups;
    place.first = place.group * per;
    const int count = classes - place.first < per ? classes - place.first : per;
    place.count = place.pixels > 0 && count > 0 ? count : 0;
    return place;
  }

  // The row of the image that is number i of the band, which begins with 0; -1 and end - begin are those beyond it.
  __device__ __forceinline__ int row(int i) const { return upward ? end - 1 - i : begin + i; }
};

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

// The shared memory of Rows: `stages` rows of the strip and its halo, then what groups exchange.
struct RowsMemory {
  int pitch;  // pixels of a staged row
  int stage;  // bytes of one
  int stages;
  int groups;

  template <class Type>
  static __host__ __device__ RowsMemory of(const Input& input, const Strips& strips, int stages) {
    const int unit = kBytesOfPiece / static_cast<int>(sizeof(typename Type::Element));
    const int pitch = strips.width + (strips.halo > 0 ? 2 * unit : 0);
    const int bytes = pitch * static_cast<int>(input.shape.channels * sizeof(typename Type::Element));
    // A channels_last row begins anywhere within 16 bytes.
    return {pitch, bytes + (input.logits.channels_last ? kBytesOfPiece : 0), stages, strips.groups};
  }

  // Two numbers for each group, the label's logit and whether it is tied, for each of the slots' pixels.
  static __host__ __device__ int exchanged_of_pixel(int groups) {
    return groups == 1 ? 0 : (2 * groups + 2) * static_cast<int>(sizeof(float));
  }

  __host__ __device__ int64_t bytes(int pixels_of_slots) const {
    return static_cast<int64_t>(stages) * stage + exchanged_of_pixel(groups) * static_cast<int64_t>(pixels_of_slots);
  }
};

template <class Type, Layout kLayout, bool kSquares>
class Rows {
 public:
  static constexpr int kPixels = Word<Type>::kElements;
  using Element = typename Type::Element;

  // `memory` has RowsMemory's bytes and is aligned to 16 of them; `grad` is like the logits.
  __device__ __forceinline__ Rows(const Input& input, void* grad, const Strips& strips, const Place& place, int stages,
                                  unsigned char* memory)
      : input_(input),
        place_(place),
        layout_(RowsMemory::of<Type>(input, strips, stages)),
        memory_(memory),
        exchange_(reinterpret_cast<float*>(memory + stages * layout_.stage)),
        groups_(strips.groups),
        channels_(static_cast<int>(input.shape.channels)),
        first_class_(static_cast<int>(input.shape.classes() - input.shape.channels)),
        height_(static_cast<int>(input.shape.height)),
        width_(static_cast<int>(input.shape.width)) {
    const int halo = strips.halo > 0 ? kUnit : 0;
    from_ = place.left - halo < 0 ? 0 : place.left - halo;
    to_ = place.left + place.width + halo < width_ ? place.left + place.width + halo : width_;
    const int64_t offset = place.image * channels_ * height_ * width_;
    logits_ = static_cast<const Element*>(input.logits.data) + offset;
    grad_ = static_cast<Element*>(grad) + offset;
    const uintptr_t all = reinterpret_cast<uintptr_t>(logits_) | reinterpret_cast<uintptr_t>(grad_) |
                          static_cast<uintptr_t>(width_ * static_cast<int>(sizeof(Element)));
    piece_ = all % kBytesOfPiece == 0 ? kBytesOfPiece : (all % 4 == 0 ? 4 : static_cast<int>(sizeof(Element)));
    const int of_piece = piece_ / static_cast<int>(sizeof(Element));
    in_ = Share::of((to_ - from_) / of_piece, channels_);
    out_ = Share::of(place.width / of_piece, channels_);
    // The virtual class 0 of binary segmentation has no channel.
    first_channel_ = place.first < first_class_ ? 0 : place.first - first_class_;
    count_ = place.count - (place.count > 0 && place.first < first_class_ ? first_class_ : 0);
  }

  // Begins to fetch row y of the image, if there is one, to stage s.
  __device__ __forceinline__ void fetch(int y, int s) {
    if (y >= 0 && y < height_) {
      if constexpr (kLayout == Layout::kChannelsLast) {
        const Element* row = logits_ + (y * width_ + from_) * channels_;
        copy_run<false>(const_cast<Element*>(row), stage(s, y), (to_ - from_) * channels_);
      } else {
        copy_planes<false>(const_cast<Element*>(logits_) + y * width_ + from_, stage(s, y), to_ - from_);
      }
    }
  }

  // Waits for what has been fetched.
  __device__ __forceinline__ void arrive() {
    wait_for_copies();
    __syncthreads();
  }

  // Reduces row y, which stands in stage s. Pixels whose logits are not finite are set to 0 there.
  __device__ __forceinline__ Terms<kPixels> reduce(int y, int s) {
    Terms<kPixels> terms;
    Element* const row = own_part(s, y);
    const int64_t index = (place_.image * height_ + y) * width_ + place_.x;
    read_labels(input_.labels, first_class_ + channels_, index, place_.pixels, terms.label);
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
    Element* const row = own_part(s, y);
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

  // Copies the strip's own pixels of row y from stage s to the gradient, once all threads have put them there.
  __device__ __forceinline__ void copy_out(int y, int s) {
    __syncthreads();
    const int skipped = place_.left - from_;
    if constexpr (kLayout == Layout::kChannelsLast) {
      Element* row = grad_ + (y * width_ + place_.left) * channels_;
      copy_run<true>(row, stage(s, y) + skipped * channels_, place_.width * channels_);
    } else {
      copy_planes<true>(grad_ + y * width_ + place_.left, stage(s, y) + skipped, place_.width);
    }
  }

 private:
  static constexpr int kUnit = kBytesOfPiece / static_cast<int>(sizeof(Element));
  static constexpr bool kScalesExponent = sizeof(Element) == 2;
  // Beyond this, z log2(e) - scaled would be off by more than it is; 1443, 2^-14 of which is an exponent's last bit,
  // where it has a summand more. And far from the lowest finite number, which must have no exponential left.
  static constexpr float kHuge = kScalesExponent ? 1e3f : 1e6f;

  // Where row y stands in stage s. A channels_last row keeps its offset from 16 bytes, so that both ends are copied in
  // pieces of 16.
  __device__ __forceinline__ Element* stage(int s, int y) const {
    unsigned char* begin = memory_ + s * layout_.stage;
    if constexpr (kLayout == Layout::kChannelsLast) {
      begin += reinterpret_cast<uintptr_t>(logits_ + (y * width_ + from_) * channels_) % kBytesOfPiece;
    }
    return reinterpret_cast<Element*>(begin);
  }

  // This thread's pixels and classes there.
  __device__ __forceinline__ Element* own_part(int s, int y) const {
    return stage(s, y) + offset_of(place_.x - from_, first_channel_);
  }

  __device__ __forceinline__ int offset_of(int pixel, int channel) const {
    return kLayout == Layout::kChannelsLast ? pixel * channels_ + channel : channel * layout_.pitch + pixel;
  }

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
        const Word<Type> word = *reinterpret_cast<const Word<Type>*>(row + c * layout_.pitch);
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
#pragma unroll 4
      for (int c = 0; c < count_; ++c) {
        auto* at = reinterpret_cast<Word<Type>*>(row + c * layout_.pitch);
        const Word<Type> word = *at;
        float value[kElements];
        word.unpack(value);
#pragma unroll
        for (int v = 0; v < kPixels; ++v) value[v] = f(v, value[v]);
        if constexpr (kWrite) *at = Word<Type>::pack(value);
      }
    } else {
      // A pixel's classes begin and end anywhere within a word.
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        Element* at = row + v * channels_;
        const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(at) / sizeof(Element)) % kElements;
        const int to_boundary = (kElements - misaligned) % kElements;
        const int head = to_boundary < count_ ? to_boundary : count_;
        const int tail = head + (count_ - head) / kElements * kElements;
        const auto one = [&](int c) {
          const float result = f(v, Type::to_float(at[c]));
          if constexpr (kWrite) at[c] = to_element<Type>(result);
        };
#pragma unroll 1
        for (int c = 0; c < head; ++c) one(c);
#pragma unroll 2
        for (int c = head; c < tail; c += kElements) {
          const Word<Type> word = *reinterpret_cast<const Word<Type>*>(at + c);
          float value[kElements];
          word.unpack(value);
#pragma unroll
          for (int i = 0; i < kElements; ++i) value[i] = f(v, value[i]);
          if constexpr (kWrite) *reinterpret_cast<Word<Type>*>(at + c) = Word<Type>::pack(value);
        }
#pragma unroll 1
        for (int c = tail; c < count_; ++c) one(c);
      }
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

  // Copies n elements that lie one behind the other, at equal offsets from 16 bytes unless grad and logits differ
  // there.
  template <bool kOut>
  static __device__ __forceinline__ void copy_run(Element* global, Element* staged, int n) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(global) / sizeof(Element)) % kUnit;
    const bool alike = (reinterpret_cast<uintptr_t>(global) - reinterpret_cast<uintptr_t>(staged)) % kBytesOfPiece == 0;
    const int to_boundary = (kUnit - misaligned) % kUnit;
    const int head = alike && to_boundary < n ? to_boundary : n;
    const int tail = head + (n - head) / kUnit * kUnit;
    const int self = thread_of_block(), all = threads_of_block();
    const int step = all * kUnit;
#pragma unroll 4
    for (int i = head + self * kUnit; i < tail; i += step) copy_piece<kOut, kBytesOfPiece>(global + i, staged + i);
    for (int i = self; i < head; i += all) copy_piece<kOut, sizeof(Element)>(global + i, staged + i);
    for (int i = tail + self; i < n; i += all) copy_piece<kOut, sizeof(Element)>(global + i, staged + i);
  }

  // What a thread copies of a row of planes: it keeps to its column of pieces, and goes down the channels.
  struct Share {
    int piece, columns;  // the first piece, and how many are copied at once
    int first, at_once;  // the same of channels
    int times;           // how often, 0 for a thread that has nothing to copy

    static __device__ __forceinline__ Share of(int pieces, int channels) {
      const int self = thread_of_block(), all = threads_of_block();
      Share share;
      share.columns = pieces < all ? pieces : all;
      share.at_once = all / share.columns;
      share.first = self / share.columns;
      share.piece = self - share.first * share.columns;
      share.times = share.first < share.at_once ? (channels - share.first + share.at_once - 1) / share.at_once : 0;
      return share;
    }
  };

  // Copies n pixels of all channels.
  template <bool kOut>
  __device__ __forceinline__ void copy_planes(Element* global, Element* staged, int n) const {
    const Share& share = kOut ? out_ : in_;
    if (piece_ == kBytesOfPiece) {
      copy_planes_by<kOut, kBytesOfPiece>(global, staged, n, share);
    } else if (piece_ == 4) {
      copy_planes_by<kOut, 4>(global, staged, n, share);
    } else {
      copy_planes_by<kOut, sizeof(Element)>(global, staged, n, share);
    }
  }

  template <bool kOut, int kBytes>
  __device__ __forceinline__ void copy_planes_by(Element* global, Element* staged, int n, const Share& share) const {
    constexpr int kElements = kBytes / static_cast<int>(sizeof(Element));
    const int64_t plane = static_cast<int64_t>(height_) * width_;
    const int pieces = n / kElements;
    for (int piece = share.piece; piece < pieces; piece += share.columns) {
      Element* at = global + piece * kElements + share.first * plane;
      Element* there = staged + piece * kElements + share.first * layout_.pitch;
#pragma unroll 4
      for (int i = 0; i < share.times; ++i) {
        copy_piece<kOut, kBytes>(at, there);
        at += share.at_once * plane;
        there += share.at_once * layout_.pitch;
      }
    }
  }

  template <bool kOut, int kBytes>
  static __device__ __forceinline__ void copy_piece(Element* global, Element* staged) {
    struct alignas(kBytes) Piece {
      unsigned char bytes[kBytes];
    };
    if constexpr (kOut) {
      *reinterpret_cast<Piece*>(global) = *reinterpret_cast<const Piece*>(staged);
    } else if constexpr (kBytes >= 4) {
      copy_async<kBytes>(staged, global);
    } else {
      *staged = *global;
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
  const RowsMemory layout_;
  unsigned char* memory_;
  float* exchange_;
  int groups_, channels_, first_class_, height_, width_;
  int from_, to_;  // pixels that are staged
  int first_channel_, count_;
  int piece_;  // bytes that are copied at a time
  Share in_, out_;
  const Element* logits_;
  Element* grad_;
};

// Threads of a block at most, and blocks that should fit on a multiprocessor: one fetches while others compute.
constexpr int kMostThreads = 256;
constexpr int kResidentWanted = 3;
// A thread's classes, at most: with fewer threads on a pixel's many classes too few would fit a multiprocessor, whose
// shared memory the logits fill.
constexpr int kMostPer = 24;
constexpr int64_t kMostClasses = 256;

// How to launch a kernel over Rows; strips.count is 0 if they do not fit.
struct RowsLaunch {
  Strips strips;
  int threads;
  int64_t shared;
};

// Cuts images for rows with `stages` stages and `bytes_of_pixel` of the kernel's own shared memory for every pixel of a
// row and `bytes` more. Memory is shared out so that kResidentWanted blocks fit on a multiprocessor, or else as a block
// may have it.
template <class Type>
cudaError_t launch_of(const Input& input, int radius, int stages, int bytes_of_pixel, int64_t bytes, RowsLaunch* out) {
  *out = {};
  const Shape& shape = input.shape;
  if (shape.classes() > kMostClasses) return cudaSuccess;
  constexpr int kPixels = Word<Type>::kElements;
  // Two groups may share a warp: half of one reads whole words of 128 bytes.
  const int wanted = static_cast<int>((shape.classes() + kMostPer - 1) / kMostPer);
  const int groups = wanted == 1 ? 1 : (wanted + 1) / 2 * 2;
  const int slots_of_step = groups == 1 ? kWarp : kWarp / 2;
  int64_t of_block = 0, of_processor = 0;
  const cudaError_t error = shared_memory_limits(&of_block, &of_processor);
  if (error != cudaSuccess) return error;
  // Each block has 1 KB that is not its own.
  const int64_t shares[] = {std::min(of_processor / kResidentWanted - 1024, of_block), of_block};
  for (const int64_t share : shares) {
    const int64_t each = stages * shape.channels * static_cast<int64_t>(sizeof(typename Type::Element)) +
                         bytes_of_pixel + RowsMemory::exchanged_of_pixel(groups);
    // Slots beyond the strip's pixels exchange, too.
    const int64_t idle = slots_of_step * kPixels * RowsMemory::exchanged_of_pixel(groups);
    const int64_t most_pixels = (share - bytes - stages * kBytesOfPiece - idle) / each;
    const Strips strips =
        cut_strips(shape.width, {radius, kPixels, 2, slots_of_step, groups, kMostThreads, most_pixels});
    if (strips.count == 0 || (strips.count > 1 && strips.width < kNarrowestStrip)) continue;
    const RowsMemory memory = RowsMemory::of<Type>(input, strips, stages);
    const int64_t shared =
        memory.bytes(strips.slots * kPixels) + bytes_of_pixel * static_cast<int64_t>(memory.pitch) + bytes;
    *out = {strips, strips.slots * strips.groups, shared};
    return cudaSuccess;
  }
  return cudaSuccess;
}

// Calls f(Type{}, layout), the latter as an integral constant.
template <class F>
cudaError_t for_rows(const Input& input, const F& f) {
  return for_type(input.logits.type, [&](auto type) {
    if (input.logits.channels_last) return f(type, std::integral_constant<Layout, Layout::kChannelsLast>{});
    return f(type, std::integral_constant<Layout, Layout::kPlanes>{});
  });
}

}  // namespace eroseg::cuda
