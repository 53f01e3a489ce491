// confusion: a thread for each pixel of an image, which reads its logits one class after the other, or its prediction.
#include "interpolated.cuh"
#include "launchers.h"

namespace eroseg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 256;  // of an image, whose threads then take further pixels
// A block counts in shared memory where the matrix fits there, otherwise in global memory.
constexpr int64_t kMostSharedCells = 64 * 64;

// The arg max of a pixel's logits, the lowest class on ties. Binary segmentation's class 0 has the logit 0.
template <class Logit>
__device__ int arg_max(int channels, const Logit& logit) {
  if (channels == 1) return logit(0) > 0.0f ? 1 : 0;
  int best = 0;
  float largest = logit(0);
  for (int c = 1; c < channels; ++c) {
    const float value = logit(c);
    if (value > largest) largest = value, best = c;
  }
  return best;
}

template <class Type>
__device__ int predicted_class(const Input& input, int64_t image, int pixel) {
  const int channels = static_cast<int>(input.shape.channels), pixels = static_cast<int>(input.shape.pixels());
  if (input.interpolates()) return arg_max(channels, InterpolatedPixel<Type>(input, image, pixel));
  const bool channels_last = input.logits.channels_last;
  const auto* logits = static_cast<const typename Type::Element*>(input.logits.data) + image * channels * pixels;
  return arg_max(channels, [&](int c) {
    return Type::to_float(logits[channels_last ? pixel * channels + c : c * pixels + pixel]);
  });
}

template <class Type>
__global__ void __launch_bounds__(kThreads)
    confusion_kernel(const __grid_constant__ Confusion job, int blocks_of_image) {
  const int cells = static_cast<int>(job.classes * job.classes), pixels = static_cast<int>(job.input.shape.pixels());
  const bool is_shared = job.classes * job.classes <= kMostSharedCells;
  auto* counts = reinterpret_cast<unsigned long long*>(job.counts);
  auto* shared = reinterpret_cast<unsigned*>(shared_memory());
  for (int i = static_cast<int>(threadIdx.x); is_shared && i < cells; i += kThreads) shared[i] = 0;
  __syncthreads();
  const int64_t image = blockIdx.x / blocks_of_image;
  const int first = static_cast<int>(blockIdx.x % blocks_of_image) * kThreads + static_cast<int>(threadIdx.x);
  for (int pixel = first; pixel < pixels; pixel += blocks_of_image * kThreads) {
    const int64_t index = image * pixels + pixel;
    int label[1];
    read_labels(job.input.labels, static_cast<int>(job.classes), index, 1, label);
    const int64_t predicted =
        job.prediction == nullptr ? predicted_class<Type>(job.input, image, pixel) : job.prediction[index];
    if (label[0] < 0 || !is_class(predicted, job.classes)) continue;
    const int64_t cell = label[0] * job.classes + predicted;
    if (is_shared) {
      atomicAdd(&shared[cell], 1u);
    } else {
      atomicAdd(&counts[cell], 1ull);
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); is_shared && i < cells; i += kThreads) {
    if (shared[i] != 0) atomicAdd(&counts[i], static_cast<unsigned long long>(shared[i]));
  }
}

}  // namespace

cudaError_t launch_confusion(const Confusion& job, cudaStream_t stream) {
  const Shape& shape = job.input.shape;
  const int64_t cells = job.classes * job.classes;
  const int64_t shared = cells <= kMostSharedCells ? cells * static_cast<int64_t>(sizeof(unsigned)) : 0;
  const auto blocks = static_cast<int>(std::min((shape.pixels() + kThreads - 1) / kThreads, kMostBlocks));
  return for_type(job.input.logits.type, [&](auto type) {
    return launch(confusion_kernel<decltype(type)>, shape.batch * blocks, dim3(kThreads), shared, stream, job, blocks);
  });
}

}  // namespace eroseg::cuda
