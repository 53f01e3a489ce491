// Launches of the kernels over rows in shared memory (rows.cuh).
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <type_traits>

#include "counts.cuh"
#include "rows.cuh"

namespace eroseg::cuda {

// A block's threads at most. Launch bounds hold the kernels to registers for two such blocks on a multiprocessor.
constexpr int kMostThreads = 256;

// What a kernel needs.
struct RowsNeeds {
  int radius;          // of what a pixel needs around it
  int stages;          // of rows
  int bytes_of_pixel;  // of the kernel's own shared memory, for every pixel of a row
  int64_t bytes;       // and beside them
  int most_threads = kMostThreads;
};
constexpr RowsNeeds kSingleRows{0, kStagesOfSingleRows, 0, 0};

// Cycles in which some warps of a multiprocessor, whose threads have so many classes each, reduce a row and make its
// gradient: a lone warp stalls for most of that time, many warps compete for four schedulers. Counted in the
// disassembly of erosion_grad for 9.0 (bench/NOTES.md); not measured.
inline double cycles_of_row(int64_t warps, int slice_classes) {
  const double alone = 1700 + 170.0 * slice_classes, instructions = 500 + 65.0 * slice_classes;
  return std::max(alone, static_cast<double>(warps) * instructions / 4);
}

// The bytes of shared memory that a block of the plan has.
inline int64_t shared_bytes(const RowsPlan& plan, const RowsNeeds& needs) {
  const int64_t own = needs.bytes_of_pixel * static_cast<int64_t>(plan.tiles.width) + needs.bytes;
  return std::max(plan.memory.bytes() + own, counts_bytes(plan.tiles.threads()));
}

// The fastest plan by that count, or none (tiles.across = 0) where not even the narrowest tile fits into shared memory;
// 99 KB are enough for 256 classes. Wide tiles overlap little, narrow ones leave room for more warps. More threads for
// a pixel's classes keep more of them busy where there are few pixels, and repeat more of the work done once a thread.
struct TimedPlan {
  RowsPlan plan;
  int64_t shared = 0;
  double time = 0;
};

template <class Type>
TimedPlan fastest_plan(const Input& input, const RowsNeeds& needs, const DeviceLimits& device) {
  constexpr int kPixels = Vector<Type>::kElements;
  const Shape& shape = input.shape;
  TimedPlan best;
  for (int groups = 1; groups <= 8 && (groups == 1 || groups <= shape.channels); groups *= 2) {
    RowsPlan plan;
    const int classes = static_cast<int>(shape.classes());
    plan.slice_classes = groups == 1 ? classes : ((classes + groups - 1) / groups | 1);
    for_each_cut(shape.width, needs.radius, kPixels, groups, needs.most_threads, [&](const Tiles& tiles) {
      plan.tiles = tiles;
      plan.memory = StagingMemory::of<Type>(input, tiles, plan.slice_classes, needs.stages);
      const int64_t threads = tiles.threads();
      const int64_t shared = shared_bytes(plan, needs);
      if (shared > device.shared_of_block) return;
      // CUDA reserves 1 KB of shared memory for each block.
      const int64_t resident = std::min(device.shared_of_processor / (shared + 1024), 2 * needs.most_threads / threads);
      const double time =
          cut_rows(plan.tiles, shape.batch, shape.height, needs.radius, device.processors, resident,
                   [&](int64_t blocks) { return cycles_of_row(blocks * threads / kWarp, plan.slice_classes); });
      if (best.plan.tiles.across == 0 || time < best.time) best = {plan, shared, time};
    });
  }
  return best;
}

// The same, kept for every kind of launch: the search takes longer than many a kernel.
template <class Type>
TimedPlan known_plan(const Input& input, const RowsNeeds& needs, const DeviceLimits& device) {
  using Key = std::array<int64_t, 13>;
  static std::mutex mutex;
  static std::map<Key, TimedPlan> plans;
  constexpr size_t kMostPlans = 1000;
  const Shape& shape = input.shape;
  const Key key{shape.batch,
                shape.channels,
                shape.height,
                shape.width,
                needs.radius,
                needs.stages,
                needs.bytes_of_pixel,
                needs.bytes,
                needs.most_threads,
                device.processors,
                device.shared_of_block,
                device.shared_of_processor,
                input.logits.channels_last};
  const std::lock_guard<std::mutex> lock(mutex);
  if (plans.size() >= kMostPlans) plans.clear();
  const auto [found, is_new] = plans.try_emplace(key);
  if (is_new) found->second = fastest_plan<Type>(input, needs, device);
  return found->second;
}

// Launches a kernel over rows of at most kMostClasses. `more` are further arguments of the kernel.
template <class Type, class Job, class... More>
cudaError_t launch_rows(void (*kernel)(Job, RowsPlan, More...), const Job& job, const RowsNeeds& needs,
                        cudaStream_t stream, const More&... more) {
  DeviceLimits device;
  const cudaError_t error = device_limits(&device);
  if (error != cudaSuccess) return error;
  const TimedPlan known = known_plan<Type>(job.input, needs, device);
  if (known.plan.tiles.across == 0) return cudaErrorInvalidConfiguration;
  const Tiles& tiles = known.plan.tiles;
  return launch(kernel, job.input.shape.batch * tiles.blocks_of_image(), dim3(tiles.groups, tiles.slots), known.shared,
                stream, job, known.plan, more...);
}

// Calls f(Type{}, kPieces), the latter as an integral constant (staging.cuh). `grad` may be null.
template <class F>
cudaError_t for_rows(const Input& input, const void* grad, const F& f) {
  return for_type(input.logits.type, [&](auto type) {
    const int64_t row = input.shape.width * static_cast<int64_t>(sizeof(typename decltype(type)::Element));
    const uintptr_t tensors = reinterpret_cast<uintptr_t>(input.logits.data) | reinterpret_cast<uintptr_t>(grad);
    const bool is_aligned = (tensors | static_cast<uintptr_t>(row)) % kBytesOfPiece == 0;
    return is_aligned && !input.logits.channels_last ? f(type, std::true_type{}) : f(type, std::false_type{});
  });
}

}  // namespace eroseg::cuda
