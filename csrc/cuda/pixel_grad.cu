// pixel_grad: the weighted cross-entropy of the other methods. A pixel's gradient needs that pixel only: a block goes
// down the rows of its tile, reduces each in shared memory and turns it into its gradient there (rows.cuh) while the
// next one is fetched (staging.cuh).
#include "counts.cuh"
#include "rows_launch.cuh"

namespace eroseg::cuda {
namespace {

template <class Type, bool kPieces>
__global__ void __launch_bounds__(kMostThreads, 2)
    pixel_grad_kernel(const __grid_constant__ PixelGrad job, const __grid_constant__ RowsPlan plan,
                      const __grid_constant__ Counting counting) {
  constexpr int kPixels = Vector<Type>::kElements;
  const ThreadTile tile = ThreadTile::of<Type>(job.input.shape, plan.tiles, plan.slice_classes);
  unsigned char* memory = shared_memory();
  Staging<Type, kPieces> staging(job.input, job.grad, plan, tile, memory);
  Rows<Type, true> rows(job.input, plan, tile);
  const float* class_weight =
      job.class_weight == nullptr ? nullptr : job.class_weight + tile.image * job.input.shape.classes();
  Counts counts;
  for_each_row(tile, staging, rows, [&](int y, int stage) {
    const Terms<kPixels> terms = rows.reduce(y, staging.at(stage, tile.x));
    float weight[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      const int label = terms.label[v];
      const float log_odds = terms.log_odds[v];
      weight[v] = 0.0f;
      if (label >= 0 && log_odds == log_odds) {
        weight[v] = method_weight(job.method, log_odds, job.method.targeted != terms.correct[v], terms.norm[v]);
        if (class_weight != nullptr) weight[v] *= class_weight[label];
      }
      if (tile.own && tile.group == 0 && label >= 0) {
        counts.valid += 1;
        counts.front += 1;
        counts.correct += terms.correct[v];
        if (log_odds != log_odds) counts.movement += log_odds;
      }
    }
    rows.put(staging.at(stage, tile.x), terms.kept, weight, job.method.targeted);
    staging.copy_out(y, stage);
  });
  add_up(counts, job.input.shape.batch, counting, memory);
}

}  // namespace

cudaError_t launch_pixel_grad(const PixelGrad& job, const Counting& counting, PixelTerms* workspace,
                              cudaStream_t stream) {
  if (job.input.interpolates()) return launch_interpolated(job, counting, workspace, stream);
  const Shape& shape = job.input.shape;
  if (shape.pixels() == 0) return count_nothing(shape, counting, stream);
  return for_rows(job.input, job.grad, [&](auto type, auto pieces) {
    using Type = decltype(type);
    return launch_rows<Type>(pixel_grad_kernel<Type, pieces.value>, job, kSingleRows, stream, counting);
  });
}

}  // namespace eroseg::cuda
