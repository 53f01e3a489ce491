// A thread's share of the logits of its pixels, and how it goes over them where they stand in shared memory.
//
// A thread has a word of neighbouring pixels, as many as a word has elements; so these pixels' logits are as many words
// as there are classes. As planes a word has one class of all of the pixels. In channels_last the pixels' classes stand
// one behind the other, and a word has some classes of one pixel, or the last of one and the first of the next.
// `groups` threads with the same pixels share these words: no thread has a part of another one's word.
#pragma once

#include "staging.cuh"

namespace eroseg::cuda {

template <class Type, Layout kLayout>
class Share {
 public:
  static constexpr int kPixels = Word<Type>::kElements;
  using Element = typename Type::Element;

  __device__ __forceinline__ Share(const Place& place, const Staging<Type, kLayout>& staging, const Shape& shape,
                                   Divisor by_words_of_share)
      : staging_(staging),
        channels_(static_cast<int>(shape.channels)),
        first_class_(static_cast<int>(shape.classes() - shape.channels)),
        by_words_of_share_(by_words_of_share) {
    // The virtual class 0 of binary segmentation has no channel, and so no word.
    begin_ = place.first < first_class_ ? 0 : place.first - first_class_;
    end_ = begin_ + place.count - (place.count > 0 && place.first < first_class_ ? first_class_ : 0);
  }

  // Classes without a channel: 1 in binary segmentation, else 0.
  __device__ __forceinline__ int first_class() const { return first_class_; }

  // A channel of pixel v in a row that begins with the thread's pixels.
  __device__ __forceinline__ Element& at(Element* row, int v, int channel) const {
    return row[staging_.offset_of(v, channel)];
  }

  // The channel of pixel v's label if it is of this thread's share, else -1.
  __device__ __forceinline__ int channel_of(int v, int label) const {
    const int channel = label - first_class_, word = word_of(v, channel);
    return channel >= 0 && word >= begin_ && word < end_ ? channel : -1;
  }

  // Calls f(channel) for this thread's channels of pixel v, beginning with the lowest, until it returns false.
  template <class F>
  __device__ __forceinline__ void each_channel(int v, const F& f) const {
    int channel = begin_, end = end_;
    if constexpr (kLayout == Layout::kChannelsLast) {
      channel = max(begin_ * kPixels - v * channels_, 0);
      end = min(end_ * kPixels - v * channels_, channels_);
    }
#pragma unroll 1
    for (; channel < end; ++channel) {
      if (!f(channel)) return;
    }
  }

  // Which of the threads with the same pixels has pixel v's label, where several share them. Their classes of a pixel
  // rise with their number.
  __device__ __forceinline__ int group_of(int v, int label) const {
    return by_words_of_share_.quotient(word_of(v, label));
  }

  // Calls f(v, z) for each logit z of pixel v.
  template <class F>
  __device__ __forceinline__ void for_each(const Element* row, const F& f) const {
    over_values<false>(const_cast<Element*>(row), [&](int v, float z) { return f(v, z), z; });
  }

  // Puts f(v, z) in the place of z.
  template <class F>
  __device__ __forceinline__ void transform(Element* row, const F& f) const {
    over_values<true>(row, f);
  }

