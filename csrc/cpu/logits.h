// The logits of rows of pixels, as they lie in memory or interpolated between rows of another resolution. Part of
// kernels_impl.h.
//
// An interpolated row of pixels lies between two rows of logits. These are kept as they were read; enter() blends them,
// once for all their columns, and a vector of pixels is then two permutations of a vector of the blend.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// The first pass over a block: the logits go to scratch as float32, the label's as -inf so that its exponential is 0,
// and the maxima are taken on the way.
struct Maxima {
  F others[kUnroll];  // m
  I top[kUnroll];     // the class of m, the lowest on ties
  F label[kUnroll];   // z_y, 0 on void pixels
  F poison[kUnroll];  // 0, or NaN where the label's logit or the largest of the others is not finite
};

// `logit(c, u)` gives a vector of them.
template <class Logit>
EROSEG_INLINE Maxima take_maxima(const Logit& logit, int64_t classes, const int32_t* label, float* z) {
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
      const F value = logit(c, u);
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
  Maxima out;
  for (int u = 0; u < kUnroll; ++u) {
    poison[u] += (of_label[u] + others[u]) * 0.0f;
    out.others[u] = others[u];
    out.top[u] = top[u];
    out.label[u] = of_label[u];
    out.poison[u] = poison[u];
  }
  return out;
}

// Where the pixels of every row take their values from; arrays of the row's stride.
struct Columns {
  int32_t* index;
  float* before;  // the weight of that column
  float* next;    // the weight of the column behind it

  void fill(const Input& input, int64_t stride, float* memory) {
    index = reinterpret_cast<int32_t*>(memory);
    before = memory + stride;
    next = memory + 2 * stride;
    const Axis axis = input.columns();
    for (int64_t x = 0; x < stride; ++x) {
      const Tap tap = axis.at(x < axis.size ? x : axis.size - 1);
      index[x] = static_cast<int32_t>(tap.index);
      before[x] = 1.0f - tap.next;
      next[x] = tap.next;
    }
  }
};

// The same for kBlock pixels from x on. Where there are no more columns than pixels, the values of a vector of pixels
// lie within one vector of columns.
struct BlockTaps {
  BlockTaps(const Columns& columns, int64_t x) {
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t* index = columns.index + x + u * kLanes;
      first[u] = index[0];
      lane[u] = load<I>(index) - index[0];
      before[u] = load<F>(columns.before + x + u * kLanes);
      next[u] = load<F>(columns.next + x + u * kLanes);
    }
  }
  int64_t first[kUnroll];
  I lane[kUnroll];
  F before[kUnroll], next[kUnroll];

  template <bool is_within>
  EROSEG_INLINE F of(const float* blend, int u) const {
    const float* from = blend + first[u];
    const auto pick = [&](const float* at) {
      return is_within ? permute(load<F>(at), lane[u]) : gather(at, lane[u], I{} - 1);
    };
    return pick(from) * before[u] + pick(from + 1) * next[u];
  }
};

// Rows of one image. `stride` is the length of a row in scratch memory, whole blocks.
class LogitRows {
 public:
  static int64_t floats(const Input& input, int64_t stride) {
    if (!input.interpolates()) return 0;
    return 3 * stride + input.shape.channels * (2 * rounded_up(input.logits.width, kBlock) + blend_pitch(input));
  }

  LogitRows(const Input& input, int64_t image, int64_t stride, float* memory)
      : input_(input), image_(image), width_(rounded_up(input.logits.width, kBlock)), pitch_(blend_pitch(input)) {
    if (!input.interpolates()) return;
    columns_.fill(input, stride, memory);
    kept_[0] = memory + 3 * stride;
    kept_[1] = kept_[0] + input.shape.channels * width_;
    blend_ = kept_[1] + input.shape.channels * width_;
  }

  const Columns& columns() const { return columns_; }

