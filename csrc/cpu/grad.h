// The gradient of rows of pixels, written where it lies in memory or handed on to rows of another resolution. Part of
// kernels_impl.h.
//
// The latter is the transpose of LogitRows's interpolation. Each row of logits has a sum, [columns][channels]: a block
// of pixels is turned so that a pixel's channels are a vector, which goes to two columns of the rows above and below.
// Rows of pixels come in their order, so there are two sums at a time, and a row of logits is written when the rows of
// pixels have passed it. What it sums, and in which order, depends on nothing but the sizes.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

// The gradient of a block of pixels: -weight at the label, else e * weight / S.
struct BlockGrad {
  BlockGrad(const Row& row, int64_t x, int64_t classes, const F* weights) : e(row.e + x * classes) {
    for (int u = 0; u < kUnroll; ++u) {
      weight[u] = weights[u];
      // S is meaningless where logits are not finite; the weight is 0 there.
      scale[u] = weight[u] == 0.0f ? F{} : weight[u] / load<F>(row.sum + x + u * kLanes);
      label[u] = load<I>(row.label + x + u * kLanes);
    }
  }
  float* e;
  F weight[kUnroll], scale[kUnroll];
  I label[kUnroll];

  EROSEG_INLINE F operator()(int64_t c, int u) const {
    return label[u] == static_cast<int32_t>(c) ? -weight[u] : load<F>(e + c * kBlock + u * kLanes) * scale[u];
  }
};

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

// Writes grad(c, u) to a whole block of channels_last pixels, as gather_pixels reads one.
template <class Type, class Grad>
void write_pixels(int64_t channels, const Grad& grad, typename Type::Element* to) {
  for (int u = 0; u < kUnroll; ++u) {
    for_tiles(channels, [&](int64_t first) {
      F square[kLanes];
      for (int c = 0; c < kLanes; ++c) square[c] = grad(first + c, u);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(to + (u * kLanes + i) * channels + first, Type::pack(square[i]));
    });
  }
}

template <class Type, bool streams, class Grad>
void write_planes(const BlockInMemory& block, const Grad& grad, typename Type::Element* to) {
  for (int64_t c = 0; c < block.channels; ++c) {
    for (int u = 0; u < kUnroll; ++u) {
      auto* at = to + c * block.class_stride + u * kLanes;
      const auto packed = Type::pack(grad(c + block.first_class, u));
      if constexpr (streams) {
        stream(at, packed);
      } else {
        store(at, packed);
      }
    }
  }
}

// A gradient larger than this does not stay in a cache until the model's backward reads it, and is streamed.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

// Writes grad(c, u) to a block. `floats` is for as many of them and may be what grad reads; `staged` is for elements.
template <class Type, class Grad>
void write_block(const Input& input, const BlockInMemory& block, const Grad& grad, float* floats, float* staged,
                 void* data) {
  auto* to = static_cast<typename Type::Element*>(data) + block.offset;
  const int64_t bytes = static_cast<int64_t>(sizeof(*to));
  const bool large = input.shape.batch * block.channels * input.logits.pixels() * bytes >= kStreamBytes;
  if (block.pixels) {
    auto* elements = reinterpret_cast<typename Type::Element*>(staged);
    write_pixels<Type>(block.channels, grad, large ? elements : to);
    if (large) stream_copy<Type>(elements, kBlock * block.channels, to);
    return;
  }
  if (block.planes) {
    const bool aligned =
        (reinterpret_cast<uintptr_t>(to) | (block.class_stride * bytes)) % sizeof(typename Type::Vector) == 0;
    (aligned && large ? write_planes<Type, true, Grad> : write_planes<Type, false, Grad>)(block, grad, to);
    return;
  }
  for (int64_t c = block.first_class; c < block.first_class + block.channels; ++c) {
    for (int u = 0; u < kUnroll; ++u) store(floats + c * kBlock + u * kLanes, grad(c, u));
  }
  scatter_block<Type>(block, floats + block.first_class * kBlock, to);
}

// The rows of pixels that the gradient of the rows of logits [begin, end) needs. Those before `own` lie above them, and
// are reported with the rows of logits there.
struct PixelRows {
  PixelRows(const Input& input, int64_t begin, int64_t end_of_logits) : first(begin), own(begin), end(end_of_logits) {
    if (!input.interpolates()) return;
    const Axis axis = input.rows();
    first = axis.first_at(begin - 1);
    own = axis.first_at(begin);
    end = axis.first_at(end_of_logits);
  }
  int64_t first, own, end;
};

// The rows of logits [begin, end) of one image.
class GradRows {
 public:
  static int64_t floats(const Input& input) {
    const int64_t block = input.shape.classes() * kBlock;
    return input.interpolates() ? 2 * (sum_floats(input) + block) : block;
  }

