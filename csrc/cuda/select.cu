// kth_value and next_tau: exact selection by radix.
//
// The bits of a non-negative float order like the float; as a key of 31 bits it has digits of 11, 10 and 10 bits, the
// highest first. For each digit there is a launch, in which several blocks share a row of scores:
//   1. Histogram, in shared memory, of the digit over the block's keys that agree with the digits already found.
//   2. It is added to the row's histogram in memory. That one is complete for the block that is the last to raise the
//      row's retirement counter; the others end.
//   3. The k-th smallest is in the bin where the running count reaches k: that is its digit, and k is lessened by the
//      count before the bin. The row's histogram is set to 0 for the next digit.
// Two ranks at a time, each with its own prefix and histogram: the scores are read three times, whatever their values.
// Counts are integers, so the order in which threads add does not matter; ties need no rule, since equal keys are equal
// values.
#include "counts.cuh"
#include "types.cuh"

namespace eroseg::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kRanks = 2;
constexpr int kDigits = 3;
constexpr int kBitsOf[kDigits] = {11, 10, 10};
constexpr int kMostBins = 2048;
constexpr uint32_t kInfBits = 0x7f800000u;
constexpr int64_t kScoresOfBlock = 16384, kMostBlocks = 64;

// What is known of two ranks of one row, in memory that begins as zeros.
struct Selection {
  unsigned histogram[kRanks][kMostBins];
  uint32_t prefix[kRanks];
  unsigned rank[kRanks];
  unsigned retired;
};
static_assert(sizeof(Selection) <= kBytesOfSelection);

struct Workspace {
  unsigned histogram[kRanks][kMostBins];
  unsigned of_warp[kThreads / kWarp];
  uint32_t prefix[kRanks];
  unsigned rank[kRanks];
  int is_last;
};