  // The largest logit of each pixel, whatever NaN there may be among them.
  __device__ __forceinline__ void find_largest(const Element* row, float (&largest)[kPixels]) const {
    constexpr int kHeld = kLayout == Layout::kChannelsLast ? kPixels : 1;
    Word<Type> held[kHeld];  // the largest of some words, element by element
#pragma unroll
    for (int v = 0; v < kHeld; ++v) held[v] = {{Type::kMinusInf, Type::kMinusInf}};
    const auto take = [&](int v, const Word<Type>& word) {
#pragma unroll
      for (int h = 0; h < 2; ++h) held[v].halves[h] = Type::larger(held[v].halves[h], word.halves[h]);
    };
    if constexpr (kLayout != Layout::kChannelsLast) {
      over_planes<false>(const_cast<Element*>(row), [&](const Word<Type>& word) { take(0, word); });
      held[0].unpack(largest);
    } else {
      float value[kPixels];
#pragma unroll
      for (int v = 0; v < kPixels; ++v) largest[v] = -kInf;
      over_pixels<false>(const_cast<Element*>(row), take, [&](int v, int n, const Word<Type>& word) {
        word.unpack(value);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          largest[v] = fmaxf(largest[v], i < n ? value[i] : -kInf);
          largest[v + 1] = fmaxf(largest[v + 1], i < n ? -kInf : value[i]);
        }
      });
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        held[v].unpack(value);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) largest[v] = fmaxf(largest[v], value[i]);
      }
    }
  }

 private:
  static constexpr bool kIsAligned = kLayout != Layout::kUnalignedPlanes;

  // Which of the pixels' words has a channel of pixel v.
  __device__ __forceinline__ int word_of(int v, int channel) const {
    return kLayout != Layout::kChannelsLast ? channel : (v * channels_ + channel) / kPixels;
  }

  template <bool kWrite, class F>
  __device__ __forceinline__ void over_values(Element* row, const F& f) const {
    if constexpr (kLayout != Layout::kChannelsLast) {
      over_planes<kWrite>(row, [&](Word<Type>& word) { change<kWrite>(word, f); });
    } else {
      over_pixels<kWrite>(
          row, [&](int v, Word<Type>& word) { change<kWrite>(word, [&](int, float z) { return f(v, z); }); },
          [&](int v, int n, Word<Type>& word) {
            change<kWrite>(word, [&](int i, float z) { return i < n ? f(v, z) : f(v + 1, z); });
          });
    }
  }

  // Puts f(i, value) in the place of each value of a word, if kWrite.
  template <bool kWrite, class F>
  static __device__ __forceinline__ void change(Word<Type>& word, const F& f) {
    float value[kPixels];
    word.unpack(value);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) value[i] = f(i, value[i]);
    if constexpr (kWrite) word = Word<Type>::pack(value);
  }

  // Calls f(word) for the words of planes.
  template <bool kWrite, class F>
  __device__ __forceinline__ void over_planes(Element* row, const F& f) const {
    over_words<kWrite>(row + staging_.offset_of(0, begin_), end_ - begin_, staging_.offset_of(0, 1), f);
  }

  // Calls f(v, word) for words of pixel v alone, and shared(v, n, word) for one with the last n of pixel v and the
  // first classes of the next.
  template <bool kWrite, class F, class Shared>
  __device__ __forceinline__ void over_pixels(Element* row, const F& f, const Shared& shared) const {
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      const int first = max((v * channels_ + kPixels - 1) / kPixels, begin_);
      const int end = (v + 1) * channels_, last = end / kPixels;
      over_words<kWrite>(row + first * kPixels, min(last, end_) - first, kPixels,
                         [&](Word<Type>& word) { f(v, word); });
      if (v + 1 < kPixels && end % kPixels > 0 && begin_ <= last && last < end_) {
        over_words_at_once<1, kWrite>(row + last * kPixels, 0, {false},
                                      [&](Word<Type>& word) { shared(v, end % kPixels, word); });
      }
    }
  }

  // Calls f(word) for n words that begin `stride` elements apart, and puts them back if kWrite.
  template <bool kWrite, int kAtOnce = 4, class F>
  static __device__ __forceinline__ void over_words(Element* at, int n, int stride, const F& f) {
    // The same for every kAtOnce-th word: its distance is a multiple of 4 bytes, unless there is only one.
    bool odd[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) odd[k] = !kIsAligned && Word<Type>::is_odd(at + k * stride);
#pragma unroll 1
    for (; n >= kAtOnce; n -= kAtOnce, at += kAtOnce * stride) over_words_at_once<kAtOnce, kWrite>(at, stride, odd, f);
    if constexpr (kAtOnce > 1) over_words<kWrite, kAtOnce / 2>(at, n, stride, f);
  }

  // All are read before the first is written: one after the other, each would wait for the one before, since the
  // compiler cannot know that they are different places.
  template <int kCount, bool kWrite, class F>
  static __device__ __forceinline__ void over_words_at_once(Element* at, int stride, const bool (&odd)[kCount],
                                                            const F& f) {
    Word<Type> words[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if constexpr (kIsAligned) {
        words[k] = *reinterpret_cast<const Word<Type>*>(at + k * stride);
      } else {
        words[k] = Word<Type>::load(at + k * stride, odd[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) f(words[k]);
    if constexpr (kWrite) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if constexpr (kIsAligned) {
          *reinterpret_cast<Word<Type>*>(at + k * stride) = words[k];
        } else {
          words[k].store(at + k * stride, odd[k]);
        }
      }
    }
  }

  const Staging<Type, kLayout>& staging_;
  int channels_, first_class_;
  Divisor by_words_of_share_;
  int begin_, end_;  // this thread's words
};

}  // namespace eroseg::cuda
