// confidence, and the first of erosion_grad's passes: how sure the model is of each pixel.
//
// A block goes down its band of rows, and reduces each in shared memory (rows.cuh) while the next one is fetched
// (staging.cuh). More than 256 classes take a kernel with one thread for each pixel.
#include "general.cuh"
#include "passes.cuh"
#include "rows_launch.cuh"

namespace eroseg::cuda {
namespace {

constexpr int kStages = 2;

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
    scores_kernel(const __grid_constant__ ScorePass job, const __grid_constant__ Strips strips,
                  const __grid_constant__ Counting counting) {
  constexpr int kPixels = Word<Type>::kElements;
  const Place place = Place::of<Type>(job.input.shape, strips);
  unsigned char* memory = shared_memory();
  Staging<Type, kLayout> staging(job.input, nullptr, strips, place, kStages, memory);
  Rows<Type, kLayout, false> rows(job.input, place, staging, strips.groups);
  const bool writes = place.own && place.group == 0;
  Counts counts;
  staging.fetch(place.begin, 0);
  for (int y = place.begin, stage = 0; y < place.end; ++y, stage = 1 - stage) {
    staging.arrive();
    if (y + 1 < place.end) {
      staging.fetch(y + 1, 1 - stage);
      rows.prefetch_labels(y + 1);
    }
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
  }
  if (job.tau != nullptr) add_up(counts, job.input.shape.batch, counting, memory);
}

template <class Type>
__global__ void __launch_bounds__(kPixelThreads)
    scores_general_kernel(const __grid_constant__ ScorePass job, int blocks_of_image,
                          const __grid_constant__ Counting counting) {
  const int64_t image_index = blockIdx.x / blocks_of_image;
  const int first = static_cast<int>(blockIdx.x % blocks_of_image) * kPixelThreads + static_cast<int>(threadIdx.x);
  const Image<Type> image(job.input, image_index);
  const int pixels = static_cast<int>(job.input.shape.pixels());
  Counts counts;
  for (int pixel = first; pixel < pixels; pixel += blocks_of_image * kPixelThreads) {
    const int64_t index = image_index * pixels + pixel;
    const int label = read_label(job.input.labels, image.classes, index);
    const PixelTerms terms = reduce_pixel(image, pixel, label);
    const float confidence = signed_confidence(image, pixel, label, terms, job.confidence);
    if (job.predicted != nullptr) job.predicted[index] = terms.predicted;
    put_score(job, image_index, index, label >= 0, terms.right, confidence, counts);
  }
  if (job.tau != nullptr) add_up(counts, job.input.shape.batch, counting, shared_memory());
}

}  // namespace

cudaError_t launch_scores(const ScorePass& job, const Counting& counting, cudaStream_t stream) {
  const Shape& shape = job.input.shape;
  if (shape.classes() > kMostClasses) {
    const int blocks = pixel_blocks(shape);
    return for_type(job.input.logits.type, [&](auto type) {
      return launch(scores_general_kernel<decltype(type)>, shape.batch * blocks, dim3(kPixelThreads),
                    counts_bytes(kPixelThreads), stream, job, blocks, counting);
    });
  }
  return for_rows(job.input, [&](auto type, auto layout) {
    using Type = decltype(type);
    return launch_rows<Type>(scores_kernel<Type, decltype(layout)::value>, job, {0, kStages, 0, 0}, stream, counting);
  });
}

cudaError_t launch_confidence(const ConfidenceMap& job, cudaStream_t stream) {
  if (job.input.shape.pixels() == 0) return cudaSuccess;
  return launch_scores({job.input, job.confidence, job.out, nullptr, nullptr, nullptr, false}, {}, stream);
}

}  // namespace eroseg::cuda
