// The fused CPU kernels, for one SIMD level.
//
// A level_*.cpp file sets the compiler's target, defines EROSEG_LEVEL (a namespace), EROSEG_LANES (floats of a vector)
// and EROSEG_UNROLL (vectors worked on at once, so that their accumulators fill the registers) and includes this.
// Everything here has internal linkage or lives in that namespace: no function compiled for a CPU that is not there can
// be picked by the linker.
//
// erosion_grad runs down the rows of a band of one image:
//   1. Reduce row y: read its logits once, in blocks of kBlock pixels; keep exp(z_c - m) of the row in scratch memory,
//      and per pixel S, L, confidence, right (reduce_block).
//   2. Erode: row y's confidences are level 0; level i of row y - i is a 3x3 erosion of level i - 1, whose next row has
//      just become known. Three rows per level are kept. After level r, q of row y - r is final.
//   3. Write row y - r: weight, and exp(z_c - m) * (w / S) straight from scratch (write_block).
// So the logits are read once and the gradient written once; r + 1 rows of exponentials stay in cache between 1 and 3.
// A band recomputes r rows above and below itself. Row y's exponentials lie in slot y mod (r + 1).
//
// Scratch rows are block-major, [block][class][kBlock]: a block is contiguous, and no two classes share a cache set.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

constexpr int kLanes = EROSEG_LANES;
constexpr int kUnroll = EROSEG_UNROLL;
constexpr int64_t kBlock = kLanes * kUnroll;
constexpr float kInf = __builtin_inff();

}  // namespace

// Not in the unnamed namespace: Bits<F> is specialised below.
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

}  // namespace eroseg::cpu::EROSEG_LEVEL

namespace eroseg {

template <>
struct Bits<cpu::EROSEG_LEVEL::F> {
  using F = cpu::EROSEG_LEVEL::F;
  using Int = cpu::EROSEG_LEVEL::I;
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

EROSEG_INLINE F minimum(F a, F b) { return a < b ? a : b; }
EROSEG_INLINE F maximum(F a, F b) { return a > b ? a : b; }

// Conversions between a type in memory and float32, for a vector and for one element.

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
    // The half's exponent and mantissa as a float's, 112 too small in the exponent: a product by 2^112 mends that, for
    // subnormal halves too. Infinity and NaN had the largest exponent and keep it.
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

// Blocks at the right edge and channels_last memory go through a buffer in the type of the logits, so that conversion
// is by vectors there as well. Its tiles are as many classes as a cache line of channels_last float32 holds.
constexpr int64_t kTile = 16;

template <class Type>
void gather_block(const typename Type::Element* from, int64_t class_stride, int64_t pixel_stride, int64_t channels,
                  int64_t n, float* z) {
  typename Type::Element buffer[kTile][kBlock] = {};
  for (int64_t first = 0; first < channels; first += kTile) {
    const int64_t tile = channels - first < kTile ? channels - first : kTile;
    const auto* corner = from + first * class_stride;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < tile; ++c) buffer[c][i] = corner[c * class_stride + i * pixel_stride];
    }
    for (int64_t c = 0; c < tile; ++c) {
      float* row = z + (first + c) * kBlock;
      for (int u = 0; u < kUnroll; ++u) store(row + u * kLanes, Type::load_vector(buffer[c] + u * kLanes));
    }
  }
}

template <class Type>
void scatter_block(const float* g, int64_t class_stride, int64_t pixel_stride, int64_t channels, int64_t n,
                   typename Type::Element* to) {
  typename Type::Element buffer[kTile][kBlock];
  for (int64_t first = 0; first < channels; first += kTile) {
    const int64_t tile = channels - first < kTile ? channels - first : kTile;
    for (int64_t c = 0; c < tile; ++c) {
      const float* row = g + (first + c) * kBlock;
      for (int u = 0; u < kUnroll; ++u) store(buffer[c] + u * kLanes, Type::pack(load<F>(row + u * kLanes)));
    }
    auto* corner = to + first * class_stride;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < tile; ++c) corner[c * class_stride + i * pixel_stride] = buffer[c][i];
    }
  }
}

