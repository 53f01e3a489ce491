// confidence: how sure the model is of each pixel. A block goes down the rows of its tile, and reduces each in shared
// memory (rows.cuh) while the next one is fetched (staging.cuh).
#include "rows_launch.cuh"

namespace eroseg::cuda {
namespace {

template <class Type, bool kPieces>
__global__ void __launch_bounds__(kMostThreads, 2)
    confidence_kernel(const __grid_constant__ ConfidenceMap job, const __grid_constant__ RowsPlan plan) {
  constexpr int kPixels = Vector<Type>::kElements;
  const ThreadTile tile = ThreadTile::of<Type>(job.input.shape, plan.tiles, plan.slice_classes);
  Staging<Type, kPieces> staging(job.input, nullptr, plan, tile, shared_memory());
  Rows<Type, false> rows(job.input, plan, tile);
  for_each_row(tile, staging, rows, [&](int y, int stage) {
    float confidence[kPixels];
    rows.reduce(y, staging.at(stage, tile.x), job.confidence, confidence);
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      if (tile.own && tile.group == 0 && v < tile.pixels) job.out[tile.index(y) + v] = absolute(confidence[v]);
    }
  });
}

}  // namespace

cudaError_t launch_confidence(const ConfidenceMap& job, cudaStream_t stream) {
  if (job.input.interpolates()) return launch_interpolated(job, stream);
  if (job.input.shape.pixels() == 0) return cudaSuccess;
  return for_rows(job.input, nullptr, [&](auto type, auto pieces) {
    using Type = decltype(type);
    return launch_rows<Type>(confidence_kernel<Type, pieces.value>, job, kSingleRows, stream);
  });
}

}  // namespace eroseg::cuda
