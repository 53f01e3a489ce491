// Runs CUDA kernels on the host, one block after another, a block's threads as coroutines.
//
// A thread runs until it meets a barrier or ends; the threads that may run are taken in a random order, another one
// after each barrier, so that a result which depends on the order shows. Shared memory is allocated for each block at
// its exact size and filled with NaN; writing beyond it is noticed. A barrier that only some of a block's threads reach
// is an error, as are lanes missing from a shuffle.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using std::max;
using std::min;

inline dim3 blockIdx{0}, blockDim{1}, gridDim{1};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_on_host {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

// A context starts a thread on its own stack; from then on it is left and resumed by jumps, which make no system call.
struct Fiber {
  ucontext_t start;
  jmp_buf where;
  bool has_started;
  std::vector<char> stack;
  State state;
};

// An asynchronous copy: it is carried out when its thread waits for it, and until then the place it goes to is
// poisoned.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};

struct Machine {
  std::mt19937 order{0};
  int64_t processors = 1;
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  std::function<void()> body;
  int current = 0;
  std::vector<unsigned char> shared;
  std::vector<double> exchange;  // a value per thread, for shuffles
  int64_t shared_of_processor = 0;
  std::map<const void*, int64_t> shared_of_kernel;  // more than 48 KB, where it was asked for
  std::vector<std::vector<Copy>> copies;            // that each thread has begun
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

constexpr int64_t kCanary = 64;
constexpr unsigned char kPoison = 0xff;  // floats of these bytes are NaN

inline void yield(State state) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  fiber.state = state;
  if (_setjmp(fiber.where) == 0) _longjmp(m.scheduler, 1);
}

inline void run_fiber() {
  Machine& m = machine();
  m.body();
  m.fibers[m.current].state = State::kDone;
  _longjmp(m.scheduler, 1);
}

inline void resume(int thread) {
  Machine& m = machine();
  m.current = thread;
  if (_setjmp(m.scheduler) != 0) return;
  Fiber& fiber = m.fibers[thread];
  if (fiber.has_started) _longjmp(fiber.where, 1);
  fiber.has_started = true;
  setcontext(&fiber.start);
}

// Lets those continue whose barrier is complete; false if there is none, though not all have ended.
inline bool release(int threads) {
  Machine& m = machine();
  bool any = false;
  for (int warp = 0; warp < threads; warp += 32) {
    const int end = std::min(warp + 32, threads);
    const auto waits = [&](int i) { return m.fibers[i].state == State::kAtWarpBarrier; };
    bool all = true;
    for (int i = warp; i < end; ++i) all = all && waits(i);
    for (int i = warp; all && i < end; ++i) m.fibers[i].state = State::kReady, any = true;
  }
  if (any) return true;
  for (int i = 0; i < threads; ++i) {
    if (m.fibers[i].state != State::kAtBlockBarrier) return false;
  }
  for (int i = 0; i < threads; ++i) m.fibers[i].state = State::kReady;
  return true;
}

inline void run_block(int threads) {
  Machine& m = machine();
  m.fibers.resize(std::max<size_t>(m.fibers.size(), threads));
  m.exchange.assign(threads, 0.0);
  m.copies.assign(threads, {});
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.stack.resize(1 << 16);
    fiber.state = State::kReady;
    fiber.has_started = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.start, run_fiber, 0);
  }
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  while (true) {
    std::shuffle(order.begin(), order.end(), m.order);
    for (const int thread : order) {
      if (m.fibers[thread].state == State::kReady) resume(thread);
    }
    bool done = true;
    for (int i = 0; i < threads; ++i) done = done && m.fibers[i].state == State::kDone;
    if (done) return;
    if (!release(threads)) throw std::logic_error("a barrier was not reached by all threads of its block or warp");
  }
}

inline dim3 thread_index() {
  const int thread = machine().current;
  return dim3(thread % blockDim.x, thread / blockDim.x);
}