// What a row of pixels leaves between its reduction and its gradient; arrays of `stride` elements.
struct Row {
  float* e;                  // [blocks][classes][kBlock]: logits, then exp(z_c - m), 0 at the label
  int32_t* label;            // -1 on void pixels and beyond the image
  int32_t* predicted;        // arg max
  float* sum;                // S
  float* log_odds;           // L
  float* signed_confidence;  // L, or the top class's; NaN where logits are not finite, +inf on void pixels
  float* norm;               // method_weight's
};

// Which further per-pixel reductions a caller needs.
enum class Extra { kNone, kTop, kSquares, kSigmoids };

int64_t workspace_stride(int64_t width) { return (width + kBlock - 1) / kBlock * kBlock; }

// Scratch memory as rows, and some floats beside them.
class Workspace {
 public:
  Workspace(const Shape& shape, int64_t rows, int64_t floats_beside, Scratch& scratch)
      : stride_(workspace_stride(shape.width)),
        row_floats_((shape.classes() + 6) * stride_),
        base_(scratch.floats(rows * row_floats_ + floats_beside)),
        beside_(base_ + rows * row_floats_),
        classes_(shape.classes()) {}
  int64_t stride() const { return stride_; }
  float* beside() const { return beside_; }
  Row row(int64_t slot) const {
    float* p = base_ + slot * row_floats_;
    Row row;
    row.e = p;
    p += classes_ * stride_;
    row.label = reinterpret_cast<int32_t*>(p);
    row.predicted = reinterpret_cast<int32_t*>(p + stride_);
    row.sum = p + 2 * stride_;
    row.log_odds = p + 3 * stride_;
    row.signed_confidence = p + 4 * stride_;
    row.norm = p + 5 * stride_;
    return row;
  }

 private:
  int64_t stride_, row_floats_;
  float* base_;
  float* beside_;
  int64_t classes_;
};

template <class T>
void read_labels_as(const Labels& labels, int64_t classes, int64_t first, int64_t n, int64_t stride, int32_t* out) {
  const T* from = static_cast<const T*>(labels.data) + first;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t label = static_cast<int64_t>(from[i]);
    const bool valid = label >= 0 && label < classes && label != labels.ignore_index;
    out[i] = valid ? static_cast<int32_t>(label) : -1;
  }
  for (int64_t i = n; i < stride; ++i) out[i] = -1;
}

void read_labels(const Input& input, int64_t image, int64_t y, int64_t stride, int32_t* out) {
  const Shape& shape = input.shape;
  const int64_t first = (image * shape.height + y) * shape.width;
  switch (input.labels.type) {
    case LabelType::kInt64:
      return read_labels_as<int64_t>(input.labels, shape.classes(), first, shape.width, stride, out);
    case LabelType::kInt32:
      return read_labels_as<int32_t>(input.labels, shape.classes(), first, shape.width, stride, out);
    case LabelType::kUInt8:
      return read_labels_as<uint8_t>(input.labels, shape.classes(), first, shape.width, stride, out);
  }
}

// The first pass over a block: the logits go to scratch as float32, and the maxima are taken on the way.
struct Maxima {
  F others[kUnroll];  // m
  I top[kUnroll];     // the class of m, the lowest on ties
  F label[kUnroll];   // z_y, 0 on void pixels
  F poison[kUnroll];  // 0, or NaN where a logit is not finite
};

template <class Type, bool in_memory>
EROSEG_INLINE void take_maxima(const typename Type::Element* from, int64_t class_stride, int64_t first_class,
                               int64_t classes, const int32_t* label, float* z, Maxima& out) {
  F others[kUnroll], of_label[kUnroll], poison[kUnroll];
  I top[kUnroll], labels[kUnroll];
  for (int u = 0; u < kUnroll; ++u) {
    others[u] = splat<F>(-kInf);
    of_label[u] = poison[u] = F{};
    top[u] = I{};
    labels[u] = load<I>(label + u * kLanes);
  }
  for (int64_t c = 0; c < classes; ++c) {
    const I index = I{} + static_cast<int32_t>(c);
    for (int u = 0; u < kUnroll; ++u) {
      float* slot = z + c * kBlock + u * kLanes;
      F value;
      if constexpr (in_memory) {
        value = c < first_class ? F{} : Type::load_vector(from + (c - first_class) * class_stride + u * kLanes);
        store(slot, value);
      } else {
        value = load<F>(slot);
      }
      const I is_label = labels[u] == index;
      of_label[u] = is_label ? value : of_label[u];
      const F other = is_label ? splat<F>(-kInf) : value;
      const I better = other > others[u];
      others[u] = better ? other : others[u];
      top[u] = better ? index : top[u];
      poison[u] += value * 0.0f;
    }
  }
  for (int u = 0; u < kUnroll; ++u) {
    out.others[u] = others[u];
    out.top[u] = top[u];
    out.label[u] = of_label[u];
    out.poison[u] = poison[u];
  }
}

