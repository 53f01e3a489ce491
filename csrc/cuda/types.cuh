// The logits' types: a thread works on as many neighbouring pixels as fit into 4 bytes, its word.
#pragma once

#include <cstring>

#include "../jobs.h"
#include "platform.cuh"

namespace eroseg::cuda {

struct Float32 {
  using Element = float;
  static constexpr int kPixels = 1;
  static constexpr uint32_t kLowest = 0xff800000u;  // -inf in every pixel
  static __device__ __forceinline__ float to_float(Element x) { return x; }
  static __device__ __forceinline__ void unpack(uint32_t word, float (&out)[1]) {
    out[0] = Bits<float>::from(static_cast<int32_t>(word));
  }
  static __device__ __forceinline__ uint32_t pack(const float (&in)[1]) {
    return static_cast<uint32_t>(Bits<float>::of(in[0]));
  }
  // As pack, for floats that came out of unpack, or are infinite: nothing is rounded.
  static __device__ __forceinline__ uint32_t repack(const float (&in)[1]) { return pack(in); }

  // 0 for a pixel all of whose logits are finite, else NaN.
  struct Poison {
    float sum = 0.0f;
    __device__ __forceinline__ void add(uint32_t word) {
      sum = fmaf(Bits<float>::from(static_cast<int32_t>(word)), 0.0f, sum);
    }
    __device__ __forceinline__ float of(int) const { return sum; }
  };
};

#if defined(EROSEG_CUDA_ON_HOST)
template <class Type>
uint32_t pair_zero_times_plus(uint32_t word, uint32_t sums) {
  float pair[2], sum[2];
  Type::unpack(word, pair);
  Type::unpack(sums, sum);
  for (int v = 0; v < 2; ++v) sum[v] += pair[v] * 0.0f;
  return sum[0] == sum[0] ? (sum[1] == sum[1] ? 0u : 0x7fff0000u) : (sum[1] == sum[1] ? 0x7fffu : 0x7fff7fffu);
}
#endif

// The same for two pixels of 16 bits: 0 times their logits, summed as pairs.
template <class Type>
struct PairPoison {
  uint32_t sums = 0;
  __device__ __forceinline__ void add(uint32_t word) { sums = Type::zero_times_plus(word, sums); }
  __device__ __forceinline__ float of(int v) const {
    float both[2];
    Type::unpack(sums, both);
    return both[v];
  }
};

struct BFloat16 {
  using Element = uint16_t;
  static constexpr int kPixels = 2;
  static constexpr uint32_t kLowest = 0xff80ff80u;
  static __device__ __forceinline__ float to_float(Element x) {
    return Bits<float>::from(static_cast<int32_t>(static_cast<uint32_t>(x) << 16));
  }
  static __device__ __forceinline__ void unpack(uint32_t word, float (&out)[2]) {
    out[0] = Bits<float>::from(static_cast<int32_t>(word << 16));
    out[1] = Bits<float>::from(static_cast<int32_t>(word & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t pack(const float (&in)[2]) {
#if !defined(EROSEG_CUDA_ON_HOST)
    const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
    uint32_t word;
    std::memcpy(&word, &pair, sizeof word);
    return word;
#else
    // Round to nearest, ties to even; gradients are never NaN.
    const auto rounded = [](float x) {
      const auto bits = static_cast<uint32_t>(Bits<float>::of(x));
      return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    };
    return rounded(in[0]) | rounded(in[1]) << 16;
#endif
  }
  static __device__ __forceinline__ uint32_t repack(const float (&in)[2]) {
    return static_cast<uint32_t>(Bits<float>::of(in[0])) >> 16 |
           (static_cast<uint32_t>(Bits<float>::of(in[1])) & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t zero_times_plus(uint32_t word, uint32_t sums) {
#if !defined(EROSEG_CUDA_ON_HOST)
    __nv_bfloat162 pair, sum;
    std::memcpy(&pair, &word, sizeof pair);
    std::memcpy(&sum, &sums, sizeof sum);
    sum = __hfma2(pair, __floats2bfloat162_rn(0.0f, 0.0f), sum);
    std::memcpy(&sums, &sum, sizeof sums);
    return sums;
#else
    return pair_zero_times_plus<BFloat16>(word, sums);
#endif
  }
  using Poison = PairPoison<BFloat16>;
};

struct Float16 {
  using Element = uint16_t;
  static constexpr int kPixels = 2;
  static constexpr uint32_t kLowest = 0xfc00fc00u;
#if !defined(EROSEG_CUDA_ON_HOST)
  static __device__ __forceinline__ float to_float(Element x) {
    __half half;
    std::memcpy(&half, &x, sizeof half);
    return __half2float(half);
  }
  static __device__ __forceinline__ void unpack(uint32_t word, float (&out)[2]) {
    __half2 pair;
    std::memcpy(&pair, &word, sizeof pair);
    const float2 both = __half22float2(pair);
    out[0] = both.x;
    out[1] = both.y;
  }
  static __device__ __forceinline__ uint32_t pack(const float (&in)[2]) {
    const __half2 pair = __floats2half2_rn(in[0], in[1]);
    uint32_t word;
    std::memcpy(&word, &pair, sizeof word);
    return word;
  }
#else
  static float to_float(Element x) {
    _Float16 half;
    std::memcpy(&half, &x, sizeof half);
    return static_cast<float>(half);
  }
  static void unpack(uint32_t word, float (&out)[2]) {
    out[0] = to_float(static_cast<Element>(word));
    out[1] = to_float(static_cast<Element>(word >> 16));
  }
  static uint32_t pack(const float (&in)[2]) {
    const _Float16 halves[2] = {static_cast<_Float16>(in[0]), static_cast<_Float16>(in[1])};
    uint32_t word;
    std::memcpy(&word, halves, sizeof word);
    return word;
  }
#endif
  static __device__ __forceinline__ uint32_t repack(const float (&in)[2]) { return pack(in); }
  static __device__ __forceinline__ uint32_t zero_times_plus(uint32_t word, uint32_t sums) {
#if !defined(EROSEG_CUDA_ON_HOST)
    __half2 pair, sum;
    std::memcpy(&pair, &word, sizeof pair);
    std::memcpy(&sum, &sums, sizeof sum);
    sum = __hfma2(pair, __floats2half2_rn(0.0f, 0.0f), sum);
    std::memcpy(&sums, &sum, sizeof sums);
    return sums;
#else
    return pair_zero_times_plus<Float16>(word, sums);
#endif
  }
  using Poison = PairPoison<Float16>;
};

// The label of a pixel, -1 if it is void.
__device__ __forceinline__ int read_label(const Labels& labels, int classes, int64_t index) {
  int64_t label;
  switch (labels.type) {
    case LabelType::kInt64:
      label = static_cast<const int64_t*>(labels.data)[index];
      break;
    case LabelType::kInt32:
      label = static_cast<const int32_t*>(labels.data)[index];
      break;
    default:
      label = static_cast<const uint8_t*>(labels.data)[index];
  }
  const bool valid = label >= 0 && label < classes && label != labels.ignore_index;
  return valid ? static_cast<int>(label) : -1;
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
