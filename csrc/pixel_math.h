// All maths of a single pixel, written once for the host and the device.
//
// Every function is a template over F: float on the device and in tests, a GNU vector of floats in the CPU kernels
// (comparisons of such vectors give integer masks, and `mask ? a : b` selects per lane, so the same text serves both).
// No torch header, and no branch that depends on a pixel.
//
// The terms of a pixel with logits z and label y, from which every weight and direction is made:
//   m = max over c != y of z_c,  S = sum over c != y of exp(z_c - m),  so 1 <= S <= C - 1,
//   L = z_y - m - log S, the log-odds of the label.
// S leaves the label's term out instead of subtracting it: L never saturates, and 1 - p_y = sigmoid(-L) does not
// cancel. The gradient of the negative log-odds is exp(z_c - m) / S for c != y and -1 for y; cross-entropy's is 1 - p_y
// times it.
#pragma once

#include <cstdint>
#include <cstring>

#include "enums.h"

#if defined(__CUDACC__)
#define EROSEG_INLINE __host__ __device__ __forceinline__
#else
#define EROSEG_INLINE inline __attribute__((always_inline))
#endif

namespace eroseg {

// Integers of F's width, and F's bits as such; vector types of a CPU level specialise it.
template <class F>
struct Bits;

template <>
struct Bits<float> {
  using Int = int32_t;
  using Unsigned = uint32_t;
  static EROSEG_INLINE int32_t of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  }
  static EROSEG_INLINE float from(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  static EROSEG_INLINE float to_float(int32_t x) { return static_cast<float>(x); }
};

template <class F>
EROSEG_INLINE F splat(float value) {
  return F{} + value;
}

template <class F>
EROSEG_INLINE F absolute(F x) {
  return Bits<F>::from(Bits<F>::of(x) & 0x7fffffff);
}

// exp(x) for x <= 88, relative error below 3e-7; exactly 0 for x < -87 and for NaN.
// x = n ln2 + f with |f| <= ln2 / 2: a polynomial for exp(f), then n is added to the exponent's bits. Adding 1.5 * 2^23
// rounds x / ln2 to the integer n and leaves it in the low bits, with no conversion that a huge x could overflow.
template <class F>
EROSEG_INLINE F exponential(F x) {
  constexpr float kRound = 12582912.0f;
  const F shifted = x * 1.44269504f + kRound;
  const F n = shifted - kRound;
  const F f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const F p = ((0.008312525f * f + 0.041890114f) * f + 0.166671145f) * f + 0.499992318f;
  const F y = (p * f) * f + f + 1.0f;
  // Unsigned, since the sum may overflow where x is out of range; the rounding constant's own bits shift out.
  using Unsigned = typename Bits<F>::Unsigned;
  const F scaled =
      Bits<F>::from((typename Bits<F>::Int)((Unsigned)Bits<F>::of(y) + ((Unsigned)Bits<F>::of(shifted) << 23)));
  return x >= -87.0f ? scaled : splat<F>(0.0f);
}

// log(x) for a normal x > 0, relative error below 2e-7: x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
template <class F>
EROSEG_INLINE F log_positive(F x) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  using Unsigned = typename Bits<F>::Unsigned;
  const auto offset = (typename Bits<F>::Int)((Unsigned)Bits<F>::of(x) - (uint32_t)kSqrtHalf);
  const F e = Bits<F>::to_float(offset >> 23);
  const F f = Bits<F>::from((offset & 0x007fffff) + kSqrtHalf) - 1.0f;
  F p = splat<F>(0.087004349f);
  p = p * f - 0.142674931f;
  p = p * f + 0.149147708f;
  p = p * f - 0.165775840f;
  p = p * f + 0.199630635f;
  p = p * f - 0.250013371f;
  p = p * f + 0.333339107f;
  const F square = f * f;
  return ((p * f) * square - 0.5f * square + f) + e * 0.693147181f;
}

template <class F>
EROSEG_INLINE F sigmoid(F x) {
  const F e = exponential(-absolute(x));
  return (x >= 0.0f ? splat<F>(1.0f) : e) / (1.0f + e);
}

template <class F>
EROSEG_INLINE F log_sigmoid(F x) {
  return (x < 0.0f ? x : splat<F>(0.0f)) - log_positive(1.0f + exponential(-absolute(x)));
}

// The weight of a pixel with eroded confidence q >= 0 in a front of width tau; q = +inf weighs 0.
template <class F>
EROSEG_INLINE F front_weight(Front front, F q, float tau) {
  if (front == Front::kHard) return q <= tau ? splat<F>(1.0f) : splat<F>(0.0f);
  // sech^2(q / 2 tau) by an exponential that cannot overflow.
  const F e = exponential(-q / tau);
  const F cosh_scaled = 1.0f + e;
  return 4.0f * e / (cosh_scaled * cosh_scaled);
}

struct MethodSettings {
  Method method;
  bool targeted;
  float lambda;       // segpgd
  float q_minus_one;  // tsallis
};

// The cross-entropy weight of a pixel, times 1 - p_y, so that it multiplies the gradient of the negative log-odds.
// `weighty` marks the pixels that segpgd and mce weigh more: correct ones, or wrong ones if targeted. `norm` is, for
// cospgd, sum over c != y of (exp(z_c - m) / S)^2.
template <class F, class Mask>
EROSEG_INLINE F method_weight(const MethodSettings& settings, F log_odds, Mask weighty, F norm) {
  const F p_rest = sigmoid(-log_odds);
  const F p_label = sigmoid(log_odds);
  switch (settings.method) {
    case Method::kPgd:
      return p_rest;
    case Method::kSegPgd:
      return p_rest * (weighty ? splat<F>(1.0f - settings.lambda) : splat<F>(settings.lambda));
    case Method::kCosPgd: {
      // p_y / sqrt(p_y^2 + (1 - p_y)^2 norm), both divided by the larger of p_y and 1 - p_y: their squares underflow.
      const F e = exponential(-absolute(log_odds));
      const F label = log_odds >= 0.0f ? splat<F>(1.0f) : e;
      const F rest = log_odds >= 0.0f ? e : splat<F>(1.0f);
      const F cosine = label * exponential(-0.5f * log_positive(label * label + rest * rest * norm));
      return p_rest * (settings.targeted ? 1.0f - cosine : cosine);
    }
    case Method::kMaskedCe:
      return weighty ? p_rest : splat<F>(0.0f);
    case Method::kJs:
      return p_rest * 0.5f * p_label * (log_positive(1.0f + p_label) - log_sigmoid(log_odds));
    case Method::kTsallis:
      return p_rest * exponential(settings.q_minus_one * log_sigmoid(log_odds));
  }
  return splat<F>(0.0f);
}

// Comparisons with NaN are false, so NaN stays.
template <class F>
EROSEG_INLINE F clamped(F value, F low, F high) {
  return value < low ? low : (value > high ? high : value);
}

// x_adv after a signed step in the l_inf ball around x; a NaN gradient makes a NaN pixel.
template <class F>
EROSEG_INLINE F linf_stepped(F x_adv, F x, F grad, float eps, float alpha, float low, float high) {
  const F sign = grad > 0.0f ? splat<F>(1.0f) : (grad < 0.0f ? splat<F>(-1.0f) : grad);
  return clamped(clamped(x_adv + alpha * sign, x - eps, x + eps), splat<F>(low), splat<F>(high));
}

}  // namespace eroseg
