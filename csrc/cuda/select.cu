// kth_value and next_tau: exact selection by radix, one block for each row of scores.
//
// The bits of a non-negative float order like the float; as a key of 31 bits it has digits of 11, 10 and 10 bits, the
// highest first. For each digit:
//   1. Histogram, in shared memory, of the digit over the keys that agree with the digits already found.
//   2. The k-th smallest is in the bin where the running count reaches k: that is its digit, and k is lessened by the
//      count before the bin.
// Two ranks at a time, each with its own prefix and histogram: the scores are read three times, whatever their values.
// Counts are integers, so the order in which threads add does not matter; ties need no rule, since equal keys are equal
// values.
#include "counts.cuh"

namespace eroseg::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kRanks = 2;
constexpr int kDigits = 3;
constexpr int kMostBins = 2048;
constexpr uint32_t kInfBits = 0x7f800000u;

struct Workspace {
  unsigned histogram[kRanks][kMostBins];
  unsigned of_warp[kThreads / kWarp];
  uint32_t prefix[kRanks];
  unsigned rank[kRanks];
};

struct alignas(16) FourFloats {
  float value[4];
};

// Calls f(key) for the keys of a row that are this thread's.
template <class F>
__device__ __forceinline__ void for_each_key(const float* scores, const bool* valid, int64_t n, const F& f) {
  const auto key_of = [&](float score) { return static_cast<uint32_t>(Bits<float>::of(score)) & 0x7fffffffu; };
  const int64_t self = threadIdx.x;
  if (valid == nullptr && reinterpret_cast<uintptr_t>(scores) % sizeof(FourFloats) == 0) {
    const auto* wide = reinterpret_cast<const FourFloats*>(scores);
#pragma unroll 4
    for (int64_t i = self; i < n / 4; i += kThreads) {
      const FourFloats four = wide[i];
      for (int j = 0; j < 4; ++j) f(key_of(four.value[j]));
    }
    for (int64_t i = n / 4 * 4 + self; i < n; i += kThreads) f(key_of(scores[i]));
  } else {
#pragma unroll 4
    for (int64_t i = self; i < n; i += kThreads) f(valid == nullptr || valid[i] ? key_of(scores[i]) : kInfBits);
  }
}

// Finds the bin where the running count of a histogram reaches the rank, appends it to the prefix and lessens the rank.
// Each thread has `each` neighbouring bins.
__device__ __forceinline__ void descend(Workspace& work, int r, const unsigned* histogram, int each, int bits) {
  const int self = static_cast<int>(threadIdx.x), warp = self / kWarp, lane = self % kWarp;
  const unsigned rank = work.rank[r];
  unsigned own = 0;
  for (int i = 0; i < each; ++i) own += histogram[self * each + i];
  unsigned through = own;  // of the warp's lanes up to this one
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const unsigned below = __shfl_up_sync(0xffffffffu, through, offset);
    if (lane >= offset) through += below;
  }
  if (lane == kWarp - 1) work.of_warp[warp] = through;
  __syncthreads();
  for (int i = 0; i < warp; ++i) through += work.of_warp[i];
  unsigned before = through - own;
  if (before < rank && rank <= through) {  // of exactly one thread
    int bin = self * each;
    while (before + histogram[bin] < rank) before += histogram[bin++];
    work.prefix[r] = work.prefix[r] << bits | static_cast<uint32_t>(bin);
    work.rank[r] = rank - before;
  }
  __syncthreads();
}