// Log-odds of the predicted class plus log(C - 1), in a pass of its own over the logits in scratch.
F top_confidence(const float* z, int64_t classes, I predicted, F z_top) {
  F rest = splat<F>(-kInf);
  for (int64_t c = 0; c < classes; ++c) {
    const F value = load<F>(z + c * kBlock);
    rest = maximum(rest, predicted == static_cast<int32_t>(c) ? splat<F>(-kInf) : value);
  }
  F sum = F{};
  for (int64_t c = 0; c < classes; ++c) {
    const F e = exponential(load<F>(z + c * kBlock) - rest);
    sum += predicted == static_cast<int32_t>(c) ? F{} : e;
  }
  return maximum(F{}, (z_top - rest - log_positive(sum)) + __builtin_logf(static_cast<float>(classes - 1)));
}

// sum over c of (sigma(z_c) / sigma(z_y))^2, by logarithms: both sigmas may underflow.
F sum_squared_sigmoids(const float* z, int64_t classes, F z_label) {
  const F label = log_sigmoid(z_label);
  F sum = F{};
  for (int64_t c = 0; c < classes; ++c) {
    const F gap = 2.0f * (log_sigmoid(load<F>(z + c * kBlock)) - label);
    sum += exponential(gap > 80.0f ? splat<F>(80.0f) : gap);
  }
  return sum;
}

// Where the block of pixels [x, x + kBlock) of a row lies in logits or gradient. Binary segmentation's class 0 is in
// scratch only: memory starts at first_class.
struct BlockInMemory {
  BlockInMemory(const Input& input, int64_t image, int64_t y, int64_t x)
      : channels(input.shape.channels),
        first_class(input.shape.classes() - channels),
        class_stride(input.logits.channels_last ? 1 : input.shape.pixels()),
        pixel_stride(input.logits.channels_last ? channels : 1),
        offset(image * channels * input.shape.pixels() + (y * input.shape.width + x) * pixel_stride),
        n(input.shape.width - x < kBlock ? input.shape.width - x : kBlock),
        vectors(n == kBlock && pixel_stride == 1) {}
  int64_t channels, first_class, class_stride, pixel_stride, offset, n;
  bool vectors;  // whether every class's pixels can be loaded and stored as vectors
};

template <class Type>
void stage_block(const Input& input, const BlockInMemory& block, const int32_t* label, float* z, Maxima& maxima) {
  const int64_t classes = input.shape.classes();
  const auto* from = static_cast<const typename Type::Element*>(input.logits.data) + block.offset;
  if (block.vectors) {
    take_maxima<Type, true>(from, block.class_stride, block.first_class, classes, label, z, maxima);
  } else {
    if (block.first_class > 0) std::memset(z, 0, kBlock * sizeof(float));
    gather_block<Type>(from, block.class_stride, block.pixel_stride, block.channels, block.n,
                       z + block.first_class * kBlock);
    take_maxima<Type, false>(nullptr, 0, 0, classes, label, z, maxima);
  }
}

void stage_block(const Input& input, int64_t image, int64_t y, int64_t x, const int32_t* label, float* z,
                 Maxima& maxima) {
  const BlockInMemory block(input, image, y, x);
  switch (input.logits.type) {
    case FloatType::kFloat32:
      return stage_block<Float32>(input, block, label, z, maxima);
    case FloatType::kFloat16:
      return stage_block<Float16>(input, block, label, z, maxima);
    case FloatType::kBFloat16:
      return stage_block<BFloat16>(input, block, label, z, maxima);
  }
}

