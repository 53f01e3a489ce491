// A thread's share of the logits of its pixels, and how it goes over them where they stand in shared memory.
//
// A thread has a word of neighbouring pixels. `groups` threads with the same pixels share the classes: each has some of
// them, one behind the other.
#pragma once

#include "staging.cuh"

namespace eroseg::cuda {

template <class Type>
class Share {
 public:
  static constexpr int kPixels = Word<Type>::kElements;
  using Element = typename Type::Element;

  __device__ __forceinline__ Share(const Place& place, const RowsPlan& plan, const Shape& shape)
      : pitch_(plan.memory.pitch),
        words_of_share_(plan.words_of_share),
        first_class_(static_cast<int>(shape.classes() - shape.channels)) {
    // The virtual class 0 of binary segmentation has no channel.
    begin_ = max(place.first - first_class_, 0);
    end_ = max(place.first + place.count - first_class_, begin_);
  }

  // Classes without a channel: 1 in binary segmentation, else 0.
  __device__ __forceinline__ int first_class() const { return first_class_; }

  // A channel of pixel v in a row that begins with the thread's pixels.
  __device__ __forceinline__ Element& at(Element* row, int v, int channel) const { return row[channel * pitch_ + v]; }

  // The channel of a label if it is of this thread's share, else -1.
  __device__ __forceinline__ int channel_of(int label) const {
    const int channel = label - first_class_;
    return begin_ <= channel && channel < end_ ? channel : -1;
  }

  // Which of the threads with the same pixels has a label. Their classes rise with their number.
  __device__ __forceinline__ int group_of(int label) const { return label / words_of_share_; }

  // Calls f(channel) for this thread's channels, beginning with the lowest, until it returns false.
  template <class F>
  __device__ __forceinline__ void each_channel(const F& f) const {
#pragma unroll 1
    for (int channel = begin_; channel < end_; ++channel) {
      if (!f(channel)) return;
    }
  }

  // Calls f(v, z) for each logit z of pixel v.
  template <class F>
  __device__ __forceinline__ void for_each(const Element* row, const F& f) const {
    transform<false>(const_cast<Element*>(row), [&](int v, float z) { return f(v, z), z; });
  }

  // Puts f(v, z) in the place of z, if kWrite.
  template <bool kWrite = true, class F>
  __device__ __forceinline__ void transform(Element* row, const F& f) const {
    over_words<kWrite>(row + begin_ * pitch_, end_ - begin_, [&](Word<Type>& word) {
      float value[kPixels];
      word.unpack(value);
#pragma unroll
      for (int v = 0; v < kPixels; ++v) value[v] = f(v, value[v]);
      if constexpr (kWrite) word = Word<Type>::pack(value);
    });
  }

  // The largest logit of each pixel, whatever NaN there may be among them.
  __device__ __forceinline__ void find_largest(const Element* row, float (&largest)[kPixels]) const {
    Word<Type> held = {{Type::kMinusInf, Type::kMinusInf}};
    over_words<false>(const_cast<Element*>(row) + begin_ * pitch_, end_ - begin_, [&](const Word<Type>& word) {
#pragma unroll
      for (int h = 0; h < 2; ++h) held.halves[h] = Type::larger(held.halves[h], word.halves[h]);
    });
    held.unpack(largest);
  }

 private:
  // Calls f(word) for n words, a pitch apart, and puts them back if kWrite. kAtOnce are read before the first is
  // written: one after the other, each would wait for the one before, since the compiler cannot know that they are
  // different places.
  template <bool kWrite, int kAtOnce = 4, class F>
  __device__ __forceinline__ void over_words(Element* at, int n, const F& f) const {
#pragma unroll 1
    for (; n >= kAtOnce; n -= kAtOnce, at += kAtOnce * pitch_) {
      Word<Type> words[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) words[k] = *reinterpret_cast<const Word<Type>*>(at + k * pitch_);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) f(words[k]);
#pragma unroll
      for (int k = 0; kWrite && k < kAtOnce; ++k) *reinterpret_cast<Word<Type>*>(at + k * pitch_) = words[k];
    }
    if constexpr (kAtOnce > 1) over_words<kWrite, kAtOnce / 2>(at, n, f);
  }

  int pitch_, words_of_share_, first_class_;
  int begin_, end_;  // this thread's channels
};

}  // namespace eroseg::cuda
