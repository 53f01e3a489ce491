// The counts of a gradient: summed over a thread's pixels, a block, and the blocks of an image, always in one order.
#pragma once

#include "launchers.h"
#include "platform.cuh"

namespace eroseg::cuda {

struct Counts {
  int valid = 0, correct = 0, front = 0;
  double movement = 0;  // NaN if a valid pixel's logits are not finite
};

constexpr int kCounts = 4;

constexpr int64_t counts_bytes(int threads) {
  return (threads / kWarp * kCounts + 1) * static_cast<int64_t>(sizeof(double));
}

// Steps:
// 1. A block adds up its threads' counts and writes them to its own part of partials.
// 2. It raises the retirement counter. All partials are written when the last block does so, and the counter wraps to 0
//    for the next launch.
// 3. That block adds up the partials of every image: each image gets an equal number of lanes, at most a warp, so
//    that all images' partials are loaded at once.
// All threads of the block call it. `memory` has counts_bytes.
__device__ inline void add_up(const Counts& counts, int64_t batch, const Counting& counting, unsigned char* memory) {
  auto* of_warp = reinterpret_cast<double*>(memory);
  const int self = thread_of_block(), warp = self / kWarp, lane = self % kWarp;
  const int warps = threads_of_block() / kWarp;
  __syncthreads();  // the memory had another use before
  const double sums[kCounts] = {static_cast<double>(__reduce_add_sync(kAllLanes, counts.valid)),
                                static_cast<double>(__reduce_add_sync(kAllLanes, counts.correct)),
                                static_cast<double>(__reduce_add_sync(kAllLanes, counts.front)),
                                warp_sum(counts.movement)};
  if (lane == 0) {
    for (int i = 0; i < kCounts; ++i) of_warp[warp * kCounts + i] = sums[i];
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
  if (self == 0) *is_last = atomicInc(counting.retired, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (*is_last == 0) return;
  __threadfence();
  const int64_t blocks = gridDim.x / batch;
  int lanes = kWarp;
  while (lanes > 1 && threads_of_block() / lanes < batch) lanes /= 2;
  const int part = self % lanes, images = threads_of_block() / lanes;
  for (int64_t first = 0; first < batch; first += images) {
    const int64_t image = first + self / lanes;
    double sum[kCounts] = {};
    if (image < batch) {
      const auto* partials = reinterpret_cast<const double2*>(counting.partials + image * blocks * kCounts);
#pragma unroll 4
      for (int64_t block = part; block < blocks; block += lanes) {
        const double2 low = __ldcg(partials + 2 * block), high = __ldcg(partials + 2 * block + 1);
        sum[0] += low.x, sum[1] += low.y, sum[2] += high.x, sum[3] += high.y;
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      for (int i = 0; i < kCounts; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], offset);
    }
    if (image < batch && part == 0) {
      for (int i = 0; i < kCounts; ++i) counting.stats[image * kCounts + i] = sum[i];
    }
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