// Fills the row at pixels [x, x + kBlock) from the logits; row.label is there already.
void reduce_block(const Input& input, int64_t image, int64_t y, int64_t x, Extra extra, const Row& row) {
  const int64_t classes = input.shape.classes();
  float* z = row.e + x * classes;
  const int32_t* label = row.label + x;
  Maxima maxima;
  stage_block(input, image, y, x, label, z, maxima);

  I is_right[kUnroll];
  F signed_confidence[kUnroll];
  for (int u = 0; u < kUnroll; ++u) {
    const I labels = load<I>(label + u * kLanes);
    const F gap = maxima.label[u] - maxima.others[u];
    is_right[u] = ((gap > 0.0f) | ((gap == 0.0f) & (labels < maxima.top[u]))) & (labels >= 0);
    const I predicted = is_right[u] ? labels : maxima.top[u];
    store(row.predicted + x + u * kLanes, predicted);
    if (extra == Extra::kTop) {
      const F top =
          top_confidence(z + u * kLanes, classes, predicted, is_right[u] ? maxima.label[u] : maxima.others[u]);
      signed_confidence[u] = is_right[u] ? top : -top;
    }
    if (extra == Extra::kSigmoids) {
      store(row.norm + x + u * kLanes, sum_squared_sigmoids(z + u * kLanes, classes, maxima.label[u]));
    }
  }

  F sum[kUnroll] = {};
  for (int64_t c = 0; c < classes; ++c) {
    for (int u = 0; u < kUnroll; ++u) {
      float* slot = z + c * kBlock + u * kLanes;
      const F all = exponential(load<F>(slot) - maxima.others[u]);
      const F e = load<I>(label + u * kLanes) == static_cast<int32_t>(c) ? F{} : all;
      store(slot, e);
      sum[u] += e;
    }
  }
  if (extra == Extra::kSquares) {
    for (int u = 0; u < kUnroll; ++u) {
      F squares = F{};
      for (int64_t c = 0; c < classes; ++c) {
        const F e = load<F>(z + c * kBlock + u * kLanes);
        squares += e * e;
      }
      store(row.norm + x + u * kLanes, squares / (sum[u] * sum[u]));
    }
  }
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = x + u * kLanes;
    const F log_odds = (maxima.label[u] - maxima.others[u]) - log_positive(sum[u]);
    F confidence = extra == Extra::kTop ? signed_confidence[u] : log_odds;
    confidence = maxima.poison[u] == 0.0f ? confidence : splat<F>(__builtin_nanf(""));
    confidence = load<I>(label + u * kLanes) < 0 ? splat<F>(kInf) : confidence;
    store(row.sum + i, sum[u]);
    store(row.log_odds + i, log_odds);
    store(row.signed_confidence + i, confidence);
  }
}

void reduce_row(const Input& input, int64_t image, int64_t y, Extra extra, int64_t stride, const Row& row) {
  read_labels(input, image, y, stride, row.label);
  for (int64_t x = 0; x < input.shape.width; x += kBlock) reduce_block(input, image, y, x, extra, row);
}

// A gradient larger than this does not stay in a cache until the model's backward reads it, and is streamed.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

template <class Type, bool streams>
void write_vectors(const BlockInMemory& block, const float* e, const I* label, const F* weight, const F* scale,
                   typename Type::Element* to) {
  for (int64_t c = 0; c < block.channels; ++c) {
    const auto index = static_cast<int32_t>(c + block.first_class);
    for (int u = 0; u < kUnroll; ++u) {
      const F g = label[u] == index ? -weight[u] : load<F>(e + index * kBlock + u * kLanes) * scale[u];
      auto* at = to + c * block.class_stride + u * kLanes;
      if constexpr (streams) {
        stream(at, Type::pack(g));
      } else {
        store(at, Type::pack(g));
      }
    }
  }
}

// Writes weight * dl/dz of a block; the weight is 0 wherever there must be no gradient.
template <class Type>
void write_block(const Input& input, int64_t image, int64_t y, int64_t x, const Row& row, const F* weight, void* grad) {
  const BlockInMemory block(input, image, y, x);
  const int64_t classes = input.shape.classes();
  auto* to = static_cast<typename Type::Element*>(grad) + block.offset;
  float* e = row.e + x * classes;

  F scale[kUnroll];
  I label[kUnroll];
  for (int u = 0; u < kUnroll; ++u) {
    // S is meaningless where logits are not finite; the weight is 0 there.
    scale[u] = weight[u] == 0.0f ? F{} : weight[u] / load<F>(row.sum + x + u * kLanes);
    label[u] = load<I>(row.label + x + u * kLanes);
  }
  if (block.vectors) {
    const int64_t bytes = static_cast<int64_t>(sizeof(typename Type::Element));
    const bool aligned =
        (reinterpret_cast<uintptr_t>(to) | (block.class_stride * bytes)) % sizeof(typename Type::Vector) == 0;
    const bool large = input.shape.batch * block.channels * input.shape.pixels() * bytes >= kStreamBytes;
    (aligned && large ? write_vectors<Type, true> : write_vectors<Type, false>)(block, e, label, weight, scale, to);
    return;
  }
  for (int64_t c = block.first_class; c < classes; ++c) {
    for (int u = 0; u < kUnroll; ++u) {
      float* slot = e + c * kBlock + u * kLanes;
      store(slot, label[u] == static_cast<int32_t>(c) ? -weight[u] : load<F>(slot) * scale[u]);
    }
  }
  scatter_block<Type>(e + block.first_class * kBlock, block.class_stride, block.pixel_stride, block.channels, block.n,
                      to);
}

