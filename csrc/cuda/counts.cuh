// The counts of a gradient: summed over a thread's pixels, a block, and the blocks of an image, always in one order.
#pragma once

#include "launchers.h"
#include "platform.cuh"

namespace eroseg::cuda {

struct Counts {
  int valid = 0, right = 0, front = 0;
  double movement = 0;  // NaN if a valid pixel's logits are not finite
};

constexpr int kCounts = 4;

constexpr int64_t counts_bytes(int threads) {
  return (threads / kWarp * kCounts + 1) * static_cast<int64_t>(sizeof(double));
}

// Steps:
// 1. A block adds up its threads' counts and writes them to its place in partials.
// 2. It takes a number from the ticket; the block that takes the last one knows all partials to be written, and the
//    counter wraps to 0 for the next launch.
// 3. That block adds up the partials of every image: a warp for each of its four sums.
// All threads of the block call it. `memory` has counts_bytes.
__device__ inline void add_up(const Counts& counts, int64_t batch, const Counting& counting, unsigned char* memory) {
  auto* of_warp = reinterpret_cast<double*>(memory);
  const int self = thread_of_block(), warp = self / kWarp, lane = self % kWarp;
  const int warps = threads_of_block() / kWarp;
  const double own[kCounts] = {static_cast<double>(counts.valid), static_cast<double>(counts.right),
                               static_cast<double>(counts.front), counts.movement};
  __syncthreads();  // the memory was something else's before
  for (int i = 0; i < kCounts; ++i) {
    const double sum = warp_sum(own[i]);
    if (lane == 0) of_warp[warp * kCounts + i] = sum;
  }
  __syncthreads();
  if (self < kCounts) {
    double sum = 0;
    for (int i = 0; i < warps; ++i) sum += of_warp[i * kCounts + self];
    counting.partials[static_cast<int64_t>(blockIdx.x) * kCounts + self] = sum;
    __threadfence();
  }
  __syncthreads();
  auto* is_last = reinterpret_cast<int*>(of_warp + warps * kCounts);
  if (self == 0) *is_last = atomicInc(counting.ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (*is_last == 0) return;
  __threadfence();
  const int64_t blocks = gridDim.x / batch;
  for (int64_t i = warp; i < batch * kCounts; i += warps) {
    const double* partials = counting.partials + i / kCounts * blocks * kCounts + i % kCounts;
    double sum = 0;
    for (int64_t block = lane; block < blocks; block += kWarp) sum += __ldcg(partials + block * kCounts);
    sum = warp_sum(sum);
    if (lane == 0) counting.stats[i] = sum;
  }
}

template <class T>
__global__ void fill_kernel(T* out, int64_t n, T value) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = value;
}

// The counts of images without pixels, over which no other kernel runs.
inline cudaError_t count_nothing(const Shape& shape, const Counting& counting, cudaStream_t stream) {
  const int64_t n = shape.batch * kCounts;
  return launch(fill_kernel<double>, (n + 255) / 256, dim3(256), 0, stream, counting.stats, n, 0.0);
}

}  // namespace eroseg::cuda
