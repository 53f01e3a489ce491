// confidence: how sure the model is of each pixel. A block goes down its band of rows, and reduces each in shared
// memory (rows.cuh) while the next one is fetched (staging.cuh). More than 256 classes take a kernel with one thread
// for each pixel.
#include "general.cuh"
#include "rows_launch.cuh"

namespace eroseg::cuda {
namespace {

constexpr int kStages = 2;

template <class Type, Layout kLayout>
__global__ void __launch_bounds__(kMostThreads, 2)
    confidence_kernel(const __grid_constant__ ConfidenceMap job, const __grid_constant__ Strips strips) {
  constexpr int kPixels = Word<Type>::kElements;
  const Place place = Place::of<Type>(job.input.shape, strips);
  Staging<Type, kLayout> staging(job.input, nullptr, strips, place, kStages, shared_memory());
  Rows<Type, kLayout, false> rows(job.input, place, staging, strips.groups);
  staging.fetch(place.begin, 0);
  for (int y = place.begin, stage = 0; y < place.end; ++y, stage = 1 - stage) {
    staging.arrive();
    if (y + 1 < place.end) {
      staging.fetch(y + 1, 1 - stage);
      rows.prefetch_labels(y + 1);
    }
    float confidence[kPixels];
    rows.reduce(y, stage, job.confidence, confidence);
    if (place.own && place.group == 0) {
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        if (v < place.pixels) job.out[place.index(y) + v] = absolute(confidence[v]);
      }
    }
  }
}

template <class Type>
__global__ void __launch_bounds__(kPixelThreads)
    confidence_general_kernel(const __grid_constant__ ConfidenceMap job, int blocks_of_image) {
  const int64_t image_index = blockIdx.x / blocks_of_image;
  const int first = static_cast<int>(blockIdx.x % blocks_of_image) * kPixelThreads + static_cast<int>(threadIdx.x);
  const Image<Type> image(job.input, image_index);
  const int pixels = static_cast<int>(job.input.shape.pixels());
  for (int pixel = first; pixel < pixels; pixel += blocks_of_image * kPixelThreads) {
    const int64_t index = image_index * pixels + pixel;
    const int label = read_label(job.input.labels, image.classes, index);
    const PixelTerms terms = reduce_pixel(image, pixel, label);
    job.out[index] = absolute(signed_confidence(image, pixel, label, terms, job.confidence));
  }
}

template <class Type>
cudaError_t launch_confidence_general(const ConfidenceMap& job, cudaStream_t stream) {
  const int blocks = pixel_blocks(job.input.shape);
  return launch(confidence_general_kernel<Type>, job.input.shape.batch * blocks, dim3(kPixelThreads), 0, stream, job,
                blocks);
}

}  // namespace

cudaError_t launch_confidence(const ConfidenceMap& job, cudaStream_t stream) {
  if (job.input.shape.pixels() == 0) return cudaSuccess;
  return for_rows(job.input, [&](auto type, auto layout) {
    using Type = decltype(type);
    return launch_rows<Type>(confidence_kernel<Type, decltype(layout)::value>, job, {0, kStages, 0, 0}, stream,
                             [&] { return launch_confidence_general<Type>(job, stream); });
  });
}

}  // namespace eroseg::cuda