  // Goes to a row of pixels.
  void enter(int64_t y) {
    y_ = y;
    if (!input_.interpolates()) return;
    const Tap tap = input_.rows().at(y);
    const float* above = kept(tap.index);
    const float* below = kept(tap.index + 1 < input_.logits.height ? tap.index + 1 : tap.index);
    const F before = splat<F>(1.0f - tap.next), next = splat<F>(tap.next);
    for (int64_t x = 0; x < width_; x += kBlock) {
      for (int64_t c = 0; c < input_.shape.channels; ++c) {
        const int64_t from = x * input_.shape.channels + c * kBlock;
        for (int64_t i = 0; i < kBlock; i += kLanes) {
          store(blend_ + c * pitch_ + x + i, load<F>(above + from + i) * before + load<F>(below + from + i) * next);
        }
      }
    }
    for (int64_t c = 0; c < input_.shape.channels; ++c) {
      float* end = blend_ + c * pitch_ + input_.logits.width;
      end[0] = end[-1];
    }
  }

  // The pixels [x, x + kBlock) of the row.
  Maxima stage(int64_t x, const int32_t* label, float* z) const {
    if (!input_.interpolates()) {
      return with_type(input_.logits.type, [&](auto type) { return load_block<decltype(type)>(x, label, z); });
    }
    return input_.logits.width <= input_.shape.width ? interpolate<true>(x, label, z) : interpolate<false>(x, label, z);
  }

 private:
  // The last column is repeated, and a vector can be read from there.
  static int64_t blend_pitch(const Input& input) { return rounded_up(input.logits.width, kBlock) + 16; }

  // A row of logits, [blocks][channels][kBlock]; it takes the place of the one two rows above it.
  const float* kept(int64_t y) {
    float* const to = kept_[y & 1];
    if (held_[y & 1] == y) return to;
    held_[y & 1] = y;
    with_type(input_.logits.type, [&](auto type) { read<decltype(type)>(y, to); });
    return to;
  }

  template <class Type>
  void read(int64_t y, float* to) const {
    const auto* data = static_cast<const typename Type::Element*>(input_.logits.data);
    for (int64_t x = 0; x < input_.logits.width; x += kBlock) {
      const BlockInMemory block(input_, image_, y, x);
      read_block<Type>(block, data + block.offset, to + x * block.channels);
    }
  }

  template <bool is_within>
  Maxima interpolate(int64_t x, const int32_t* label, float* z) const {
    const BlockTaps taps(columns_, x);
    const int64_t classes = input_.shape.classes(), first_class = classes - input_.shape.channels;
    const auto logit = [&](int64_t c, int u) {
      return c < first_class ? F{} : taps.template of<is_within>(blend_ + (c - first_class) * pitch_, u);
    };
    return take_maxima(logit, classes, label, z);
  }

  template <class Type>
  Maxima load_block(int64_t x, const int32_t* label, float* z) const {
    const BlockInMemory block(input_, image_, y_, x);
    const int64_t classes = input_.shape.classes();
    const auto* from = static_cast<const typename Type::Element*>(input_.logits.data) + block.offset;
    if (block.planes) {
      const auto logit = [&](int64_t c, int u) {
        const int64_t channel = c - block.first_class;
        return channel < 0 ? F{} : Type::load_vector(from + channel * block.class_stride + u * kLanes);
      };
      return take_maxima(logit, classes, label, z);
    }
    if (block.first_class > 0) std::memset(z, 0, kBlock * sizeof(float));
    read_block<Type>(block, from, z + block.first_class * kBlock);
    return take_maxima([&](int64_t c, int u) { return load<F>(z + c * kBlock + u * kLanes); }, classes, label, z);
  }

  const Input& input_;
  int64_t image_, width_, pitch_, y_ = 0;
  Columns columns_{};
  float* kept_[2]{};
  int64_t held_[2] = {-1, -1};
  float* blend_ = nullptr;
};

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