void write_block(const Input& input, int64_t image, int64_t y, int64_t x, const Row& row, const F* weight, void* grad) {
  switch (input.logits.type) {
    case FloatType::kFloat32:
      return write_block<Float32>(input, image, y, x, row, weight, grad);
    case FloatType::kFloat16:
      return write_block<Float16>(input, image, y, x, row, weight, grad);
    case FloatType::kBFloat16:
      return write_block<BFloat16>(input, image, y, x, row, weight, grad);
  }
}

// Level 0 of the erosion: NaN lends nothing.
EROSEG_INLINE F score_of(F signed_confidence) {
  const F score = absolute(signed_confidence);
  return score <= kInf ? score : splat<F>(kInf);
}

// The rows of one level that the next one needs, in a ring; every row has a margin on both sides, filled once.
class Ring {
 public:
  Ring() = default;
  Ring(float* memory, int64_t stride, int64_t rows, float margin)
      : memory_(memory), pitch_(stride + 2 * kMargin), rows_(rows) {
    for (int64_t i = 0; i < rows * pitch_; ++i) memory[i] = margin;
  }
  static int64_t floats(int64_t stride, int64_t rows) { return rows * (stride + 2 * kMargin); }
  float* row(int64_t y) const { return memory_ + (y % rows_ + rows_) % rows_ * pitch_ + kMargin; }

 private:
  static constexpr int64_t kMargin = 16;
  float* memory_ = nullptr;
  int64_t pitch_ = 0, rows_ = 1;
};

// One row of a 3x3 erosion whose outer values are `rise`; the rows have margins.
void erode_row(const float* const (&rows)[3], float rise, int64_t stride, float* out) {
  for (int64_t x = 0; x < stride; x += kLanes) {
    F lowest = splat<F>(kInf);
    for (const float* row : rows) {
      for (int64_t dx = -1; dx <= 1; ++dx) lowest = minimum(lowest, load<F>(row + x + dx));
    }
    store(out + x, minimum(load<F>(rows[1] + x), lowest + rise));
  }
}

// The same, crossing only between pixels of one predicted class; the class rows have margins too.
void erode_row_within(const float* const (&rows)[3], const int32_t* const (&classes)[3], float rise, int64_t stride,
                      float* out) {
  for (int64_t x = 0; x < stride; x += kLanes) {
    const I own = load<I>(classes[1] + x);
    F lowest = splat<F>(kInf);
    for (int i = 0; i < 3; ++i) {
      for (int64_t dx = -1; dx <= 1; ++dx) {
        const F value = load<F>(rows[i] + x + dx);
        lowest = minimum(lowest, load<I>(classes[i] + x + dx) == own ? value : splat<F>(kInf));
      }
    }
    store(out + x, minimum(load<F>(rows[1] + x), lowest + rise));
  }
}

// The erosion as a pipeline over rows: rows go in from the top, and row y - radius comes out when row y has gone in.
// Rows outside the image go in as +inf; whatever they receive on the way is no less than what reaches the same pixel
// inside the image, and the class -1 of their pixels stops a geodesic erosion.
class ErosionPipeline {
 public:
  ErosionPipeline(int radius, bool geodesic, float rise, int64_t stride, float* memory)
      : radius_(radius), geodesic_(geodesic), rise_(rise), stride_(stride) {
    for (int level = 0; level <= radius; ++level) {
      levels_[level] = Ring(memory, stride, 3, kInf);
      memory += Ring::floats(stride, 3);
    }
    if (geodesic) classes_ = Ring(memory, stride, kClassRows, Bits<float>::from(-1));
  }
  static int64_t floats(int radius, bool geodesic, int64_t stride) {
    return (radius + 1) * Ring::floats(stride, 3) + (geodesic ? Ring::floats(stride, kClassRows) : 0);
  }
  // Where row y's scores have to be put before push(y), and its classes if the erosion is geodesic.
  float* scores(int64_t y) const { return levels_[0].row(y); }
  int32_t* predicted(int64_t y) const { return reinterpret_cast<int32_t*>(classes_.row(y)); }

