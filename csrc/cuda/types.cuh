// The logits' types, and operations on the one or two logits that fit into 32 bits.
#pragma once

#include <cstring>
#include <type_traits>

#include "../params.h"
#include "platform.cuh"

namespace eroseg::cuda {

struct Float32 {
  using Element = float;
  static constexpr int kPixels = 1;
  static constexpr uint32_t kMinusInf = 0xff800000u;  // for every pixel
  static constexpr Element kLowestFinite = -std::numeric_limits<float>::max();
  static __device__ __forceinline__ float to_float(Element x) { return x; }
  static __device__ __forceinline__ void unpack(uint32_t vector, float (&out)[1]) {
    out[0] = Bits<float>::from(static_cast<int32_t>(vector));
  }
  static __device__ __forceinline__ uint32_t pack(const float (&in)[1]) {
    return static_cast<uint32_t>(Bits<float>::of(in[0]));
  }
  // The larger of two logits, for every pixel; of a number and a NaN, the number.
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    return pack({fmaxf(Bits<float>::from(static_cast<int32_t>(a)), Bits<float>::from(static_cast<int32_t>(b)))});
  }
};

// A pair of numbers of 16 bits as T, CUDA's type for it.
template <class T>
__device__ __forceinline__ T as_pair(uint32_t vector) {
  T pair;
  std::memcpy(&pair, &vector, sizeof pair);
  return pair;
}

template <class T>
__device__ __forceinline__ uint32_t as_bits(T pair) {
  uint32_t vector;
  std::memcpy(&vector, &pair, sizeof vector);
  return vector;
}

// CUDA's types for two numbers of 16 bits.
#if defined(EROSEG_CUDA_ON_HOST)
using BFloat16Pair = void;
using Float16Pair = void;
#else
using BFloat16Pair = __nv_bfloat162;
using Float16Pair = __half2;
#endif

// The function `larger` of Float32 for a type of 16 bits.
template <class Type, class Pair>
struct LargerOfPairs {
#if defined(EROSEG_CUDA_ON_HOST)
  static uint32_t larger(uint32_t a, uint32_t b) {
    float first[2], second[2];
    Type::unpack(a, first);
    Type::unpack(b, second);
    return Type::pack({fmaxf(first[0], second[0]), fmaxf(first[1], second[1])});
  }
#else
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    return as_bits(__hmax2(as_pair<Pair>(a), as_pair<Pair>(b)));
  }
#endif
};

