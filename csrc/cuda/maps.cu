// The operations on maps: confusion, and erode.
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
  for_each_pixel<Type>(job.input, blocks_of_image, [&](const Image<Type>& image, int pixel, int64_t index) {
    const int label = read_label(job.input.labels, static_cast<int>(job.classes), index);
    const int64_t predicted = job.prediction == nullptr ? arg_max(image, pixel) : job.prediction[index];
    if (label >= 0 && is_class(predicted, job.classes)) count_cell(label * job.classes + predicted, shared, counts);
  });
  if (shared != nullptr) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < cells; i += kPixelThreads) {
      if (shared[i] != 0) atomicAdd(&counts[i], static_cast<unsigned long long>(shared[i]));
    }
  }
}

// A tile of an image, and the threads that erode it.
constexpr int kTileWidth = 64, kTileHeight = 32, kTileThreads = 256;

// The erosion of a tile, which stands in shared memory with `radius` pixels more on every side. As often as that, all
// of it but its outermost pixels is eroded by a 3x3 element whose outer values are the cone's rise; what is still right
// then is the tile itself. Pixels outside the image stay +inf, and so lend nothing, whatever their class is said to be.
__global__ void __launch_bounds__(kTileThreads)
    erode_kernel(const __grid_constant__ Erode job, const float* scores, bool of_absolute, const bool* valid,
                 const int32_t* predicted, const float* rises, float slope, float* out) {
  const int height = static_cast<int>(job.height), width = static_cast<int>(job.width), radius = job.radius;
  const int across = (width + kTileWidth - 1) / kTileWidth, down = (height + kTileHeight - 1) / kTileHeight;
  const int64_t image = blockIdx.x / (across * down), offset = image * height * width;
  const int tile = static_cast<int>(blockIdx.x % (across * down));
  const int top = tile / across * kTileHeight - radius, left = tile % across * kTileWidth - radius;
  const int pitch = kTileWidth + 2 * radius, rows = kTileHeight + 2 * radius;
  const float rise = slope * rises[image];
  auto* now = reinterpret_cast<float*>(shared_memory());
  float* next = now + rows * pitch;
  auto* classes = reinterpret_cast<int32_t*>(next + rows * pitch);

  // Calls f(cell, place in the image, or -1 outside it) for this thread's cells `margin` or more from the border.
  const auto each = [&](int margin, const auto& f) {
    const int self = static_cast<int>(threadIdx.x);
    for (int y = margin + self / kWarp; y < rows - margin; y += kTileThreads / kWarp) {
      for (int x = margin + self % kWarp; x < pitch - margin; x += kWarp) {
        const bool inside = top + y >= 0 && top + y < height && left + x >= 0 && left + x < width;
        f(y * pitch + x, inside ? offset + (top + y) * width + left + x : -1);
      }
    }
  };
  each(0, [&](int cell, int64_t index) {
    const float score = index >= 0 && (valid == nullptr || valid[index]) ? scores[index] : kInf;
    now[cell] = score != score ? kInf : (of_absolute ? absolute(score) : score);
    if (predicted != nullptr) classes[cell] = index >= 0 ? predicted[index] : -1;
  });
  __syncthreads();
  for (int margin = 1; margin <= radius; ++margin) {
    each(margin, [&](int cell, int64_t index) {
      float lowest = kInf;
#pragma unroll
      for (int dy = -1; dy <= 1; ++dy) {
#pragma unroll
        for (int dx = -1; dx <= 1; ++dx) {
          const int neighbour = cell + dy * pitch + dx;
          const bool lends = predicted == nullptr || classes[neighbour] == classes[cell];
          if (lends) lowest = fminf(lowest, now[neighbour]);
        }
      }
      next[cell] = index >= 0 ? fminf(now[cell], lowest + rise) : kInf;
    });
    __syncthreads();
    float* const last = now;
    now = next;
    next = last;
  }
  each(radius, [&](int cell, int64_t index) {
    if (index >= 0) out[index] = now[cell];
  });
}

}  // namespace

cudaError_t launch_confusion(const Confusion& job, unsigned long long* counts, cudaStream_t stream) {
  const int64_t cells = job.classes * job.classes;
  const int64_t shared = cells <= kMostSharedCells ? cells * static_cast<int64_t>(sizeof(unsigned)) : 0;
  return for_type(job.input.logits.type, [&](auto type) {
    return launch_pixels(confusion_kernel<decltype(type)>, job, shared, stream, counts);
  });
}

cudaError_t launch_erode(const Erode& job, int64_t batch, const float* scores, bool of_absolute, const bool* valid,
                         const int32_t* predicted, const float* rise, float slope, float* out, cudaStream_t stream) {
  const int64_t across = (job.width + kTileWidth - 1) / kTileWidth;
  const int64_t down = (job.height + kTileHeight - 1) / kTileHeight;
  const int64_t cells = (kTileWidth + 2 * job.radius) * static_cast<int64_t>(kTileHeight + 2 * job.radius);
  const int64_t maps = predicted == nullptr ? 2 : 3;
  return launch(erode_kernel, batch * across * down, dim3(kTileThreads), maps * cells * 4, stream, job, scores,
                of_absolute, valid, predicted, rise, slope, out);
}

}  // namespace eroseg::cuda
