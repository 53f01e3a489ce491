// The operators for CPU tensors: checks the arguments, shares the rows out among threads, calls the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "kernels.h"
#include "select.h"

namespace eroseg::cpu {
namespace {

// What a parallel loop throws loses its text: a wrong EROSEG_CPU_LEVEL has to be told before it.
void check_level() { kernels(); }

// Calls f(image, row_begin, row_end, scratch) over bands of rows of all images. A band is a task; there are a few per
// thread, for balance, but none lower than min_rows unless an image is. What a band computes does not depend on where
// its bounds are, so neither does any result on the number of threads.
template <class F>
void for_each_band(const Shape& shape, int64_t min_rows, const F& f) {
  if (shape.batch * shape.pixels() == 0) return;
  check_level();
  constexpr int64_t kTasksPerThread = 4;
  const int64_t tasks = kTasksPerThread * torch::stable::get_num_threads();
  const int64_t bands_wanted = (tasks + shape.batch - 1) / shape.batch;
  const int64_t rows = std::max((shape.height + bands_wanted - 1) / bands_wanted, min_rows);
  const int64_t bands = (shape.height + rows - 1) / rows;
  torch::stable::parallel_for(0, shape.batch * bands, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % bands * rows;
      f(task / bands, row, std::min(row + rows, shape.height), scratch);
    }
  });
}

Tensor summed(const std::vector<RowStats>& rows, const Shape& shape, const Tensor& like) {
  Tensor stats = torch::stable::new_empty(like, {shape.batch, 4}, ScalarType::Double);
  auto* out = static_cast<double*>(stats.mutable_data_ptr());
  for (int64_t image = 0; image < shape.batch; ++image, out += 4) {
    RowStats sum;
    for (int64_t y = 0; y < shape.height; ++y) {
      const RowStats& row = rows[image * shape.height + y];
      sum.valid += row.valid;
      sum.right += row.right;
      sum.front += row.front;
      sum.movement += row.movement;
    }
    out[0] = static_cast<double>(sum.valid);
    out[1] = static_cast<double>(sum.right);
    out[2] = static_cast<double>(sum.front);
    out[3] = sum.movement;
  }
  return stats;
}

std::tuple<Tensor, Tensor> erosion_grad(const Tensor& logits, const Tensor& labels, const Tensor& tau,
                                        const MaybeTensor& previous, const MaybeTensor& class_weight,
                                        const Tensor& grad, int64_t ignore_index, int64_t confidence, int64_t front,
                                        int64_t direction, int64_t radius, double slope, int64_t within,
                                        bool targeted) {
  ErosionGrad job = checked_erosion_grad(logits, labels, tau, previous, class_weight, grad, ignore_index, confidence,
                                         front, direction, radius, slope, within, targeted);
  const Shape& shape = job.input.shape;
  Tensor log_odds = torch::stable::new_empty(logits, {shape.batch, shape.height, shape.width}, ScalarType::Float);
  job.log_odds = static_cast<float*>(log_odds.mutable_data_ptr());
  std::vector<RowStats> rows(shape.batch * shape.height);
  // A band reduces `radius` rows above and below itself again: keep that a small part of it.
  for_each_band(shape, 8 + 8 * radius, [&](int64_t image, int64_t begin, int64_t end, Scratch& scratch) {
    kernels().erosion_grad(job, image, begin, end, scratch, rows.data());
  });
  return {log_odds, summed(rows, shape, logits)};
}

Tensor pixel_grad(const Tensor& logits, const Tensor& labels, const MaybeTensor& class_weight, const Tensor& grad,
                  int64_t method, double progress, int64_t ignore_index, bool targeted, double q) {
  const PixelGrad job =
      checked_pixel_grad(logits, labels, class_weight, grad, method, progress, ignore_index, targeted, q);
  const Shape& shape = job.input.shape;
  std::vector<RowStats> rows(shape.batch * shape.height);
  for_each_band(shape, 8, [&](int64_t image, int64_t begin, int64_t end, Scratch& scratch) {
    kernels().pixel_grad(job, image, begin, end, scratch, rows.data());
  });
  return summed(rows, shape, logits);
}

