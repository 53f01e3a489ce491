// The fused CPU kernels, for one SIMD level.
//
// A level_*.cpp file sets the compiler's target, defines what vectors.h asks for and includes this. Everything here has
// internal linkage or lives in the level's namespace: no function compiled for a CPU that is not there can be picked by
// the linker.
//
// erosion_grad runs down the rows of a band of one image:
//   1. Reduce row y: read its logits once, in blocks of kBlock pixels; keep exp(z_c - m) of the row in scratch memory,
//      and per pixel S, L, confidence, right (reduce_block).
//   2. Erode: row y's confidences are level 0; level i of row y - i is a 3x3 erosion of level i - 1, whose next row has
//      just become known. Three rows per level are kept. After level r, q of row y - r is final.
//   3. Write row y - r: weight, and exp(z_c - m) * (w / S) straight from scratch (write_block).
// So the logits are read once and the gradient written once; r + 1 rows of exponentials stay in cache between 1 and 3.
// A band recomputes r rows above and below itself. Row y's exponentials lie in slot y mod (r + 1).
#include "vectors.h"
// vectors.h comes first: the others are written in its types.
#include "erosion.h"
#include "rows.h"

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

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
  I valid_{}, right_{}, front_{};
  D movement_{};
};

// Level 0 of the erosion: NaN lends nothing.
EROSEG_INLINE F score_of(F signed_confidence) {
  const F score = absolute(signed_confidence);
  return score <= kInf ? score : splat<F>(kInf);
}

Extra extra_of(Confidence confidence) { return confidence == Confidence::kTop ? Extra::kTop : Extra::kNone; }

// What a weight and the counts look at, of the kLanes pixels from i on.
struct Pixels {
  EROSEG_INLINE Pixels(const Row& row, int64_t i)
      : label(load<I>(row.label + i)),
        now(load<F>(row.signed_confidence + i)),
        valid(label >= 0),
        finite(now == now),
        right(valid & finite & (load<I>(row.predicted + i) == label)) {}
  I label;
  F now;  // signed confidence
  I valid, finite, right;
};

// `before` is the row's previous log-odds, or its present ones; q has been through the erosion.
void write_erosion_row(const ErosionGrad& job, int64_t image, int64_t y, const Row& row, const float* q,
                       const float* before, RowStats* rows) {
  const float tau = job.tau[image];
  const float* class_weight =
      job.class_weight == nullptr ? nullptr : job.class_weight + image * job.input.shape.classes();
  RowCounter counter;
  for (int64_t x = 0; x < job.input.shape.width; x += kBlock) {
    F weight[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = x + u * kLanes;
      const Pixels at(row, i);
      F w = front_weight(job.front, load<F>(q + i), tau);
      if (job.direction == Direction::kCrossEntropy) w *= sigmoid(-load<F>(row.log_odds + i));
      if (class_weight != nullptr) w *= gather(class_weight, at.label, at.valid);
      weight[u] = (at.valid & at.finite) ? (job.targeted ? -w : w) : F{};

      const F was = load<F>(before + i);
      const I in_front = at.valid & (absolute(at.now) <= tau);
      F moved = in_front ? (job.targeted ? at.now - was : was - at.now) : F{};
      moved = (at.valid & ~at.finite) ? at.now : moved;
      counter.add(at.valid, at.right, in_front, moved);
    }
    write_block(job.input, image, y, x, row, weight, job.grad);
  }
  rows[image * job.input.shape.height + y] = counter.total();
}

void erosion_grad(const ErosionGrad& job, int64_t image, int64_t row_begin, int64_t row_end, Scratch& scratch,
                  RowStats* rows) {
  const Shape& shape = job.input.shape;
  const int64_t width = shape.width;
  const int radius = job.radius;
  const bool geodesic = job.within == Within::kClass;
  const int64_t slots = radius + 1;
  const int64_t stride = workspace_stride(width);
  const Workspace workspace(shape, slots, ErosionPipeline::floats(radius, geodesic, stride) + stride, scratch);
  float* before = workspace.beside();
  ErosionPipeline pipeline(radius, geodesic, job.slope * job.tau[image], shape.height, width, stride, before + stride);

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
      if (geodesic) std::memcpy(pipeline.predicted(y), row.predicted, width * sizeof(int32_t));
    } else {
      for (int64_t x = 0; x < stride; ++x) scores[x] = kInf;
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
    write_erosion_row(job, image, done, row, q, was, rows);
    std::memcpy(job.log_odds + first, row.signed_confidence, width * sizeof(float));
  }
  finish_streams();
}

