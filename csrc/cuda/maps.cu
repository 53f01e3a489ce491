// The operations on maps beside the attack's step: confusion, erode. A thread for each pixel.
#include "general.cuh"

namespace eroseg::cuda {
namespace {

// Counts of a block in shared memory where the matrix fits there, else in global memory at once.
constexpr int64_t kMostSharedCells = 64 * 64;

__device__ __forceinline__ void count_cell(int64_t cell, unsigned* shared, unsigned long long* counts) {
  if (shared != nullptr) {
    atomicAdd(&shared[cell], 1u);
  } else {
    atomicAdd(&counts[cell], 1ull);
  }
}

template <class Type>
__device__ int arg_max(const Image<Type>& image, int pixel) {
  int best = 0;
  float largest = image.logit(0, pixel);
  for (int c = 1; c < image.classes; ++c) {
    const float value = image.logit(c, pixel);
    if (value > largest) largest = value, best = c;
  }
  return best;
}

template <class Type>
__global__ void __launch_bounds__(kPixelThreads)
    confusion_kernel(const __grid_constant__ Confusion job, int blocks_of_image, unsigned long long* counts) {
  const int64_t cells = job.classes * job.classes;
  auto* shared = cells <= kMostSharedCells ? reinterpret_cast<unsigned*>(shared_memory()) : nullptr;
  if (shared != nullptr) {
    for (int i = static_cast<int>(threadIdx.x); i < cells; i += kPixelThreads) shared[i] = 0;
    __syncthreads();
  }
  const int64_t image_index = blockIdx.x / blocks_of_image;
  const int first = static_cast<int>(blockIdx.x % blocks_of_image) * kPixelThreads + static_cast<int>(threadIdx.x);
  const Image<Type> image(job.input, image_index);
  const int pixels = static_cast<int>(job.input.shape.pixels());
  for (int pixel = first; pixel < pixels; pixel += blocks_of_image * kPixelThreads) {
    const int64_t index = image_index * pixels + pixel;
    const int label = read_label(job.input.labels, static_cast<int>(job.classes), index);
    const int64_t predicted = job.prediction == nullptr ? arg_max(image, pixel) : job.prediction[index];
    if (label >= 0) count_cell(label * job.classes + predicted, shared, counts);
  }
  if (shared != nullptr) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < cells; i += kPixelThreads) {
      if (shared[i] != 0) atomicAdd(&counts[i], static_cast<unsigned long long>(shared[i]));
    }
  }
}

// One 3x3 erosion with outer values `rise`; the first of them reads the scores themselves, where a void or NaN score
// lends nothing. With `only` set it does no more than that.
__global__ void __launch_bounds__(kPixelThreads)
    erode_kernel(const __grid_constant__ Erode job, bool only, const float* scores, const bool* valid,
                 const int32_t* predicted, const float* rise, float* out) {
  const int width = static_cast<int>(job.width), height = static_cast<int>(job.height);
  const int64_t pixels = job.height * job.width;
  const int64_t blocks_of_image = (pixels + kPixelThreads - 1) / kPixelThreads;
  const int64_t image = blockIdx.x / blocks_of_image;
  const int64_t pixel = blockIdx.x % blocks_of_image * kPixelThreads + threadIdx.x;
  if (pixel >= pixels) return;
  const int64_t offset = image * pixels;
  const auto score = [&](int64_t i) {
    const float value = scores[i];
    return value == value && (valid == nullptr || valid[i]) ? value : kInf;
  };
  const int64_t index = offset + pixel;
  float lowest = kInf;
  const int y = static_cast<int>(pixel / width), x = static_cast<int>(pixel % width);
  for (int dy = -1; dy <= 1 && !only; ++dy) {
    for (int dx = -1; dx <= 1; ++dx) {
      if (y + dy < 0 || y + dy >= height || x + dx < 0 || x + dx >= width) continue;
      const int64_t neighbour = index + dy * width + dx;
      if (predicted == nullptr || predicted[neighbour] == predicted[index]) lowest = fminf(lowest, score(neighbour));
    }
  }
  out[index] = fminf(score(index), lowest + rise[image]);
}

}  // namespace

cudaError_t launch_confusion(const Confusion& job, unsigned long long* counts, cudaStream_t stream) {
  const int blocks = pixel_blocks(job.input.shape);
  const int64_t cells = job.classes * job.classes;
  const int64_t shared = cells <= kMostSharedCells ? cells * static_cast<int64_t>(sizeof(unsigned)) : 0;
  return for_type(job.input.logits.type, [&](auto type) {
    return launch(confusion_kernel<decltype(type)>, job.input.shape.batch * blocks, dim3(kPixelThreads), shared, stream,
                  job, blocks, counts);
  });
}

cudaError_t launch_erode(const Erode& job, int64_t batch, const float* scores, const bool* valid,
                         const int32_t* predicted, const float* rise, float* out, float* spare, cudaStream_t stream) {
  const int64_t blocks = batch * ((job.height * job.width + kPixelThreads - 1) / kPixelThreads);
  const int passes = job.radius > 1 ? job.radius : 1;
  const float* from = scores;
  for (int pass = 0; pass < passes; ++pass) {
    // Whoever writes last writes to `out`.
    float* to = (passes - pass) % 2 == 1 ? out : spare;
    const cudaError_t error = launch(erode_kernel, blocks, dim3(kPixelThreads), 0, stream, job, job.radius == 0, from,
                                     pass == 0 ? valid : nullptr, predicted, rise, to);
    if (error != cudaSuccess) return error;
    from = to;
  }
  return cudaSuccess;
}

}  // namespace eroseg::cuda