Tensor confidence(const Tensor& logits, const Tensor& labels, int64_t ignore_index, int64_t kind) {
  ConfidenceMap job{};
  job.input = checked_input(logits, labels, ignore_index, "confidence");
  const Shape& shape = job.input.shape;
  Tensor out = torch::stable::new_empty(logits, {shape.batch, shape.height, shape.width}, ScalarType::Float);
  job.confidence = checked_choice<Confidence>(kind, 2, "confidence", "confidence");
  job.out = static_cast<float*>(out.mutable_data_ptr());
  for_each_band(shape, 8, [&](int64_t image, int64_t begin, int64_t end, Scratch& scratch) {
    kernels().confidence(job, image, begin, end, scratch);
  });
  return out;
}

Tensor kth_value(const Tensor& scores, const Tensor& k, const MaybeTensor& valid) {
  check_kth_value(scores, k, valid);
  const int64_t batch = scores.size(0), n = scores.size(1), count = k.size(1);
  Tensor out = torch::stable::new_empty(scores, {batch, count});
  const auto* from = static_cast<const float*>(scores.const_data_ptr());
  const auto* ranks = static_cast<const int64_t*>(k.const_data_ptr());
  const bool* mask = data_or_null<bool>(valid);
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kth_values(from + i * n, mask == nullptr ? nullptr : mask + i * n, n, ranks + i * count, count, to + i * count);
    }
  });
  return out;
}

Tensor next_tau_op(const Tensor& log_odds, const Tensor& stats, int64_t steps_left, double reach, double front_min,
                   double front_max) {
  const TauSettings settings = checked_next_tau(log_odds, stats, steps_left, reach, front_min, front_max);
  const int64_t batch = log_odds.size(0), n = log_odds.size(1) * log_odds.size(2);
  Tensor tau = torch::stable::new_empty(log_odds, {batch});
  const auto* from = static_cast<const float*>(log_odds.const_data_ptr());
  const auto* counts = static_cast<const double*>(stats.const_data_ptr());
  auto* to = static_cast<float*>(tau.mutable_data_ptr());
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = next_tau(from + i * n, n, counts + i * 4, settings);
  });
  return tau;
}

Tensor erode(const Tensor& scores, const MaybeTensor& valid, int64_t radius, const Tensor& cone,
             const MaybeTensor& predicted) {
  const Erode job = checked_erode(scores, valid, radius, cone, predicted);
  const int64_t batch = scores.size(0), pixels = job.height * job.width;
  Tensor out = torch::stable::new_empty(scores, {batch, job.height, job.width});
  const auto* from = static_cast<const float*>(scores.const_data_ptr());
  const auto* rise = static_cast<const float*>(cone.const_data_ptr());
  const bool* mask = data_or_null<bool>(valid);
  const int32_t* classes = data_or_null<int32_t>(predicted);
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  if (pixels == 0) return out;
  check_level();
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * pixels;
      kernels().erode(job, from + at, mask == nullptr ? nullptr : mask + at,
                      classes == nullptr ? nullptr : classes + at, rise[i], to + at, scratch);
    }
  });
  return out;
}

// Images are cut into pieces of so many elements, for the threads and for sums in a fixed order.
constexpr int64_t kPiece = 32768;

template <class F>
void for_each_piece(int64_t batch, int64_t elements, const F& f) {
  check_level();
  const int64_t pieces = (elements + kPiece - 1) / kPiece;
  torch::stable::parallel_for(0, batch * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % pieces * kPiece;
      f(task / pieces, first, std::min(first + kPiece, elements));
    }
  });
}

void linf_step_(const Tensor& x_adv, const Tensor& x, const Tensor& grad, double eps, double alpha, double low,
                double high, const MaybeTensor& mask) {
  const Step step = checked_step(x_adv, x, grad, mask, eps, alpha, low, high, "linf_step_");
  for_each_piece(x_adv.size(0), step.elements(),
                 [&](int64_t image, int64_t begin, int64_t end) { kernels().linf_step(step, image, begin, end); });
}