  // Returns the eroded row y - radius; it is meaningful once radius rows on either side of it have gone in.
  const float* push(int64_t y) {
    for (int level = 1; level <= radius_; ++level) {
      const Ring& from = levels_[level - 1];
      const int64_t row = y - level;
      const float* const rows[3] = {from.row(row - 1), from.row(row), from.row(row + 1)};
      float* out = levels_[level].row(row);
      if (geodesic_) {
        const int32_t* const classes[3] = {predicted(row - 1), predicted(row), predicted(row + 1)};
        erode_row_within(rows, classes, rise_, stride_, out);
      } else {
        erode_row(rows, rise_, stride_, out);
      }
    }
    return levels_[radius_].row(y - radius_);
  }

 private:
  static constexpr int64_t kClassRows = kMaxRadius + 2;
  int radius_;
  bool geodesic_;
  float rise_;
  int64_t stride_;
  Ring levels_[kMaxRadius + 1];
  Ring classes_;
};

// Counts of a row in vectors of lanes, added up in a fixed order at its end.
class RowCounter {
 public:
  EROSEG_INLINE void add(I valid, I right, I front, F moved) {
    valid_ -= valid;  // a mask's lanes are 0 or -1
    right_ -= right;
    front_ -= front;
    movement_ += __builtin_convertvector(moved, D);
  }
  RowStats total() const {
    RowStats stats;
    for (int i = 0; i < kLanes; ++i) {
      stats.valid += valid_[i];
      stats.right += right_[i];
      stats.front += front_[i];
      stats.movement += movement_[i];
    }
    return stats;
  }

 private:
  typedef double D __attribute__((vector_size(8 * kLanes)));
  I valid_{}, right_{}, front_{};
  D movement_{};
};

Extra extra_of(Confidence confidence) { return confidence == Confidence::kTop ? Extra::kTop : Extra::kNone; }

// `before` is the row's previous log-odds, or its present ones; q has been through the erosion.
void write_erosion_row(const ErosionGrad& job, int64_t image, int64_t y, const Row& row, const float* q,
                       const float* before) {
  const float tau = job.tau[image];
  RowCounter counter;
  for (int64_t x = 0; x < job.input.shape.width; x += kBlock) {
    F weight[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = x + u * kLanes;
      const I label = load<I>(row.label + i);
      const I valid = label >= 0;
      const F now = load<F>(row.signed_confidence + i);
      const I finite = now == now;
      F w = front_weight(job.front, load<F>(q + i), tau);
      if (job.direction == Direction::kCrossEntropy) w *= sigmoid(-load<F>(row.log_odds + i));
      weight[u] = (valid & finite) ? (job.targeted ? -w : w) : F{};

      const F was = load<F>(before + i);
      const I in_front = valid & (absolute(was) <= tau);
      F moved = in_front ? (job.targeted ? now - was : was - now) : F{};
      moved = (valid & ~finite) ? now : moved;
      counter.add(valid, valid & (load<I>(row.predicted + i) == label), in_front, moved);
    }
    write_block(job.input, image, y, x, row, weight, job.grad);
  }
  job.rows[image * job.input.shape.height + y] = counter.total();
}

