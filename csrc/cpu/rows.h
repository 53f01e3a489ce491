// Rows of pixels: their reduction over the classes, and their gradient. Part of kernels_impl.h.
//
// Both work in blocks of kBlock pixels. In scratch a row is block-major, [block][class][kBlock]: a block is contiguous,
// and no two classes share a cache set.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

// Blocks at the right edge, and channels_last memory with few classes, go through a buffer in the type of the logits,
// so that conversion is by vectors there as well. Its tiles are as many classes as a cache line of channels_last
// float32 holds.
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

// Calls f(first) for tiles of kLanes classes that cover all of them; the last overlaps the one before it.
template <class Call>
EROSEG_INLINE void for_tiles(int64_t channels, const Call& f) {
  for (int64_t first = 0; first < channels; first += kLanes) {
    f(first + kLanes <= channels ? first : channels - kLanes);
  }
}

// A whole block of channels_last pixels with at least kLanes classes: squares of pixels and classes are transposed in
// registers.
template <class Type>
void gather_pixels(const typename Type::Element* from, int64_t channels, float* z) {
  for (int u = 0; u < kUnroll; ++u) {
    for_tiles(channels, [&](int64_t first) {
      F square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = Type::load_vector(from + (u * kLanes + i) * channels + first);
      transpose(square);
      for (int c = 0; c < kLanes; ++c) store(z + (first + c) * kBlock + u * kLanes, square[c]);
    });
  }
}

// Copies n elements past the cache, whatever `to` is aligned to.
template <class Type>
void stream_copy(const typename Type::Element* from, int64_t n, typename Type::Element* to) {
  using Vector = typename Type::Vector;
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % sizeof(Vector) / sizeof(*to));
  const int64_t head = (kLanes - misaligned) % kLanes;
  int64_t i = 0;
  for (; i < head && i < n; ++i) to[i] = from[i];
  for (; i + kLanes <= n; i += kLanes) stream(to + i, load<Vector>(from + i));
  for (; i < n; ++i) to[i] = from[i];
}

// Writes weight * dl/dz to such a block, as write_vectors does to planes.
template <class Type>
void write_pixels(int64_t channels, const float* e, const I* label, const F* weight, const F* scale,
                  typename Type::Element* to) {
  for (int u = 0; u < kUnroll; ++u) {
    for_tiles(channels, [&](int64_t first) {
      F square[kLanes];
      for (int c = 0; c < kLanes; ++c) {
        const F g = load<F>(e + (first + c) * kBlock + u * kLanes) * scale[u];
        square[c] = label[u] == static_cast<int32_t>(first + c) ? -weight[u] : g;
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(to + (u * kLanes + i) * channels + first, Type::pack(square[i]));
    });
  }
}

// What is kept of a row of pixels between its reduction and its gradient; arrays of `stride` elements.
struct Row {
  float* e;                  // [blocks][classes][kBlock]: logits, then exp(z_c - m), 0 at the label
  int32_t* label;            // -1 on void pixels and beyond the image
  int32_t* predicted;        // arg max
  float* sum;                // S
  float* log_odds;           // L
  float* signed_confidence;  // L, or the top class's; NaN where logits are not finite, +inf on void pixels
  float* norm;               // method_weight's
  float* staged;             // [kBlock][classes], of all rows: a block's gradient as it lies in channels_last memory
};

// Which further per-pixel reductions a caller needs.
enum class PixelReduction { kNone, kTop, kSquares };

PixelReduction reduction_of(Confidence confidence) {
  return confidence == Confidence::kTop ? PixelReduction::kTop : PixelReduction::kNone;
}

int64_t workspace_stride(int64_t width) { return (width + kBlock - 1) / kBlock * kBlock; }

// Scratch memory as rows, and some floats beside them.
class Workspace {
 public:
  Workspace(const Shape& shape, int64_t rows, int64_t floats_beside, Scratch& scratch)
      : stride_(workspace_stride(shape.width)),
        row_floats_((shape.classes() + 6) * stride_),
        base_(scratch.floats(rows * row_floats_ + kBlock * shape.classes() + floats_beside)),
        staged_(base_ + rows * row_floats_),
        beside_(staged_ + kBlock * shape.classes()),
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
    row.staged = staged_;
    return row;
  }

 private:
  int64_t stride_, row_floats_;
  float* base_;
  float* staged_;
  float* beside_;
  int64_t classes_;
};

