// confidence: how sure the model is of each pixel. A block goes down its band of rows, and reduces each in shared
// memory (rows.cuh) while the next one is fetched (staging.cuh).
#include "rows_launch.cuh"

namespace eroseg::cuda {
namespace {

template <class Type, Layout kLayout>
__global__ void __launch_bounds__(kMostThreads, 2)
    confidence_kernel(const __grid_constant__ ConfidenceMap job, const __grid_constant__ RowsPlan plan) {
  constexpr int kPixels = Word<Type>::kElements;
  const Place place = Place::of<Type>(job.input.shape, plan.strips, plan.words_of_share);
  Staging<Type, kLayout> staging(job.input, nullptr, plan, place, shared_memory());
  Rows<Type, false> rows(job.input, plan, place);
  for_each_row(place, staging, rows, [&](int y, int stage) {
    float confidence[kPixels];
    rows.reduce(y, staging.at(stage, place.x), job.confidence, confidence);
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      if (place.own && place.group == 0 && v < place.pixels) job.out[place.index(y) + v] = absolute(confidence[v]);
    }
  });
}

}  // namespace

cudaError_t launch_confidence(const ConfidenceMap& job, cudaStream_t stream) {
  if (job.input.shape.pixels() == 0) return cudaSuccess;
  return for_rows(job.input, nullptr, [&](auto type, auto layout) {
    using Type = decltype(type);
    return launch_rows<Type, layout.value>(confidence_kernel<Type, layout.value>, job, kSingleRows, stream);
  });
}

}  // namespace eroseg::cuda
