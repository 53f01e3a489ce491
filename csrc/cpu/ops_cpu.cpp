// The operators for CPU tensors: the rows of the images are divided among threads, which call the kernels.
#include "../operators.h"
#include "kernels.h"
#include "select.h"

namespace eroseg::cpu {
namespace {

// An exception loses its text in a parallel loop: a wrong EROSEG_CPU_LEVEL has to be reported before.
void check_level() { kernels(); }

// Calls f(image, begin, end, scratch) for tiles of an image's `height` rows, of all images. A tile is a task; there are
// a few per thread, for balance, but none with fewer rows than min_rows unless an image has fewer. What is computed of
// a row does not depend on its tile, so no result depends on the number of threads.
template <class F>
void for_each_tile(const Shape& shape, int64_t height, int64_t min_rows, const F& f) {
  if (shape.batch * shape.pixels() == 0) return;
  check_level();
  constexpr int64_t kTasksPerThread = 4;
  const int64_t tasks = kTasksPerThread * torch::stable::get_num_threads();
  const int64_t tiles_wanted = (tasks + shape.batch - 1) / shape.batch;
  const int64_t rows = std::max((height + tiles_wanted - 1) / tiles_wanted, min_rows);
  const int64_t tiles = (height + rows - 1) / rows;
  torch::stable::parallel_for(0, shape.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % tiles * rows;
      f(task / tiles, row, std::min(row + rows, height), scratch);
    }
  });
}

// No kernel runs over labels without pixels, but the logits may have some.
void zero_without_pixels(const Input& input, void* grad) {
  const int64_t size = input.logits.type == FloatType::kFloat32 ? 4 : 2;
  if (input.shape.pixels() > 0) return;
  std::memset(grad, 0, input.shape.batch * input.shape.channels * input.logits.pixels() * size);
}

Tensor summed(const std::vector<RowStats>& rows, const Shape& shape, const Tensor& like) {
  Tensor stats = torch::stable::new_empty(like, {shape.batch, 4}, ScalarType::Double);
  auto* out = static_cast<double*>(stats.mutable_data_ptr());
  for (int64_t image = 0; image < shape.batch; ++image, out += 4) {
    RowStats sum;
    for (int64_t y = 0; y < shape.height; ++y) {
      const RowStats& row = rows[image * shape.height + y];
      sum.valid += row.valid;
      sum.correct += row.correct;
      sum.front += row.front;
      sum.movement += row.movement;
    }
    out[0] = static_cast<double>(sum.valid);
    out[1] = static_cast<double>(sum.correct);
    out[2] = static_cast<double>(sum.front);
    out[3] = sum.movement;
  }
  return stats;
}

class Backend {
 public:
  explicit Backend(const Tensor& first) : first_(first) {}

  Tensor erosion_grad(const ErosionGrad& job) const {
    const Shape& shape = job.input.shape;
    std::vector<RowStats> rows(shape.batch * shape.height);
    zero_without_pixels(job.input, job.grad);
    // A task also reduces the rows above and below its tile: those should be a small part of its work.
    for_each_tile(shape, job.input.logits.height, 16, [&](int64_t image, int64_t begin, int64_t end, Scratch& scratch) {
      kernels().erosion_grad(job, image, begin, end, scratch, rows.data());
    });
    return summed(rows, shape, first_);
  }

  Tensor pixel_grad(const PixelGrad& job) const {
    const Shape& shape = job.input.shape;
    std::vector<RowStats> rows(shape.batch * shape.height);
    zero_without_pixels(job.input, job.grad);
    for_each_tile(shape, job.input.logits.height, 8, [&](int64_t image, int64_t begin, int64_t end, Scratch& scratch) {
      kernels().pixel_grad(job, image, begin, end, scratch, rows.data());
    });
    return summed(rows, shape, first_);
  }

  void confidence(const ConfidenceMap& job) const {
    for_each_tile(job.input.shape, job.input.shape.height, 8,
                  [&](int64_t image, int64_t begin, int64_t end, Scratch& scratch) {
                    kernels().confidence(job, image, begin, end, scratch);
                  });
  }

  void kth_value(const KthValue& job) const {
    torch::stable::parallel_for(0, job.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kth_values(job.scores + i * job.n, job.valid == nullptr ? nullptr : job.valid + i * job.n, job.n,
                   job.k + i * job.count, job.count, job.out + i * job.count);
      }
    });
  }

  void next_tau(const NextTau& job) const {
    torch::stable::parallel_for(0, job.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        job.tau[i] = cpu::next_tau(job.scores + i * job.n, job.n, job.stats + i * 4, job.settings);
      }
    });
  }

  void linf_step(const Step& step) const {
    check_level();
    constexpr int64_t kPiece = 32768;  // elements of an image that a task takes
    const int64_t pieces = (step.elements() + kPiece - 1) / kPiece;
    torch::stable::parallel_for(0, step.batch * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % pieces * kPiece;
        kernels().linf_step(step, task / pieces, first, std::min(first + kPiece, step.elements()));
      }
    });
  }

  // A tile has a matrix of its own. They are integers, so the order in which they are added does not matter.
  void confusion(const Confusion& job) const {
    const int64_t cells = job.classes * job.classes;
    for_each_tile(job.input.shape, job.input.shape.height, 8,
                  [&](int64_t image, int64_t begin, int64_t end, Scratch& scratch) {
                    std::vector<int64_t> own(cells, 0);
                    kernels().confusion(job, image, begin, end, scratch, own.data());
                    for (int64_t i = 0; i < cells; ++i) {
                      if (own[i] != 0) __atomic_fetch_add(job.counts + i, own[i], __ATOMIC_RELAXED);
                    }
                  });
  }

 private:
  const Tensor& first_;
};

}  // namespace
}  // namespace eroseg::cpu

STABLE_TORCH_LIBRARY_IMPL(eroseg, CPU, m) { eroseg::implement<eroseg::cpu::Backend>(m); }
