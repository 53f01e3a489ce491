// Vectors of one SIMD level: types, loads and stores, conversions. Part of kernels_impl.h.
//
// The level has set EROSEG_LEVEL (a namespace), EROSEG_LANES (floats of a vector) and EROSEG_UNROLL (vectors worked on
// at once, so that their accumulators fill the registers).

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

constexpr int kLanes = EROSEG_LANES;
constexpr int kUnroll = EROSEG_UNROLL;
constexpr int64_t kBlock = kLanes * kUnroll;
constexpr float kInf = __builtin_inff(), kLowest = -3.402823466e38f;

}  // namespace

// Not in the unnamed namespace: Bits<F> is specialised below.
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));
typedef double D __attribute__((vector_size(8 * kLanes)));

}  // namespace eroseg::cpu::EROSEG_LEVEL

namespace eroseg {

template <>
struct Bits<cpu::EROSEG_LEVEL::F> {
  using F = cpu::EROSEG_LEVEL::F;
  using Int = cpu::EROSEG_LEVEL::I;
  using Unsigned = cpu::EROSEG_LEVEL::U;
  static EROSEG_INLINE Int of(F x) { return (Int)x; }
  static EROSEG_INLINE F from(Int bits) { return (F)bits; }
  static EROSEG_INLINE F to_float(Int x) { return __builtin_convertvector(x, F); }
};

}  // namespace eroseg

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

template <class V>
EROSEG_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
EROSEG_INLINE void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// Stores past the cache: memory is written without being read first. `to` is aligned to V.
template <class V>
EROSEG_INLINE void stream(void* to, V v) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
  } else if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
  } else if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
  } else {
    store(to, v);
  }
#else
  store(to, v);
#endif
}

// Other threads may see streamed stores later than ordinary stores that follow them: a thread calls this after its last
// streamed store, before it reports that it is done.
EROSEG_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

EROSEG_INLINE F minimum(F a, F b) { return a < b ? a : b; }
EROSEG_INLINE F maximum(F a, F b) { return a > b ? a : b; }

// table[index] in the lanes of the mask, 0 in the others.
EROSEG_INLINE F gather(const float* table, I index, I mask) {
#if defined(__x86_64__) && EROSEG_LANES == 16
  return (F)_mm512_mask_i32gather_ps((__m512)F{}, _mm512_movepi32_mask((__m512i)mask), (__m512i)index, table, 4);
#elif defined(__x86_64__) && EROSEG_LANES == 8
  return (F)_mm256_mask_i32gather_ps((__m256)F{}, table, (__m256i)index, (__m256)mask, 4);
#else
  F result{};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask[lane]) result[lane] = table[index[lane]];
  }
  return result;
#endif
}

// Lane i of the result is lane numbers[i] of v.
EROSEG_INLINE F permute(F v, I numbers) {
#if defined(__clang__)
  F result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = v[numbers[lane]];
  return result;
#else
  return __builtin_shuffle(v, numbers);
#endif
}

// Picks lanes by their numbers; those of b start at kLanes.
EROSEG_INLINE F shuffle(F a, F b, I numbers) {
#if defined(__clang__)
  F result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result[lane] = numbers[lane] < kLanes ? a[numbers[lane]] : b[numbers[lane] - kLanes];
  }
  return result;
#else
  return __builtin_shuffle(a, b, numbers);
#endif
}

// Which lanes of rows i and i + kStep exchange places in a transposition: those that differ from i in the bit kStep.
template <int kStep>
struct Exchange {
  constexpr Exchange() {
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool upper = (lane & kStep) != 0;
      low[lane] = upper ? kLanes + lane - kStep : lane;
      high[lane] = upper ? kLanes + lane : lane + kStep;
    }
  }
  int32_t low[kLanes]{}, high[kLanes]{};
};

template <int kStep = kLanes / 2>
EROSEG_INLINE void transpose(F (&rows)[kLanes]) {
  static constexpr Exchange<kStep> kExchange;
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kStep) != 0) continue;
    const F a = rows[i], b = rows[i + kStep];
    rows[i] = shuffle(a, b, load<I>(kExchange.low));
    rows[i + kStep] = shuffle(a, b, load<I>(kExchange.high));
  }
  if constexpr (kStep > 1) transpose<kStep / 2>(rows);
}

// Conversions between a type in memory and vectors of float32.

struct Float32 {
  using Element = float;
  static EROSEG_INLINE F load_vector(const float* from) { return load<F>(from); }
  using Vector = F;
  static EROSEG_INLINE F pack(F v) { return v; }
};

struct BFloat16 {
  using Element = uint16_t;
  static EROSEG_INLINE F load_vector(const uint16_t* from) {
    return (F)(__builtin_convertvector(load<H>(from), U) << 16);
  }
  using Vector = H;
  static EROSEG_INLINE H pack(F v) {
    const U bits = (U)v;  // finite; rounds half to even
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, H);
  }
};

struct Float16 {
  using Element = uint16_t;
  static EROSEG_INLINE F load_vector(const uint16_t* from) {
    const U half = __builtin_convertvector(load<H>(from), U);
    // The half's exponent and mantissa as a float's, 112 too small in the exponent: a product by 2^112 corrects that,
    // for subnormal halves too. Infinity and NaN had the largest exponent and keep it.
    const U magnitude = (half & 0x7fff) << 13;
    const U scaled = (U)((F)magnitude * 5.192296858534828e33f);
    const U special = magnitude | 0x7f800000;
    const U bits = (magnitude >= (0x7c00u << 13)) ? special : scaled;
    return (F)(bits | ((half & 0x8000) << 16));
  }
  using Vector = H;
  static EROSEG_INLINE H pack(F v) {
    const U sign = ((U)v >> 16) & 0x8000;
    const U bits = (U)v & 0x7fffffff;  // finite and below 65520: a gradient is in [-1, 1]
    // Below 2^-14 a half is a multiple of 2^-24, the spacing of floats in [0.5, 1): adding 0.5 rounds to that.
    const U subnormal = (U)((F)bits + 0.5f) - 0x3f000000;
    const U normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
    return __builtin_convertvector((bits < 0x38800000 ? subnormal : normal) | sign, H);
  }
};

// Calls f with the one of these that stands for `type`.
template <class Call>
EROSEG_INLINE auto with_type(FloatType type, const Call& f) {
  if (type == FloatType::kFloat32) return f(Float32{});
  if (type == FloatType::kFloat16) return f(Float16{});
  return f(BFloat16{});
}

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
