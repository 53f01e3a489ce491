// Rows of pixels: their reduction over the classes. Part of kernels_impl.h.
//
// It works in blocks of kBlock pixels. In scratch a row is block-major, [block][class][kBlock]: a block is contiguous,
// and no two classes share a cache set.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

// What is kept of a row of pixels between its reduction and its gradient; arrays of `stride` elements.
struct Row {
  float* e;                  // [blocks][classes][kBlock]: logits, then exp(z_c - m), 0 at the label
  int32_t* label;            // -1 on void pixels and beyond the image
  int32_t* predicted;        // arg max
  float* sum;                // S
  float* log_odds;           // L
  float* signed_confidence;  // of the wanted kind; NaN where logits are not finite, +inf on void pixels
  float* norm;               // method_weight's
};

// What a caller needs besides the log-odds: the label's confidence, the top class's, or the squares of method_weight.
enum class PixelReduction { kNone, kLabel, kTop, kSquares };

PixelReduction reduction_of(Confidence confidence) {
  switch (confidence) {
    case Confidence::kLabel:
      return PixelReduction::kLabel;
    case Confidence::kTop:
      return PixelReduction::kTop;
    case Confidence::kLogOdds:
      return PixelReduction::kNone;
  }
  return PixelReduction::kNone;
}

// Scratch memory of one task: rows, the logits that they are made of, and some floats beside them.
class Workspace {
 public:
  Workspace(const Input& input, int64_t image, int64_t rows, int64_t floats_beside, Scratch& scratch)
      : stride_(rounded_up(input.shape.width, kBlock)),
        classes_(input.shape.classes()),
        row_floats_((classes_ + 6) * stride_),
        base_(scratch.floats(rows * row_floats_ + LogitRows::floats(input, stride_) + floats_beside)),
        logits_(input, image, stride_, base_ + rows * row_floats_),
        beside_(base_ + rows * row_floats_ + LogitRows::floats(input, stride_)) {}
  int64_t stride() const { return stride_; }
  LogitRows& logits() { return logits_; }
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
  int64_t stride_, classes_, row_floats_;
  float* base_;
  LogitRows logits_;
  float* beside_;
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

// Fills the row at pixels [x, x + kBlock) from the logits; row.label is there already.
void reduce_block(const LogitRows& logits, int64_t classes, int64_t x, PixelReduction reduction, const Row& row) {
  float* z = row.e + x * classes;
  const int32_t* label = row.label + x;
  const Maxima maxima = logits.stage(x, label, z);

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
    if (reduction == PixelReduction::kLabel) confidence = is_correct[u] ? maximum(confidence, F{}) : confidence;
    confidence = maxima.poison[u] == 0.0f ? confidence : splat<F>(__builtin_nanf(""));
    confidence = load<I>(label + u * kLanes) < 0 ? splat<F>(kInf) : confidence;
    store(row.sum + i, sum[u]);
    store(row.log_odds + i, log_odds);
    store(row.signed_confidence + i, confidence);
  }
}

void reduce_row(const Input& input, int64_t image, int64_t y, PixelReduction reduction, Workspace& workspace,
                const Row& row) {
  read_labels(input, image, y, workspace.stride(), row.label);
  workspace.logits().enter(y);
  for (int64_t x = 0; x < input.shape.width; x += kBlock) {
    reduce_block(workspace.logits(), input.shape.classes(), x, reduction, row);
  }
}

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