// The scores of the two ranks in work.rank, each from 1 to n, as bits in work.prefix. All threads call it.
__device__ void select(Workspace& work, const float* scores, const bool* valid, int64_t n) {
  constexpr int kBits[kDigits] = {11, 10, 10};
  if (threadIdx.x < kRanks) work.prefix[threadIdx.x] = 0;
  int below = 31;  // bits of a key that are lower than the digits found
#pragma unroll
  for (int digit = 0; digit < kDigits; ++digit) {
    const int bits = kBits[digit], bins = 1 << bits;
    for (int i = static_cast<int>(threadIdx.x); i < bins; i += kThreads) {
      for (int r = 0; r < kRanks; ++r) work.histogram[r][i] = 0;
    }
    __syncthreads();
    const uint32_t first = work.prefix[0], second = work.prefix[1];
    const int shift = below - bits;
    for_each_key(scores, valid, n, [&](uint32_t key) {
      const uint32_t prefix = digit == 0 ? 0 : key >> below;
      const uint32_t bin = key >> shift & (bins - 1u);
      if (prefix == first) atomicAdd(&work.histogram[0][bin], 1u);
      if (second != first && prefix == second) atomicAdd(&work.histogram[1][bin], 1u);
    });
    __syncthreads();
    descend(work, 0, work.histogram[0], bins / kThreads, bits);
    descend(work, 1, work.histogram[second == first ? 0 : 1], bins / kThreads, bits);
    below = shift;
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    kth_value_kernel(const float* scores, const bool* valid, int64_t n, const int64_t* k, int64_t count, float* out) {
  auto& work = *reinterpret_cast<Workspace*>(shared_memory());
  const int64_t pairs = (count + kRanks - 1) / kRanks;
  const int64_t row = blockIdx.x / pairs, first = blockIdx.x % pairs * kRanks;
  if (threadIdx.x < kRanks) {
    const int64_t j = first + threadIdx.x < count ? first + threadIdx.x : count - 1;
    const int64_t rank = k[row * count + j];
    work.rank[threadIdx.x] = static_cast<unsigned>(rank < 1 ? 1 : (rank < n ? rank : n));
  }
  __syncthreads();
  select(work, scores + row * n, valid == nullptr ? nullptr : valid + row * n, n);
  if (threadIdx.x < kRanks && first + threadIdx.x < count) {
    out[row * count + first + threadIdx.x] = Bits<float>::from(static_cast<int32_t>(work.prefix[threadIdx.x]));
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    next_tau_kernel(const float* log_odds, const double* stats, int64_t n, TauSettings settings, float* tau) {
  auto& work = *reinterpret_cast<Workspace*>(shared_memory());
  const int64_t row = blockIdx.x;
  stats += row * 4;
  const bool any = stats[0] > 0;
  if (any) {
    if (threadIdx.x < kRanks) {
      const double rho = threadIdx.x == 0 ? settings.front_min : settings.front_max;
      work.rank[threadIdx.x] = static_cast<unsigned>(rank_of(rho, stats[0]));
    }
    __syncthreads();
    select(work, log_odds + row * n, nullptr, n);
  }
  if (threadIdx.x == 0) {
    const float low = any ? Bits<float>::from(static_cast<int32_t>(work.prefix[0])) : 0.0f;
    const float high = any ? Bits<float>::from(static_cast<int32_t>(work.prefix[1])) : 0.0f;
    tau[row] = tau_between(low, high, stats, settings);
  }
}

}  // namespace

cudaError_t launch_kth_value(const float* scores, const bool* valid, int64_t batch, int64_t n, const int64_t* k,
                             int64_t count, float* out, cudaStream_t stream) {
  if (n == 0) {
    const int64_t results = batch * count;
    return launch(fill_kernel<float>, (results + 255) / 256, dim3(256), 0, stream, out, results, kInf);
  }
  const int64_t blocks = batch * ((count + kRanks - 1) / kRanks);
  return launch(kth_value_kernel, blocks, dim3(kThreads), sizeof(Workspace), stream, scores, valid, n, k, count, out);
}

cudaError_t launch_next_tau(const float* log_odds, const double* stats, int64_t batch, int64_t n,
                            const TauSettings& settings, float* tau, cudaStream_t stream) {
  return launch(next_tau_kernel, batch, dim3(kThreads), sizeof(Workspace), stream, log_odds, stats, n, settings, tau);
}

}  // namespace eroseg::cuda
