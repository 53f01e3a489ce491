// Runs CUDA kernels on the host, one block after another, a block's threads as coroutines.
//
// A thread runs until it meets a barrier or ends; the threads that may run are taken in a random order, another one
// after each barrier, so that a result which depends on the order shows. Shared memory is allocated for each block at
// its exact size and filled with NaN; writing beyond it is noticed. A barrier that only some of a block's threads reach
// is an error, as are lanes missing from a shuffle.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
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
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };

namespace cuda_on_host {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
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
  int resident = 6;  // what resident_blocks answers
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  std::function<void()> body;
  int current = 0;
  std::vector<unsigned char> shared;
  std::vector<double> exchange;  // a value per thread, for shuffles
  int64_t shared_of_processor = 0;
  std::vector<std::vector<Copy>> copies;  // that each thread has begun
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline dim3 block_index{0}, block_dimension{1}, grid_dimension{1};
constexpr int64_t kCanary = 64;
constexpr unsigned char kPoison = 0xff;  // floats of these bytes are NaN

inline void yield(State state) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  fiber.state = state;
  const int self = m.current;
  swapcontext(&fiber.context, &m.scheduler);
  m.current = self;
}

inline void run_fiber() {
  Machine& m = machine();
  m.body();
  m.fibers[m.current].state = State::kDone;
}

inline void resume(int thread) {
  Machine& m = machine();
  m.current = thread;
  swapcontext(&m.scheduler, &m.fibers[thread].context);
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
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &m.scheduler;
    makecontext(&fiber.context, run_fiber, 0);
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
  return dim3(thread % block_dimension.x, thread / block_dimension.x);
}

template <class T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= sizeof(double));
  Machine& m = machine();
  std::memcpy(&m.exchange[m.current], &value, sizeof(T));
  yield(State::kAtWarpBarrier);
  T result;
  std::memcpy(&result, &m.exchange[source], sizeof(T));
  yield(State::kAtWarpBarrier);
  return result;
}

}  // namespace cuda_on_host

#define threadIdx cuda_on_host::thread_index()
#define blockIdx cuda_on_host::block_index
#define blockDim cuda_on_host::block_dimension
#define gridDim cuda_on_host::grid_dimension

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

inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(__shfl_sync(~0u, value, lane)) << lane;
  return bits;
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

inline cudaError_t shared_memory_limits(int64_t* of_block, int64_t* of_processor) {
  *of_processor = cuda_on_host::machine().shared_of_processor;
  *of_block = *of_processor - 1024;
  return cudaSuccess;
}

inline unsigned char* shared_memory() { return cuda_on_host::machine().shared.data(); }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int64_t shared, cudaStream_t,
                   const Arguments&... arguments) {
  using namespace cuda_on_host;
  Machine& m = machine();
  block_dimension = threads;
  grid_dimension = dim3(static_cast<unsigned>(blocks));
  m.body = [&] { kernel(arguments...); };
  std::vector<int64_t> order(blocks);
  for (int64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.order);
  for (const int64_t block : order) {
    block_index = dim3(static_cast<unsigned>(block));
    if (shared > std::max<int64_t>(m.shared_of_processor - 1024, 48 * 1024)) return cudaErrorInvalidConfiguration;
    m.shared.assign(shared + kCanary, kPoison);
    run_block(static_cast<int>(threads.x * threads.y));
    for (int64_t i = shared; i < shared + kCanary; ++i) {
      if (m.shared[i] != kPoison) throw std::logic_error("a block wrote beyond its shared memory");
    }
  }
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t resident_blocks(void (*)(Parameters...), int, int64_t, int* count) {
  *count = cuda_on_host::machine().resident;
  return cudaSuccess;
}

}  // namespace eroseg::cuda
