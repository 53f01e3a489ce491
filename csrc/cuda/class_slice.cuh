// A thread's slice of the classes of its pixels, and its loops over their logits in shared memory.
//
// A thread has a vector of neighbouring pixels. The classes are divided among `groups` threads with the same pixels:
// each has a slice of consecutive ones.
#pragma once

#include "staging.cuh"

namespace eroseg::cuda {

template <class Type>
class ClassSlice {
 public:
  static constexpr int kPixels = Vector<Type>::kElements;
  using Element = typename Type::Element;

  __device__ __forceinline__ ClassSlice(const ThreadTile& tile, const RowsPlan& plan, const Shape& shape)
      : pitch_(plan.memory.pitch),
        slice_classes_(plan.slice_classes),
        first_class_(static_cast<int>(shape.classes() - shape.channels)) {
    // The virtual class 0 of binary segmentation has no channel.
    begin_ = max(tile.first - first_class_, 0);
    end_ = max(tile.first + tile.count - first_class_, begin_);
  }

  // Classes without a channel: 1 in binary segmentation, else 0.
  __device__ __forceinline__ int first_class() const { return first_class_; }

  // A channel of pixel v in a row that begins with the thread's pixels.
  __device__ __forceinline__ Element& at(Element* row, int v, int channel) const { return row[channel * pitch_ + v]; }

  // The channel of a label if it is in this thread's slice, else -1.
  __device__ __forceinline__ int channel_of(int label) const {
    const int channel = label - first_class_;
    return begin_ <= channel && channel < end_ ? channel : -1;
  }

  // Which of the threads with the same pixels has a label. Their classes rise with their number.
  __device__ __forceinline__ int group_of(int label) const { return label / slice_classes_; }

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

  // Replaces each logit z of pixel v by f(v, z), if kWrite.
  template <bool kWrite = true, class F>
  __device__ __forceinline__ void transform(Element* row, const F& f) const {
    over_vectors<kWrite>(row + begin_ * pitch_, end_ - begin_, [&](Vector<Type>& vector) {
      float value[kPixels];
      vector.unpack(value);
#pragma unroll
      for (int v = 0; v < kPixels; ++v) value[v] = f(v, value[v]);
      if constexpr (kWrite) vector = Vector<Type>::pack(value);
    });
  }

  // The largest logit of each pixel, whatever NaN there may be among them.
  __device__ __forceinline__ void find_largest(const Element* row, float (&largest)[kPixels]) const {
    Vector<Type> held = {{Type::kMinusInf, Type::kMinusInf}};
    over_vectors<false>(const_cast<Element*>(row) + begin_ * pitch_, end_ - begin_, [&](const Vector<Type>& vector) {
#pragma unroll
      for (int h = 0; h < 2; ++h) held.halves[h] = Type::larger(held.halves[h], vector.halves[h]);
    });
    held.unpack(largest);
  }

 private:
  // Calls f(vector) for n vectors, a pitch apart, and writes them back if kWrite. kAtOnce are read before the first is
  // written: the compiler cannot know that they do not overlap, and would make each read wait for the write before it.
  template <bool kWrite, int kAtOnce = 4, class F>
  __device__ __forceinline__ void over_vectors(Element* at, int n, const F& f) const {
#pragma unroll 1
    for (; n >= kAtOnce; n -= kAtOnce, at += kAtOnce * pitch_) {
      Vector<Type> vectors[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) vectors[k] = *reinterpret_cast<const Vector<Type>*>(at + k * pitch_);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) f(vectors[k]);
#pragma unroll
      for (int k = 0; kWrite && k < kAtOnce; ++k) *reinterpret_cast<Vector<Type>*>(at + k * pitch_) = vectors[k];
    }
    if constexpr (kAtOnce > 1) over_vectors<kWrite, kAtOnce / 2>(at, n, f);
  }

  int pitch_, slice_classes_, first_class_;
  int begin_, end_;  // this thread's channels
};

}  // namespace eroseg::cuda