// The l_2 norm of a term for each image; the pieces' sums are added in order. `scale` has one number per image.
std::vector<double> l2_norms(const Step& step, L2Term term, const std::vector<float>& scale) {
  const int64_t batch = static_cast<int64_t>(scale.size());
  const int64_t pieces = (step.elements() + kPiece - 1) / kPiece;
  std::vector<double> sums(batch * pieces);
  for_each_piece(batch, step.elements(), [&](int64_t image, int64_t begin, int64_t end) {
    sums[image * pieces + begin / kPiece] = kernels().l2_sum_squares(step, image, begin, end, term, scale[image]);
  });
  std::vector<double> norms(batch, 0.0);
  for (int64_t i = 0; i < batch * pieces; ++i) norms[i / pieces] += sums[i];
  for (double& norm : norms) norm = std::sqrt(norm);
  return norms;
}

// eroseg_ext/ops/reference.py, l2_step_. Three passes over the images: ||grad||, ||delta||, the step.
void l2_step_(const Tensor& x_adv, const Tensor& x, const Tensor& grad, double eps, double alpha, double low,
              double high, const MaybeTensor& mask) {
  const Step step = checked_step(x_adv, x, grad, mask, eps, alpha, low, high, "l2_step_");
  const int64_t batch = x_adv.size(0);
  std::vector<float> scale(batch, 0.0f), shrink(batch, 1.0f);
  const std::vector<double> gradient = l2_norms(step, L2Term::kGradient, scale);
  for (int64_t i = 0; i < batch; ++i) {
    if (gradient[i] != 0) scale[i] = static_cast<float>(alpha / gradient[i]);
  }
  const std::vector<double> length = l2_norms(step, L2Term::kDelta, scale);
  for (int64_t i = 0; i < batch; ++i) {
    if (length[i] > eps) shrink[i] = static_cast<float>(eps / length[i]);
  }
  for_each_piece(batch, step.elements(), [&](int64_t image, int64_t begin, int64_t end) {
    kernels().l2_step(step, image, begin, end, scale[image], shrink[image]);
  });
}

Tensor confusion(const Tensor& prediction, const Tensor& labels, int64_t classes, int64_t ignore_index) {
  const Confusion job = checked_confusion(prediction, labels, classes, ignore_index);
  Tensor counts = torch::stable::new_zeros(prediction, {classes, classes}, ScalarType::Long);
  auto* out = static_cast<int64_t*>(counts.mutable_data_ptr());
  const Shape& shape = job.input.shape;
  const int64_t size = classes * classes;
  // A matrix per row range, added up afterwards: integers, so the order does not matter.
  for_each_band(shape, 8, [&](int64_t image, int64_t begin, int64_t end, Scratch& scratch) {
    std::vector<int64_t> own(size, 0);
    kernels().confusion(job, image, begin, end, scratch, own.data());
    for (int64_t i = 0; i < size; ++i) {
      if (own[i] != 0) __atomic_fetch_add(out + i, own[i], __ATOMIC_RELAXED);
    }
  });
  return counts;
}

}  // namespace
}  // namespace eroseg::cpu

STABLE_TORCH_LIBRARY_IMPL(eroseg, CPU, m) {
  m.impl("erosion_grad", TORCH_BOX(&eroseg::cpu::erosion_grad));
  m.impl("pixel_grad", TORCH_BOX(&eroseg::cpu::pixel_grad));
  m.impl("confidence", TORCH_BOX(&eroseg::cpu::confidence));
  m.impl("kth_value", TORCH_BOX(&eroseg::cpu::kth_value));
  m.impl("next_tau", TORCH_BOX(&eroseg::cpu::next_tau_op));
  m.impl("erode", TORCH_BOX(&eroseg::cpu::erode));
  m.impl("linf_step_", TORCH_BOX(&eroseg::cpu::linf_step_));
  m.impl("l2_step_", TORCH_BOX(&eroseg::cpu::l2_step_));
  m.impl("confusion", TORCH_BOX(&eroseg::cpu::confusion));
}