struct BFloat16 : LargerOfPairs<BFloat16, BFloat16Pair> {
  using Element = uint16_t;
  static constexpr int kPixels = 2;
  static constexpr uint32_t kMinusInf = 0xff80ff80u;
  static constexpr Element kLowestFinite = 0xff7fu;
  static __device__ __forceinline__ float to_float(Element x) {
    return Bits<float>::from(static_cast<int32_t>(static_cast<uint32_t>(x) << 16));
  }
  static __device__ __forceinline__ void unpack(uint32_t vector, float (&out)[2]) {
    out[0] = Bits<float>::from(static_cast<int32_t>(vector << 16));
    out[1] = Bits<float>::from(static_cast<int32_t>(vector & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t pack(const float (&in)[2]) {
#if !defined(EROSEG_CUDA_ON_HOST)
    return as_bits(__floats2bfloat162_rn(in[0], in[1]));
#else
    // Round to nearest, ties to even; gradients are never NaN.
    const auto rounded = [](float x) {
      const auto bits = static_cast<uint32_t>(Bits<float>::of(x));
      return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    };
    return rounded(in[0]) | rounded(in[1]) << 16;
#endif
  }
};

struct Float16 : LargerOfPairs<Float16, Float16Pair> {
  using Element = uint16_t;
  static constexpr int kPixels = 2;
  static constexpr uint32_t kMinusInf = 0xfc00fc00u;
  static constexpr Element kLowestFinite = 0xfbffu;
#if !defined(EROSEG_CUDA_ON_HOST)
  static __device__ __forceinline__ float to_float(Element x) {
    __half half;
    std::memcpy(&half, &x, sizeof half);
    return __half2float(half);
  }
  static __device__ __forceinline__ void unpack(uint32_t vector, float (&out)[2]) {
    const float2 both = __half22float2(as_pair<Float16Pair>(vector));
    out[0] = both.x;
    out[1] = both.y;
  }
  static __device__ __forceinline__ uint32_t pack(const float (&in)[2]) {
    return as_bits(__floats2half2_rn(in[0], in[1]));
  }
#else
  static float to_float(Element x) {
    _Float16 half;
    std::memcpy(&half, &x, sizeof half);
    return static_cast<float>(half);
  }
  static void unpack(uint32_t vector, float (&out)[2]) {
    out[0] = to_float(static_cast<Element>(vector));
    out[1] = to_float(static_cast<Element>(vector >> 16));
  }
  static uint32_t pack(const float (&in)[2]) {
    const _Float16 halves[2] = {static_cast<_Float16>(in[0]), static_cast<_Float16>(in[1])};
    uint32_t vector;
    std::memcpy(&vector, halves, sizeof vector);
    return vector;
  }
#endif
};

// Eight bytes of logits, neighbouring pixels of a class: a thread's unit of access to shared memory.
template <class Type>
struct alignas(8) Vector {
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

  static __device__ __forceinline__ Vector pack(const float (&in)[kElements]) {
    Vector vector;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float part[Type::kPixels];
#pragma unroll
      for (int v = 0; v < Type::kPixels; ++v) part[v] = in[h * Type::kPixels + v];
      vector.halves[h] = Type::pack(part);
    }
    return vector;
  }
};

// Neighbours in memory, aligned so that one instruction reads or writes them, or 16 bytes of them where they are more.
template <class T, int kN>
struct alignas(sizeof(T) * kN < 16 ? sizeof(T) * kN : 16) AlignedVector {
  T at[kN];
};

// Writes neighbours of a map by one instruction. It is requested explicitly, since the compiler would merge a plain
// assignment with the branch that writes single elements.
template <int kN>
__device__ __forceinline__ void write_at_once(float* to, const AlignedVector<float, kN>& values) {
  static_assert(kN == 2 || kN == 4);
  if constexpr (kN == 4) {
    __stcg(reinterpret_cast<float4*>(to), float4{values.at[0], values.at[1], values.at[2], values.at[3]});
  } else {
    __stcg(reinterpret_cast<float2*>(to), float2{values.at[0], values.at[1]});
  }
}

// The label, or -1 if its pixel is void.
__device__ __forceinline__ int checked_label(int64_t label, int classes, int64_t ignore_index) {
  return is_class(label, classes) && label != ignore_index ? static_cast<int>(label) : -1;
}

// Calls f(data) with the labels as a pointer of their type.
template <class F>
__device__ __forceinline__ void with_labels(const Labels& labels, const F& f) {
  switch (labels.type) {
    case LabelType::kInt64:
      return f(static_cast<const int64_t*>(labels.data));
    case LabelType::kInt32:
      return f(static_cast<const int32_t*>(labels.data));
    default:
      return f(static_cast<const uint8_t*>(labels.data));
  }
}

// The labels of the first n of some neighbouring pixels; the others are void. All are loaded before the first is used,
// so that the thread waits for memory once.
template <int kPixels>
__device__ __forceinline__ void read_labels(const Labels& labels, int classes, int64_t index, int n,
                                            int (&out)[kPixels]) {
  with_labels(labels, [&](const auto* data) {
    using Label = std::decay_t<decltype(*data)>;
    using LabelVector = AlignedVector<Label, kPixels>;
    const Label* from = data + index;
    LabelVector loaded{};
    if (n == kPixels && reinterpret_cast<uintptr_t>(from) % alignof(LabelVector) == 0) {
      loaded = *reinterpret_cast<const LabelVector*>(from);
    } else {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        if (v < n) loaded.at[v] = from[v];
      }
    }
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      out[v] = v < n ? checked_label(static_cast<int64_t>(loaded.at[v]), classes, labels.ignore_index) : -1;
    }
  });
}

// x as an element in memory.
template <class Type>
__device__ __forceinline__ typename Type::Element to_element(float x) {
  if constexpr (Type::kPixels == 1) {
    return x;
  } else {
    const float both[2] = {x, x};
    return static_cast<typename Type::Element>(Type::pack(both));
  }
}

// Calls f(Type{}) for the type of the logits.
template <class F>
cudaError_t for_type(FloatType type, const F& f) {
  switch (type) {
    case FloatType::kFloat32:
      return f(Float32{});
    case FloatType::kFloat16:
      return f(Float16{});
    case FloatType::kBFloat16:
      return f(BFloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace eroseg::cuda