void erosion_grad(const ErosionGrad& job, int64_t image, int64_t row_begin, int64_t row_end, Scratch& scratch) {
  const Shape& shape = job.input.shape;
  const int64_t width = shape.width;
  const int radius = job.radius;
  const bool geodesic = job.within == Within::kClass;
  const int64_t slots = radius + 1;
  const int64_t stride = workspace_stride(width);
  const Workspace workspace(shape, slots, ErosionPipeline::floats(radius, geodesic, stride) + stride, scratch);
  float* before = workspace.beside();
  ErosionPipeline pipeline(radius, geodesic, job.slope * job.tau[image], stride, before + stride);

  for (int64_t y = row_begin - radius; y < row_end + radius; ++y) {
    float* scores = pipeline.scores(y);
    const bool inside = y >= 0 && y < shape.height;
    if (inside) {
      const Row row = workspace.row(y % slots);
      reduce_row(job.input, image, y, extra_of(job.confidence), stride, row);
      for (int64_t x = 0; x < stride; x += kLanes) {
        // Beyond the image's width the row holds labels of -1, which scored +inf.
        store(scores + x, score_of(load<F>(row.signed_confidence + x)));
      }
      if (geodesic) {
        int32_t* predicted = pipeline.predicted(y);
        std::memcpy(predicted, row.predicted, width * sizeof(int32_t));
        for (int64_t x = width; x < stride; ++x) predicted[x] = -1;
      }
    } else {
      for (int64_t x = 0; x < stride; ++x) scores[x] = kInf;
      if (geodesic) std::memset(pipeline.predicted(y), 0xff, stride * sizeof(int32_t));
    }
    const float* q = pipeline.push(y);
    const int64_t done = y - radius;
    if (done < row_begin) continue;
    const Row row = workspace.row(done % slots);
    const int64_t first = (image * shape.height + done) * width;
    const float* was = row.signed_confidence;
    if (job.previous != nullptr) {
      std::memcpy(before, job.previous + first, width * sizeof(float));
      for (int64_t x = width; x < stride; ++x) before[x] = kInf;
      was = before;
    }
    write_erosion_row(job, image, done, row, q, was);
    std::memcpy(job.log_odds + first, row.signed_confidence, width * sizeof(float));
  }
}

void pixel_grad(const PixelGrad& job, int64_t image, int64_t row_begin, int64_t row_end, Scratch& scratch) {
  const Shape& shape = job.input.shape;
  const Workspace workspace(shape, 1, 0, scratch);
  const Row row = workspace.row(0);
  const Extra extra = job.method.method == Method::kCosPgd          ? Extra::kSquares
                      : job.method.method == Method::kCosPgdSigmoid ? Extra::kSigmoids
                                                                    : Extra::kNone;
  const float* class_weight = job.class_weight == nullptr ? nullptr : job.class_weight + image * shape.classes();
  for (int64_t y = row_begin; y < row_end; ++y) {
    reduce_row(job.input, image, y, extra, workspace.stride(), row);
    RowCounter counter;
    for (int64_t x = 0; x < shape.width; x += kBlock) {
      F weight[kUnroll];
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = x + u * kLanes;
        const I label = load<I>(row.label + i);
        const I valid = label >= 0;
        const F now = load<F>(row.signed_confidence + i);
        const I finite = now == now;
        const I right = valid & (load<I>(row.predicted + i) == label);
        const I weighty = job.method.targeted ? ~right : right;
        F w = method_weight(job.method, load<F>(row.log_odds + i), weighty, load<F>(row.norm + i));
        if (class_weight != nullptr) {
          for (int lane = 0; lane < kLanes; ++lane) w[lane] *= label[lane] < 0 ? 0.0f : class_weight[label[lane]];
        }
        weight[u] = (valid & finite) ? (job.method.targeted ? -w : w) : F{};
        counter.add(valid, right, valid, (valid & ~finite) ? now : F{});
      }
      write_block(job.input, image, y, x, row, weight, job.grad);
    }
    job.rows[image * shape.height + y] = counter.total();
  }
}

void confidence(const ConfidenceMap& job, int64_t image, int64_t row_begin, int64_t row_end, Scratch& scratch) {
  const Shape& shape = job.input.shape;
  const Workspace workspace(shape, 1, 0, scratch);
  const Row row = workspace.row(0);
  for (int64_t y = row_begin; y < row_end; ++y) {
    reduce_row(job.input, image, y, extra_of(job.confidence), workspace.stride(), row);
    for (int64_t x = 0; x < workspace.stride(); x += kLanes) {
      store(row.signed_confidence + x, absolute(load<F>(row.signed_confidence + x)));
    }
    std::memcpy(job.out + (image * shape.height + y) * shape.width, row.signed_confidence, shape.width * sizeof(float));
  }
}