void pixel_grad(const PixelGrad& job, int64_t image, int64_t row_begin, int64_t row_end, Scratch& scratch,
                RowStats* rows) {
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
        const Pixels at(row, i);
        const I weighty = job.method.targeted ? ~at.right : at.right;
        F w = method_weight(job.method, load<F>(row.log_odds + i), weighty, load<F>(row.norm + i));
        if (class_weight != nullptr) w *= gather(class_weight, at.label, at.valid);
        weight[u] = (at.valid & at.finite) ? (job.method.targeted ? -w : w) : F{};
        counter.add(at.valid, at.right, at.valid, (at.valid & ~at.finite) ? at.now : F{});
      }
      write_block(job.input, image, y, x, row, weight, job.grad);
    }
    rows[image * shape.height + y] = counter.total();
  }
  finish_streams();
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
      if (row.label[x] >= 0 && is_class(predicted, job.classes)) ++counts[row.label[x] * job.classes + predicted];
    }
  }
}

void erode(const Erode& job, const float* scores, const bool* valid, const int32_t* predicted, float rise, float* out,
           Scratch& scratch) {
  const bool geodesic = predicted != nullptr;
  const int64_t stride = workspace_stride(job.width);
  float* memory = scratch.floats(ErosionPipeline::floats(job.radius, geodesic, stride));
  ErosionPipeline pipeline(job.radius, geodesic, rise, job.height, job.width, stride, memory);
  for (int64_t y = 0; y < job.height + job.radius; ++y) {
    float* row = pipeline.scores(y);
    for (int64_t x = 0; x < stride; ++x) row[x] = kInf;
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

// kLanes elements of the images from element i of an image on, of which the first n exist; the others are 0.
struct Elements {
  EROSEG_INLINE Elements(const Step& step, int64_t image, int64_t i, int64_t n)
      : first(image * step.elements() + i), count(n) {
    if (n == kLanes) {
      x_adv = load<F>(step.x_adv + first), x = load<F>(step.x + first), grad = load<F>(step.grad + first);
    } else {
      std::memcpy(&x_adv, step.x_adv + first, n * sizeof(float));
      std::memcpy(&x, step.x + first, n * sizeof(float));
      std::memcpy(&grad, step.grad + first, n * sizeof(float));
    }
    if (step.mask != nullptr) {
      const bool* mask = step.mask + image * step.pixels;
      for (int lane = 0; lane < n; ++lane) {
        const int64_t pixel = step.channels_last ? (i + lane) / step.channels : (i + lane) % step.pixels;
        inside[lane] = mask[pixel] ? -1 : 0;
      }
    }
  }
  EROSEG_INLINE void write(const Step& step, F stepped) const {
    const F result = inside ? stepped : x_adv;
    std::memcpy(step.x_adv + first, &result, count * sizeof(float));
  }
  int64_t first, count;
  F x_adv{}, x{}, grad{};
  I inside = I{} - 1;
};

// Comparisons that are false for NaN, which then stays.
EROSEG_INLINE F clamped(F value, F low, F high) { return value < low ? low : (value > high ? high : value); }

void linf_step(const Step& step, int64_t image, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const Elements at(step, image, i, end - i < kLanes ? end - i : kLanes);
    const F sign = at.grad > 0.0f ? splat<F>(1.0f) : (at.grad < 0.0f ? splat<F>(-1.0f) : at.grad);
    const F in_ball = clamped(at.x_adv + step.alpha * sign, at.x - step.eps, at.x + step.eps);
    at.write(step, clamped(in_ball, splat<F>(step.low), splat<F>(step.high)));
  }
}

// x_adv + scale * grad - x, where only the pixels inside the mask move.
EROSEG_INLINE F l2_delta(const Elements& at, float scale) {
  return at.x_adv + scale * (at.inside ? at.grad : F{}) - at.x;
}

// The term is a template argument so that the gradient's norm does not load the images.
template <L2Term term>
double l2_sum_squares(const Step& step, int64_t image, int64_t begin, int64_t end, float scale) {
  D sum{};
  for (int64_t i = begin; i < end; i += kLanes) {
    const Elements at(step, image, i, end - i < kLanes ? end - i : kLanes);
    const F value = term == L2Term::kGradient ? (at.inside ? at.grad : F{}) : l2_delta(at, scale);
    const D wide = __builtin_convertvector(value, D);
    sum += wide * wide;
  }
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

double l2_sum_squares(const Step& step, int64_t image, int64_t begin, int64_t end, L2Term term, float scale) {
  return term == L2Term::kGradient ? l2_sum_squares<L2Term::kGradient>(step, image, begin, end, scale)
                                   : l2_sum_squares<L2Term::kDelta>(step, image, begin, end, scale);
}

void l2_step(const Step& step, int64_t image, int64_t begin, int64_t end, float scale, float shrink) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const Elements at(step, image, i, end - i < kLanes ? end - i : kLanes);
    at.write(step, clamped(at.x + shrink * l2_delta(at, scale), splat<F>(step.low), splat<F>(step.high)));
  }
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {EROSEG_LEVEL_NAME, erosion_grad,   pixel_grad, confidence, confusion, erode,
                          linf_step,         l2_sum_squares, l2_step};

}  // namespace eroseg::cpu::EROSEG_LEVEL