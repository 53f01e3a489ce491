// linf_step_: a thread for each kWide neighbouring elements of the images.
#include "launchers.h"
#include "types.cuh"

namespace eroseg::cuda {
namespace {

constexpr int kThreads = 256;

template <int kWide>
__global__ void __launch_bounds__(kThreads) linf_step_kernel(const __grid_constant__ Step step, int64_t vectors) {
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (vector >= vectors) return;
  auto* to = reinterpret_cast<AlignedVector<float, kWide>*>(step.x_adv) + vector;
  const auto clean = reinterpret_cast<const AlignedVector<float, kWide>*>(step.x)[vector];
  const auto grad = reinterpret_cast<const AlignedVector<float, kWide>*>(step.grad)[vector];
  AlignedVector<float, kWide> moved = *to;
  const int64_t elements = step.elements(), first = vector * kWide;
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    if (step.mask != nullptr && !step.is_inside((first + j) / elements, (first + j) % elements)) continue;
    moved.at[j] = linf_stepped(moved.at[j], clean.at[j], grad.at[j], step.eps, step.alpha, step.low, step.high);
  }
  *to = moved;
}

}  // namespace

cudaError_t launch_linf_step(const Step& step, cudaStream_t stream) {
  const int64_t total = step.batch * step.elements();
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (step.mask == nullptr && total % 4 == 0 && aligned(step.x_adv) && aligned(step.x) && aligned(step.grad)) {
    return launch(linf_step_kernel<4>, (total / 4 + kThreads - 1) / kThreads, dim3(kThreads), 0, stream, step,
                  total / 4);
  }
  return launch(linf_step_kernel<1>, (total + kThreads - 1) / kThreads, dim3(kThreads), 0, stream, step, total);
}

}  // namespace eroseg::cuda