  GradRows(const Input& input, void* grad, int64_t image, int64_t begin, int64_t end, const Columns& columns,
           float* memory)
      : input_(input),
        grad_(grad),
        image_(image),
        begin_(begin),
        end_(end),
        columns_(columns),
        pitch_(rounded_up(input.shape.channels, kLanes)),
        staged_(memory) {
    if (!input.interpolates()) return;
    turned_ = staged_ + input.shape.classes() * kBlock;
    sums_[0] = turned_ + input.shape.classes() * kBlock;
    sums_[1] = sums_[0] + sum_floats(input);
    std::memset(sums_[0], 0, 2 * sum_floats(input) * sizeof(float));
    above_ = begin > 0 ? begin - 1 : 0;
  }

  // Goes on to a row of pixels.
  void enter(int64_t y) {
    y_ = y;
    if (!input_.interpolates()) return;
    const Tap tap = input_.rows().at(y);
    while (above_ < tap.index) pass();
    // The last row of logits stands in for the one below it.
    next_ = tap.index + 1 < input_.logits.height ? tap.next : 0.0f;
  }

  // The gradient of the pixels [x, x + kBlock) of the row; the weight is 0 wherever there must be none.
  void write(int64_t x, const Row& row, const F* weight) {
    const BlockGrad grad(row, x, input_.shape.classes(), weight);
    if (!input_.interpolates()) {
      return write_block(x, y_, grad, grad.e);
    }
    int64_t first = 0;
    for (; first + kLanes <= input_.shape.channels; first += kLanes) add<true>(x, first, grad);
    if (first < input_.shape.channels) add<false>(x, first, grad);
  }

  void finish() {
    while (input_.interpolates() && above_ < end_) pass();
    finish_streams();
  }

 private:
  // One column more than there are: the last column takes what the one behind it got.
  static int64_t sum_floats(const Input& input) {
    return rounded_up(input.logits.width + 1, kBlock) * rounded_up(input.shape.channels, kLanes);
  }

  template <class Grad>
  void write_block(int64_t x, int64_t y, const Grad& grad, float* floats) const {
    const BlockInMemory block(input_, image_, y, x);
    with_type(input_.logits.type, [&](auto type) {
      cpu::EROSEG_LEVEL::write_block<decltype(type)>(input_, block, grad, floats, staged_, grad_);
    });
  }

  // Adds the channels [first, first + kLanes) of a block.
  template <bool is_whole>
  EROSEG_INLINE void add(int64_t x, int64_t first, const BlockGrad& grad) {
    const int64_t first_class = input_.shape.classes() - input_.shape.channels;
    const F to_above = splat<F>(1.0f - next_), to_below = splat<F>(next_);
    int64_t column = columns_.index[x];
    F here{}, behind{};  // of that column and the one behind it
    const auto flush = [&](F sum) {
      float* const above = sums_[above_ & 1] + column * pitch_ + first;
      float* const below = sums_[~above_ & 1] + column * pitch_ + first;
      store(above, load<F>(above) + sum * to_above);
      store(below, load<F>(below) + sum * to_below);
      ++column;
    };
    for (int u = 0; u < kUnroll; ++u) {
      F square[kLanes];
      for (int c = 0; c < kLanes; ++c) {
        square[c] = is_whole || first + c < input_.shape.channels ? grad(first_class + first + c, u) : F{};
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) {
        const int64_t at = x + u * kLanes + i;
        while (column < columns_.index[at]) {
          flush(here);
          here = behind;
          behind = F{};
        }
        here += square[i] * columns_.before[at];
        behind += square[i] * columns_.next[at];
      }
    }
    flush(here);
    flush(behind);
  }

  // Writes the row of logits above, and makes the one below it the next.
  void pass() {
    float* const sum = sums_[above_ & 1];
    if (begin_ <= above_ && above_ < end_) {
      float* const last = sum + (input_.logits.width - 1) * pitch_;
      for (int64_t c = 0; c < pitch_; c += kLanes) store(last + c, load<F>(last + c) + load<F>(last + pitch_ + c));
      for (int64_t x = 0; x < input_.logits.width; x += kBlock) write_sums(x, sum + x * pitch_);
    }
    std::memset(sum, 0, sum_floats(input_) * sizeof(float));
    ++above_;
  }

  void write_sums(int64_t x, const float* sum) const {
    const int64_t channels = input_.shape.channels, first_class = input_.shape.classes() - channels;
    for (int u = 0; u < kUnroll; ++u) {
      for (int64_t first = 0; first < pitch_; first += kLanes) {
        F square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load<F>(sum + (u * kLanes + i) * pitch_ + first);
        transpose(square);
        for (int c = 0; c < kLanes && first + c < channels; ++c) {
          store(turned_ + (first_class + first + c) * kBlock + u * kLanes, square[c]);
        }
      }
    }
    const auto grad = [&](int64_t c, int u) { return load<F>(turned_ + c * kBlock + u * kLanes); };
    write_block(x, above_, grad, turned_);
  }

  const Input& input_;
  void* grad_;
  int64_t image_, begin_, end_;
  const Columns& columns_;
  int64_t pitch_;
  float* staged_;            // for a block's elements as they lie in channels_last memory
  float* turned_ = nullptr;  // a block of a sum, [classes][kBlock]
  float* sums_[2]{};         // of the rows of logits `above_` and below it, by their lowest bit
  int64_t above_ = 0, y_ = 0;
  float next_ = 0;
};

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
