// linf_step_ and l2_step_: a thread for each word of neighbouring elements of the images.
//
// The l_2 step takes three passes, since the norms of an image's gradient and of its perturbation are known only after
// all of it has been read: kSumsOfImage blocks write partial sums of squares, and every block of the next pass adds
// them up again, in one order.
#include "launchers.h"
#include "platform.cuh"

namespace eroseg::cuda {
namespace {

constexpr int kThreads = 256;

template <int kWide>
struct alignas(kWide * sizeof(float)) Floats {
  float value[kWide];
};

// Whether element i of an image lies inside the mask.
__device__ __forceinline__ bool inside(const Step& step, int64_t image, int64_t i) {
  if (step.mask == nullptr) return true;
  const int64_t pixel = step.channels_last ? i / step.channels : i % step.pixels;
  return step.mask[image * step.pixels + pixel];
}

// Comparisons that are false for NaN, which then stays.
__device__ __forceinline__ float clamped(float value, float low, float high) {
  return value < low ? low : (value > high ? high : value);
}

template <int kWide>
__global__ void __launch_bounds__(kThreads) linf_step_kernel(const __grid_constant__ Step step, int64_t words) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (word >= words) return;
  auto* to = reinterpret_cast<Floats<kWide>*>(step.x_adv) + word;
  const auto clean = reinterpret_cast<const Floats<kWide>*>(step.x)[word];
  const auto grad = reinterpret_cast<const Floats<kWide>*>(step.grad)[word];
  Floats<kWide> moved = *to;
  const int64_t elements = step.elements(), first = word * kWide;
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    const float g = grad.value[j], x = clean.value[j];
    const float sign = g > 0.0f ? 1.0f : (g < 0.0f ? -1.0f : g);
    const float in_ball = clamped(moved.value[j] + step.alpha * sign, x - step.eps, x + step.eps);
    const bool moves = step.mask == nullptr || inside(step, (first + j) / elements, (first + j) % elements);
    if (moves) moved.value[j] = clamped(in_ball, step.low, step.high);
  }
  *to = moved;
}

// The norm whose partial sums of squares are `sums`; all threads of a warp call it.
__device__ __forceinline__ double norm_of(const double* sums) {
  double sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < kSumsOfImage; i += kWarp) sum += sums[i];
  return sqrt(warp_sum(sum));
}

__device__ __forceinline__ float scale_of(double alpha, const double* sums, int64_t image) {
  const double norm = norm_of(sums + image * 2 * kSumsOfImage);
  return norm == 0.0 ? 0.0f : static_cast<float>(alpha / norm);
}

// x_adv + scale * gradient - x, where only the pixels inside the mask move.
__device__ __forceinline__ float delta_of(const Step& step, int64_t image, int64_t i, float scale) {
  const int64_t at = image * step.elements() + i;
  return step.x_adv[at] + scale * (inside(step, image, i) ? step.grad[at] : 0.0f) - step.x[at];
}

// Partial sums of squares of the gradient, or of the perturbation it leads to.
template <bool kOfDelta>
__global__ void __launch_bounds__(kThreads)
    l2_sums_kernel(const __grid_constant__ Step step, double alpha, double* sums) {
  auto* of_warp = reinterpret_cast<double*>(shared_memory());
  const int64_t image = blockIdx.x / kSumsOfImage, part = blockIdx.x % kSumsOfImage;
  const float scale = kOfDelta ? scale_of(alpha, sums, image) : 0.0f;
  double sum = 0;
  for (int64_t i = part * kThreads + threadIdx.x; i < step.elements(); i += kSumsOfImage * kThreads) {
    float value = 0.0f;
    if (kOfDelta) {
      value = delta_of(step, image, i, scale);
    } else if (inside(step, image, i)) {
      value = step.grad[image * step.elements() + i];
    }
    sum += static_cast<double>(value) * static_cast<double>(value);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int i = 0; i < kThreads / kWarp; ++i) total += of_warp[i];
    sums[(image * 2 + (kOfDelta ? 1 : 0)) * kSumsOfImage + part] = total;
  }
}

__global__ void __launch_bounds__(kThreads) l2_step_kernel(const __grid_constant__ Step step, double eps, double alpha,
                                                           int64_t blocks_of_image, const double* sums) {
  const int64_t image = blockIdx.x / blocks_of_image;
  const float scale = scale_of(alpha, sums, image);
  const double length = norm_of(sums + (image * 2 + 1) * kSumsOfImage);
  const float shrink = length > eps ? static_cast<float>(eps / length) : 1.0f;
  const int64_t i = blockIdx.x % blocks_of_image * kThreads + threadIdx.x;
  if (i >= step.elements() || !inside(step, image, i)) return;
  const int64_t at = image * step.elements() + i;
  step.x_adv[at] = clamped(step.x[at] + shrink * delta_of(step, image, i, scale), step.low, step.high);
}

}  // namespace

cudaError_t launch_linf_step(const Step& step, int64_t batch, cudaStream_t stream) {
  const int64_t total = batch * step.elements();
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (step.mask == nullptr && total % 4 == 0 && aligned(step.x_adv) && aligned(step.x) && aligned(step.grad)) {
    return launch(linf_step_kernel<4>, (total / 4 + kThreads - 1) / kThreads, dim3(kThreads), 0, stream, step,
                  total / 4);
  }
  return launch(linf_step_kernel<1>, (total + kThreads - 1) / kThreads, dim3(kThreads), 0, stream, step, total);
}

cudaError_t launch_l2_step(const Step& step, int64_t batch, double eps, double alpha, double* sums,
                           cudaStream_t stream) {
  constexpr int64_t kShared = kThreads / kWarp * sizeof(double);
  cudaError_t error =
      launch(l2_sums_kernel<false>, batch * kSumsOfImage, dim3(kThreads), kShared, stream, step, alpha, sums);
  if (error != cudaSuccess) return error;
  error = launch(l2_sums_kernel<true>, batch * kSumsOfImage, dim3(kThreads), kShared, stream, step, alpha, sums);
  if (error != cudaSuccess) return error;
  const int64_t blocks = (step.elements() + kThreads - 1) / kThreads;
  return launch(l2_step_kernel, batch * blocks, dim3(kThreads), 0, stream, step, eps, alpha, blocks,
                static_cast<const double*>(sums));
}

}  // namespace eroseg::cuda