// Calls f(key) for those of the n scores that are this thread's.
template <class F>
__device__ __forceinline__ void for_each_key(const float* scores, const bool* valid, int64_t n, const F& f) {
  const auto key_of = [&](float score) { return static_cast<uint32_t>(Bits<float>::of(score)) & 0x7fffffffu; };
  using FourFloats = AlignedVector<float, 4>;
  const int64_t self = threadIdx.x;
  if (valid == nullptr && reinterpret_cast<uintptr_t>(scores) % sizeof(FourFloats) == 0) {
    const auto* wide = reinterpret_cast<const FourFloats*>(scores);
#pragma unroll 4
    for (int64_t i = self; i < n / 4; i += kThreads) {
      const FourFloats four = wide[i];
      for (int j = 0; j < 4; ++j) f(key_of(four.at[j]));
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
    const unsigned below = __shfl_up_sync(kAllLanes, through, offset);
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

// Ranks from the caller.
struct GivenRanks : KthValue {
  __device__ int64_t pairs() const { return (count + kRanks - 1) / kRanks; }
  __device__ int64_t row(int64_t selection) const { return selection / pairs(); }
  __device__ unsigned rank(int64_t selection, int r) const {
    const int64_t j = selection % pairs() * kRanks + r;
    const int64_t rank = k[row(selection) * count + (j < count ? j : count - 1)];
    return static_cast<unsigned>(rank < 1 ? 1 : (rank < n ? rank : n));
  }
  __device__ void finish(int64_t selection, const float (&value)[kRanks]) const {
    for (int r = 0; r < kRanks; ++r) {
      const int64_t j = selection % pairs() * kRanks + r;
      if (j < count) out[row(selection) * count + j] = value[r];
    }
  }
};

// Ranks by the fractions of an image's valid pixels.
struct RanksOfFractions : NextTau {
  __device__ int64_t row(int64_t selection) const { return selection; }
  __device__ unsigned rank(int64_t selection, int r) const {
    const double rho = r == 0 ? settings.front_min : settings.front_max;
    return static_cast<unsigned>(rank_of(rho, stats[selection * 4], n));
  }
  __device__ void finish(int64_t selection, const float (&value)[kRanks]) const {
    tau[selection] = tau_between(value[0], value[1], stats + selection * 4, settings);
  }
};

template <int kDigit, class Goal>
__global__ void __launch_bounds__(kThreads)
    select_kernel(const __grid_constant__ Goal goal, Selection* selections, int blocks_of_row) {
  constexpr int kBits = kBitsOf[kDigit], kBins = 1 << kBits;
  constexpr int kBelow = kDigit == 0 ? 31 : (kDigit == 1 ? 20 : 10);  // bits of a key lower than the digits found
  constexpr int kShift = kBelow - kBits;
  auto& work = *reinterpret_cast<Workspace*>(shared_memory());
  const int self = static_cast<int>(threadIdx.x);
  const int64_t index = blockIdx.x / blocks_of_row, part = blockIdx.x % blocks_of_row;
  Selection& selection = selections[index];
  const uint32_t first = kDigit == 0 ? 0 : selection.prefix[0], second = kDigit == 0 ? 0 : selection.prefix[1];

  for (int i = self; i < kBins; i += kThreads) {
    for (int r = 0; r < kRanks; ++r) work.histogram[r][i] = 0;
  }
  __syncthreads();
  const int64_t each = (goal.n / blocks_of_row + 4) / 4 * 4;
  const int64_t begin = part * each < goal.n ? part * each : goal.n;
  const int64_t end = begin + each < goal.n ? begin + each : goal.n;
  const int64_t offset = goal.row(index) * goal.n + begin;
  for_each_key(goal.scores + offset, goal.valid == nullptr ? nullptr : goal.valid + offset, end - begin,
               [&](uint32_t key) {
                 const uint32_t prefix = kDigit == 0 ? 0 : key >> kBelow;
                 const uint32_t bin = key >> kShift & (kBins - 1u);
                 if (prefix == first) atomicAdd(&work.histogram[0][bin], 1u);
                 if (second != first && prefix == second) atomicAdd(&work.histogram[1][bin], 1u);
               });
  __syncthreads();
  for (int r = 0; r < kRanks; ++r) {
    for (int i = self; i < kBins; i += kThreads) {
      if (work.histogram[r][i] != 0) atomicAdd(&selection.histogram[r][i], work.histogram[r][i]);
    }
  }
  __threadfence();
  __syncthreads();
  if (self == 0) {
    const auto last = static_cast<unsigned>(blocks_of_row - 1);
    work.is_last = atomicInc(&selection.retired, last) == last;
  }
  __syncthreads();
  if (work.is_last == 0) return;

  __threadfence();
  for (int r = 0; r < kRanks; ++r) {
    for (int i = self; i < kBins; i += kThreads) {
      work.histogram[r][i] = __ldcg(&selection.histogram[r][i]);
      selection.histogram[r][i] = 0;
    }
  }
  if (self < kRanks) {
    work.prefix[self] = self == 0 ? first : second;
    work.rank[self] = kDigit == 0 ? goal.rank(index, self) : selection.rank[self];
  }
  __syncthreads();
  descend(work, 0, work.histogram[0], kBins / kThreads, kBits);
  descend(work, 1, work.histogram[second == first ? 0 : 1], kBins / kThreads, kBits);
  if (kDigit + 1 < kDigits) {
    if (self < kRanks) selection.prefix[self] = work.prefix[self], selection.rank[self] = work.rank[self];
  } else if (self == 0) {
    float value[kRanks];
    for (int r = 0; r < kRanks; ++r) value[r] = Bits<float>::from(static_cast<int32_t>(work.prefix[r]));
    goal.finish(index, value);
  }
}

template <class Goal>
cudaError_t launch_select(const Goal& goal, int64_t count, void* workspace, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  cudaError_t error = cudaMemsetAsync(workspace, 0, static_cast<size_t>(count * kBytesOfSelection), stream);
  if (error != cudaSuccess) return error;
  auto* selections = static_cast<Selection*>(workspace);
  const int64_t wanted = (goal.n + kScoresOfBlock - 1) / kScoresOfBlock;
  const int blocks = static_cast<int>(wanted < 1 ? 1 : (wanted < kMostBlocks ? wanted : kMostBlocks));
  const auto digit = [&](auto kernel) {
    if (error == cudaSuccess) {
      error = launch(kernel, count * blocks, dim3(kThreads), sizeof(Workspace), stream, goal, selections, blocks);
    }
  };
  digit(select_kernel<0, Goal>);
  digit(select_kernel<1, Goal>);
  digit(select_kernel<2, Goal>);
  return error;
}

}  // namespace

cudaError_t launch_kth_value(const KthValue& job, void* workspace, cudaStream_t stream) {
  if (job.n == 0) {
    const int64_t results = job.batch * job.count;
    return launch(fill_kernel<float>, (results + 255) / 256, dim3(256), 0, stream, job.out, results, kInf);
  }
  return launch_select(GivenRanks{job}, selections_of(job.batch, job.count), workspace, stream);
}

cudaError_t launch_next_tau(const NextTau& job, void* workspace, cudaStream_t stream) {
  return launch_select(RanksOfFractions{job}, selections_of(job.batch, 1), workspace, stream);
}

}  // namespace eroseg::cuda