template <class T>
void read_labels_as(const Labels& labels, int64_t classes, int64_t first, int64_t n, int64_t stride, int32_t* out) {
  const T* from = static_cast<const T*>(labels.data) + first;
  const int64_t ignore_index = labels.ignore_index;
  // Without branches, so that it becomes vectors.
  for (int64_t i = 0; i < n; ++i) {
    const int64_t label = static_cast<int64_t>(from[i]);
    const bool valid = (label >= 0) & (label < classes) & (label != ignore_index);
    out[i] = static_cast<int32_t>(label) | -static_cast<int32_t>(!valid);
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

// The first pass over a block: the logits go to scratch as float32, the label's as -inf so that its exponential is 0,
// and the maxima are taken on the way.
struct Maxima {
  F others[kUnroll];  // m
  I top[kUnroll];     // the class of m, the lowest on ties
  F label[kUnroll];   // z_y, 0 on void pixels
  F poison[kUnroll];  // 0, or NaN where the label's logit or the largest of the others is not finite
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
      } else {
        value = load<F>(slot);
      }
      const I is_label = labels[u] == index;
      of_label[u] = is_label ? value : of_label[u];
      const F other = is_label ? splat<F>(-kInf) : value;
      store(slot, other);
      const I better = other > others[u];
      others[u] = better ? other : others[u];
      top[u] = better ? index : top[u];
      // NaN and +inf; -inf is a class of probability 0. The order of the operands lets NaN through.
      poison[u] += (kLowest > value ? splat<F>(kLowest) : value) * 0.0f;
    }
  }
  for (int u = 0; u < kUnroll; ++u) {
    poison[u] += (of_label[u] + others[u]) * 0.0f;
    out.others[u] = others[u];
    out.top[u] = top[u];
    out.label[u] = of_label[u];
    out.poison[u] = poison[u];
  }
}

// Log-odds of the predicted class plus log(C - 1), in a pass of its own over the logits in scratch. The label's logit
// is not among them: it is z_top where the prediction is correct, and one of the rest where it is not.
F top_confidence(const float* z, int64_t classes, I predicted, I is_correct, F z_top, F z_label) {
  const F label_as_rest = is_correct ? splat<F>(-kInf) : z_label;
  F rest = label_as_rest;
  for (int64_t c = 0; c < classes; ++c) {
    const F value = load<F>(z + c * kBlock);
    rest = maximum(rest, predicted == static_cast<int32_t>(c) ? splat<F>(-kInf) : value);
  }
  F sum = exponential(label_as_rest - rest);
  for (int64_t c = 0; c < classes; ++c) {
    const F e = exponential(load<F>(z + c * kBlock) - rest);
    sum += predicted == static_cast<int32_t>(c) ? F{} : e;
  }
  return maximum(F{}, (z_top - rest - log_positive(sum)) + __builtin_logf(static_cast<float>(classes - 1)));
}

// The position of a row's pixels [x, x + kBlock) in logits or gradient. Binary segmentation's class 0 exists in scratch
// memory only: the tensors start at first_class.
struct BlockInMemory {
  BlockInMemory(const Input& input, int64_t image, int64_t y, int64_t x)
      : channels(input.shape.channels),
        first_class(input.shape.classes() - channels),
        class_stride(input.logits.channels_last ? 1 : input.shape.pixels()),
        pixel_stride(input.logits.channels_last ? channels : 1),
        offset(image * channels * input.shape.pixels() + (y * input.shape.width + x) * pixel_stride),
        n(input.shape.width - x < kBlock ? input.shape.width - x : kBlock),
        planes(n == kBlock && pixel_stride == 1),
        pixels(n == kBlock && class_stride == 1 && channels >= kLanes) {}
  int64_t channels, first_class, class_stride, pixel_stride, offset, n;
  bool planes;  // whether every class's pixels can be loaded and stored as vectors
  bool pixels;  // whether every pixel's classes can
};

