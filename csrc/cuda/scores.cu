// confidence, and the first of erosion_grad's passes: how sure the model is of each pixel.
//
// A block goes down its band of rows, and reduces each in shared memory (rows.cuh) while the next one is fetched
// (staging.cuh). More than 256 classes take a kernel with one thread for each pixel.
#include "general.cuh"
#include "passes.cuh"
#include "rows_launch.cuh"

namespace eroseg::cuda {
namespace {

// Writes what is known of a pixel, and counts it. `confidence` is signed: +inf of a void pixel, NaN where logits are
// not finite.
__device__ __forceinline__ void put_score(const ScorePass& job, int64_t image, int64_t index, bool valid, bool right,
                                          float confidence, Counts& counts) {
  if (job.tau == nullptr) {
    job.out[index] = absolute(confidence);
    return;
  }
  job.out[index] = confidence;
  counts.valid += valid;
  counts.right += right;
  if (confidence != confidence) counts.movement += confidence;
  if (absolute(confidence) <= job.tau[image]) {
    counts.front += 1;
    const float lost = job.previous == nullptr ? 0.0f : job.previous[index] - confidence;
    counts.movement += job.targeted ? -lost : lost;
  }
}

template <class Type, Layout kLayout>
__global__ void __launch_bounds__(kMostThreads, 2)
    scores_kernel(const __grid_constant__ ScorePass job, const __grid_constant__ RowsPlan plan,
                  const __grid_constant__ Counting counting) {
  constexpr int kPixels = Word<Type>::kElements;
  const Place place = Place::of<Type>(job.input.shape, plan.strips, plan.words_of_share);
  unsigned char* memory = shared_memory();
  Staging<Type, kLayout> staging(job.input, nullptr, plan, place, memory);
  Rows<Type, kLayout, false> rows(job.input, plan, place, staging);
  const bool writes = place.own && place.group == 0;
  Counts counts;
  for_each_row(place, staging, rows, [&](int y, int stage) {
    if (job.predicted != nullptr) {
      int predicted[kPixels];
      rows.predict(y, stage, predicted);
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        if (writes && v < place.pixels) job.predicted[place.index(y) + v] = predicted[v];
      }
    }
    float confidence[kPixels];
    const Terms<kPixels> terms = rows.reduce(y, stage, job.confidence, confidence);
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      if (!writes || v >= place.pixels) continue;
      put_score(job, place.image, place.index(y) + v, terms.label[v] >= 0, terms.right[v], confidence[v], counts);
    }
  });
  if (job.tau != nullptr) add_up(counts, job.input.shape.batch, counting, memory);
}

template <class Type>
__global__ void __launch_bounds__(kPixelThreads, 2)
    scores_general_kernel(const __grid_constant__ ScorePass job, int blocks_of_image,
                          const __grid_constant__ Counting counting) {
  Counts counts;
  for_each_pixel<Type>(job.input, blocks_of_image, [&](const Image<Type>& image, int pixel, int64_t index) {
    const int label = read_label(job.input.labels, image.classes, index);
    const PixelTerms terms = reduce_pixel(image, pixel, label);
    const float confidence = signed_confidence(image, pixel, label, terms, job.confidence);
    if (job.predicted != nullptr) job.predicted[index] = terms.predicted;
    put_score(job, image.number, index, label >= 0, terms.right, confidence, counts);
  });
  if (job.tau != nullptr) add_up(counts, job.input.shape.batch, counting, shared_memory());
}

}  // namespace

cudaError_t launch_scores(const ScorePass& job, const Counting& counting, cudaStream_t stream) {
  if (job.input.shape.classes() > kMostClasses) {
    return for_type(job.input.logits.type, [&](auto type) {
      const auto kernel = scores_general_kernel<decltype(type)>;
      return launch_pixels(kernel, job, counts_bytes(kPixelThreads), stream, counting);
    });
  }
  return for_rows(job.input, nullptr, [&](auto type, auto layout) {
    using Type = decltype(type);
    return launch_rows<Type, layout.value>(scores_kernel<Type, layout.value>, job, kSingleRows, stream, counting);
  });
}

cudaError_t launch_confidence(const ConfidenceMap& job, cudaStream_t stream) {
  if (job.input.shape.pixels() == 0) return cudaSuccess;
  return launch_scores({job.input, job.confidence, job.out, nullptr, nullptr, nullptr, false}, {}, stream);
}

}  // namespace eroseg::cuda
