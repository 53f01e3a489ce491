// What the kernels use of CUDA; the rest of them is plain C++.
//
// tests/cuda_kernels_module.cpp compiles the same kernel files for the host, where cuda_on_host.h runs a block's
// threads as coroutines: without a GPU, the tests run the kernels themselves and not a model of them.
#pragma once

#include <cstdint>
#include <limits>

#include "../pixel_math.h"
#include "runtime.h"

#if !defined(EROSEG_CUDA_ON_HOST)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace eroseg::cuda {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// 2^x, to 2 units in the last place; 0 below 2^-126.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(EROSEG_CUDA_ON_HOST)
  return x < -126.0f ? 0.0f : std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log2(x) for x >= 0, -inf of 0: off by 2^-21 at most.
__device__ __forceinline__ float log2_approx(float x) {
#if defined(EROSEG_CUDA_ON_HOST)
  return std::log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float not_a_number() { return Bits<float>::from(0x7fc00000); }

// 1 / x to 1 unit in the last place, for x from 2^-126 to 2^126.
__device__ __forceinline__ float reciprocal(float x) {
#if defined(EROSEG_CUDA_ON_HOST)
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

#if !defined(EROSEG_CUDA_ON_HOST)
// Begins to copy 4 or 16 bytes, so aligned, from global to shared memory.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
  }
}

// Waits for all copies that this thread has begun.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Begins to load the memory at an address, at least 32 bytes, into the L2.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// The block's shared memory; kernels lay it out themselves.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

#endif

// What the current device has.
struct DeviceLimits {
  int64_t processors = 0, shared_of_block = 0, shared_of_processor = 0;  // multiprocessors, bytes of shared memory
};

inline cudaError_t device_limits(DeviceLimits* limits) {
  int device = 0, processors = 0, block = 0, processor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&processors, cudaDevAttrMultiProcessorCount);
  ask(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  *limits = {processors, block, processor};
  return error;
}

// Launches a kernel. Its limit of shared memory is a property of the kernel, which other host threads launch as well:
// it is always set to all that the device allows, so that no thread lowers it below what another is about to use.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int64_t shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024) {
    DeviceLimits limits;
    cudaError_t error = device_limits(&limits);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(limits.shared_of_block));
    }
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

__device__ __forceinline__ int thread_of_block() { return static_cast<int>(threadIdx.x + threadIdx.y * blockDim.x); }

__device__ __forceinline__ int threads_of_block() { return static_cast<int>(blockDim.x * blockDim.y); }

// The sum over a warp, the same in all its lanes and in the same order every time.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

}  // namespace eroseg::cuda