template <class Type>
void stage_block(const Input& input, const BlockInMemory& block, const int32_t* label, float* z, Maxima& maxima) {
  const int64_t classes = input.shape.classes();
  const auto* from = static_cast<const typename Type::Element*>(input.logits.data) + block.offset;
  if (block.planes) {
    take_maxima<Type, true>(from, block.class_stride, block.first_class, classes, label, z, maxima);
  } else {
    if (block.pixels) {
      gather_pixels<Type>(from, block.channels, z);
    } else {
      if (block.first_class > 0) std::memset(z, 0, kBlock * sizeof(float));
      gather_block<Type>(from, block.class_stride, block.pixel_stride, block.channels, block.n,
                         z + block.first_class * kBlock);
    }
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
void reduce_block(const Input& input, int64_t image, int64_t y, int64_t x, PixelReduction reduction, const Row& row) {
  const int64_t classes = input.shape.classes();
  float* z = row.e + x * classes;
  const int32_t* label = row.label + x;
  Maxima maxima;
  stage_block(input, image, y, x, label, z, maxima);

  I is_correct[kUnroll];
  F signed_confidence[kUnroll];
  for (int u = 0; u < kUnroll; ++u) {
    const I labels = load<I>(label + u * kLanes);
    const F gap = maxima.label[u] - maxima.others[u];
    is_correct[u] = ((gap > 0.0f) | ((gap == 0.0f) & (labels < maxima.top[u]))) & (labels >= 0);
    const I predicted = is_correct[u] ? labels : maxima.top[u];
    store(row.predicted + x + u * kLanes, predicted);
    if (reduction == PixelReduction::kTop) {
      const F z_top = is_correct[u] ? maxima.label[u] : maxima.others[u];
      const F top = top_confidence(z + u * kLanes, classes, predicted, is_correct[u], z_top, maxima.label[u]);
      signed_confidence[u] = is_correct[u] ? top : -top;
    }
  }

  F sum[kUnroll] = {};
  for (int64_t c = 0; c < classes; ++c) {
    for (int u = 0; u < kUnroll; ++u) {
      float* slot = z + c * kBlock + u * kLanes;
      const F e = exponential(load<F>(slot) - maxima.others[u]);
      store(slot, e);
      sum[u] += e;
    }
  }
  if (reduction == PixelReduction::kSquares) {
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
    F confidence = reduction == PixelReduction::kTop ? signed_confidence[u] : log_odds;
    confidence = maxima.poison[u] == 0.0f ? confidence : splat<F>(__builtin_nanf(""));
    confidence = load<I>(label + u * kLanes) < 0 ? splat<F>(kInf) : confidence;
    store(row.sum + i, sum[u]);
    store(row.log_odds + i, log_odds);
    store(row.signed_confidence + i, confidence);
  }
}

void reduce_row(const Input& input, int64_t image, int64_t y, PixelReduction reduction, int64_t stride,
                const Row& row) {
  read_labels(input, image, y, stride, row.label);
  for (int64_t x = 0; x < input.shape.width; x += kBlock) reduce_block(input, image, y, x, reduction, row);
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
  const int64_t bytes = static_cast<int64_t>(sizeof(typename Type::Element));
  const bool large = input.shape.batch * block.channels * input.shape.pixels() * bytes >= kStreamBytes;
  if (block.pixels) {
    auto* staged = reinterpret_cast<typename Type::Element*>(row.staged);
    write_pixels<Type>(block.channels, e, label, weight, scale, large ? staged : to);
    if (large) stream_copy<Type>(staged, kBlock * block.channels, to);
    return;
  }
  if (block.planes) {
    const bool aligned =
        (reinterpret_cast<uintptr_t>(to) | (block.class_stride * bytes)) % sizeof(typename Type::Vector) == 0;
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

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