void confusion(const Confusion& job, int64_t image, int64_t row_begin, int64_t row_end, Scratch& scratch,
               int64_t* counts) {
  const Shape& shape = job.input.shape;
  const Workspace workspace(shape, 1, workspace_stride(shape.width), scratch);
  const Row row = workspace.row(0);
  auto* no_label = reinterpret_cast<int32_t*>(workspace.beside());
  std::memset(no_label, 0xff, workspace.stride() * sizeof(int32_t));
  for (int64_t y = row_begin; y < row_end; ++y) {
    read_labels(job.input, image, y, workspace.stride(), row.label);
    const int64_t first = (image * shape.height + y) * shape.width;
    for (int64_t x = 0; x < shape.width; x += kBlock) {
      if (job.prediction != nullptr) continue;
      Maxima maxima;
      stage_block(job.input, image, y, x, no_label, row.e, maxima);
      for (int u = 0; u < kUnroll; ++u) store(row.predicted + x + u * kLanes, maxima.top[u]);
    }
    for (int64_t x = 0; x < shape.width; ++x) {
      const int64_t predicted = job.prediction == nullptr ? row.predicted[x] : job.prediction[first + x];
      if (row.label[x] >= 0) ++counts[row.label[x] * job.classes + predicted];
    }
  }
}

void erode(const Erode& job, const float* scores, const bool* valid, const int32_t* predicted, float rise, float* out,
           Scratch& scratch) {
  const bool geodesic = predicted != nullptr;
  const int64_t stride = workspace_stride(job.width);
  float* memory = scratch.floats(ErosionPipeline::floats(job.radius, geodesic, stride));
  ErosionPipeline pipeline(job.radius, geodesic, rise, stride, memory);
  for (int64_t y = 0; y < job.height + job.radius; ++y) {
    float* row = pipeline.scores(y);
    for (int64_t x = 0; x < stride; ++x) row[x] = kInf;
    if (geodesic) std::memset(pipeline.predicted(y), 0xff, stride * sizeof(int32_t));
    if (y < job.height) {
      const int64_t first = y * job.width;
      for (int64_t x = 0; x < job.width; ++x) {
        const float score = scores[first + x];
        const bool lends = score == score && (valid == nullptr || valid[first + x]);
        row[x] = lends ? score : kInf;
      }
      if (geodesic) std::memcpy(pipeline.predicted(y), predicted + first, job.width * sizeof(int32_t));
    }
    const float* q = pipeline.push(y);
    if (y >= job.radius) std::memcpy(out + (y - job.radius) * job.width, q, job.width * sizeof(float));
  }
}

// The loop's bounds come first, so that the remainder runs the same arithmetic as the vectors.
EROSEG_INLINE F linf_stepped(F x_adv, F x, F grad, const Step& step) {
  const F sign = grad > 0.0f ? splat<F>(1.0f) : (grad < 0.0f ? splat<F>(-1.0f) : grad);  // keeps NaN
  const F moved = x_adv + step.alpha * sign;
  const F least = x - step.eps, most = x + step.eps;
  const F in_ball = moved < least ? least : (moved > most ? most : moved);
  return in_ball < step.low ? splat<F>(step.low) : (in_ball > step.high ? splat<F>(step.high) : in_ball);
}

void linf_step(const Step& step, int64_t image, int64_t begin, int64_t end) {
  const int64_t base = image * step.channels * step.pixels;
  float* x_adv = step.x_adv + base;
  const float* x = step.x + base;
  const float* grad = step.grad + base;
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = end - i < kLanes ? end - i : kLanes;
    F a{}, b{}, g{};
    if (n == kLanes) {
      a = load<F>(x_adv + i), b = load<F>(x + i), g = load<F>(grad + i);
    } else {
      std::memcpy(&a, x_adv + i, n * sizeof(float));
      std::memcpy(&b, x + i, n * sizeof(float));
      std::memcpy(&g, grad + i, n * sizeof(float));
    }
    F stepped = linf_stepped(a, b, g, step);
    if (step.mask != nullptr) {
      const bool* mask = step.mask + image * step.pixels;
      for (int lane = 0; lane < n; ++lane) {
        const int64_t pixel = step.channels_last ? (i + lane) / step.channels : (i + lane) % step.pixels;
        if (!mask[pixel]) stepped[lane] = a[lane];
      }
    }
    std::memcpy(x_adv + i, &stepped, n * sizeof(float));
  }
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {EROSEG_LEVEL_NAME, erosion_grad, pixel_grad, confidence, confusion, erode, linf_step};

}  // namespace eroseg::cpu::EROSEG_LEVEL