// Calls f(read) when all threads of the warp have given a value; read(i) is that of the block's thread i.
template <class T, class F>
auto exchange(T value, const F& f) {
  static_assert(sizeof(T) <= sizeof(double));
  Machine& m = machine();
  std::memcpy(&m.exchange[m.current], &value, sizeof(T));
  yield(State::kAtWarpBarrier);
  const auto result = f([&](int thread) {
    T other;
    std::memcpy(&other, &m.exchange[thread], sizeof(T));
    return other;
  });
  yield(State::kAtWarpBarrier);
  return result;
}

template <class T>
T shuffle(T value, int source) {
  return exchange(value, [&](const auto& read) { return read(source); });
}

// The sum of a warp's values, each shifted to the left by its lane times `shift`.
inline unsigned warp_sum(unsigned value, int shift) {
  const int first = machine().current / 32 * 32;
  return exchange(value, [&](const auto& read) {
    unsigned sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += read(first + lane) << lane * shift;
    return sum;
  });
}

}  // namespace cuda_on_host

#define threadIdx cuda_on_host::thread_index()

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

inline void __syncthreads() { cuda_on_host::yield(cuda_on_host::State::kAtBlockBarrier); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_host::shuffle(value, cuda_on_host::machine().current ^ mask);
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return cuda_on_host::shuffle(value, cuda_on_host::machine().current / 32 * 32 + source);
}

inline unsigned __ballot_sync(unsigned, bool value) { return cuda_on_host::warp_sum(value, 1); }

inline int __reduce_add_sync(unsigned, int value) {
  return static_cast<int>(cuda_on_host::warp_sum(static_cast<unsigned>(value), 0));
}

template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int current = cuda_on_host::machine().current;
  return cuda_on_host::shuffle(value, current % 32 >= delta ? current - delta : current);
}

inline unsigned atomicAdd(unsigned* address, unsigned value) { return std::exchange(*address, *address + value); }
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return std::exchange(*address, *address + value);
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return std::exchange(*address, *address >= limit ? 0 : *address + 1);
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) throw std::logic_error("a store is not aligned");
  *address = value;
}

namespace eroseg::cuda {

template <int kBytes>
void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 16);
  using namespace cuda_on_host;
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0 || reinterpret_cast<uintptr_t>(global) % kBytes != 0) {
    throw std::logic_error("an asynchronous copy is not aligned");
  }
  auto* to = static_cast<unsigned char*>(shared);
  std::memset(to, kPoison, kBytes);
  machine().copies[machine().current].push_back({to, static_cast<const unsigned char*>(global), kBytes});
}

inline void prefetch(const void*) {}

inline void wait_for_copies() {
  auto& copies = cuda_on_host::machine().copies[cuda_on_host::machine().current];
  for (const auto& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
  copies.clear();
}

inline unsigned char* shared_memory() { return cuda_on_host::machine().shared.data(); }

}  // namespace eroseg::cuda

template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  return *address = &symbol, cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_on_host::Machine& m = cuda_on_host::machine();
  const int64_t of_block = m.shared_of_processor - 1024;
  *value = static_cast<int>(attribute == cudaDevAttrMultiProcessorCount            ? m.processors
                            : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? of_block
                                                                                   : m.shared_of_processor);
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  cuda_on_host::machine().shared_of_kernel[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  using namespace cuda_on_host;
  Machine& m = machine();
  const dim3 threads = blockDim = config->blockDim;
  gridDim = config->gridDim;
  const int64_t blocks = gridDim.x, shared = static_cast<int64_t>(config->dynamicSmemBytes);
  const auto allowed = m.shared_of_kernel.find(reinterpret_cast<const void*>(kernel));
  if (shared > (allowed == m.shared_of_kernel.end() ? 48 * 1024 : allowed->second)) {
    return cudaErrorInvalidConfiguration;
  }
  m.body = [&] { kernel(arguments...); };
  std::vector<int64_t> order(blocks);
  for (int64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.order);
  for (const int64_t block : order) {
    blockIdx = dim3(static_cast<unsigned>(block));
    m.shared.assign(shared + kCanary, kPoison);
    run_block(static_cast<int>(threads.x * threads.y));
    for (int64_t i = shared; i < shared + kCanary; ++i) {
      if (m.shared[i] != kPoison) throw std::logic_error("a block wrote beyond its shared memory");
    }
  }
  return cudaSuccess;
}
