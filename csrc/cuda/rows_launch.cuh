// Launches of the kernels over rows in shared memory (rows.cuh).
#pragma once

#include <algorithm>
#include <type_traits>

#include "counts.cuh"
#include "rows.cuh"

namespace eroseg::cuda {

// A block's threads at most. Launch bounds hold the kernels to registers for two such blocks on a multiprocessor.
constexpr int kMostThreads = 256;
// The warps that a multiprocessor should have: fewer cannot hide each other's waits.
constexpr int kWarpsWanted = 12;
// A thread's classes, more or less: with fewer threads on a pixel's many classes too few would fit a multiprocessor,
// whose shared memory the logits fill.
constexpr int kClassesOfThread = 24;

// Threads that share a word of pixels: 1, 2, 4 or 8, so that they are lanes of one warp.
inline int groups_for(int64_t classes) {
  const int64_t wanted = (classes + kClassesOfThread - 1) / kClassesOfThread;
  int groups = 1;
  while (groups < 8 && 3 * groups <= 2 * wanted) groups *= 2;  // the power of two that is nearest
  return groups;
}

// What a kernel needs.
struct RowsNeeds {
  int radius;          // of what a pixel needs around it
  int stages;          // of rows
  int bytes_of_pixel;  // of the kernel's own shared memory, for every pixel of a row
  int64_t bytes;       // and beside them
  int most_threads = kMostThreads;
};
constexpr RowsNeeds kSingleRows{0, kStagesOfSingleRows, 0, 0};

// Cuts images into strips; the count is 0 if they do not fit into shared memory, of which 99 KB are enough. Wide strips
// overlap little and narrow ones leave room for more warps: what counts is how much work those have that a
// multiprocessor holds at a time.
template <class Type>
cudaError_t cut_for_rows(const Input& input, const RowsNeeds& needs, Strips* strips, int64_t* shared) {
  *strips = {};
  const Shape& shape = input.shape;
  int64_t of_block = 0, of_processor = 0;
  const cudaError_t error = shared_memory_limits(&of_block, &of_processor);
  if (error != cudaSuccess) return error;
  const auto bytes_of = [&](const Strips& cut) {
    const StagingMemory memory = StagingMemory::of<Type>(input, cut, needs.stages);
    return memory.bytes() + needs.bytes_of_pixel * static_cast<int64_t>(memory.pitch) + needs.bytes;
  };
  const auto cost = [&](const Strips& cut) {
    const int64_t bytes = bytes_of(cut), threads = cut.slots * cut.groups;
    if (bytes > of_block) return -1.0;
    // Each block has 1 KB that is not its own.
    const int64_t blocks = std::min(of_processor / (bytes + 1024), 2 * needs.most_threads / threads);
    // A block alone waits as a whole.
    const int64_t warps = blocks * threads / kWarp / (blocks == 1 ? 2 : 1);
    return static_cast<double>(cut.count * cut.slots) / static_cast<double>(std::min<int64_t>(warps, kWarpsWanted));
  };
  const int groups = groups_for(shape.classes());
  *strips =
      cut_strips(shape.width, {needs.radius, Word<Type>::kElements, 2, kWarp / groups, groups, needs.most_threads},
                 kNarrowestStrip, cost);
  if (strips->count > 0) *shared = bytes_of(*strips);
  return cudaSuccess;
}

// Launches a kernel over rows of at most kMostClasses. `more` are further arguments of the kernel.
template <class Type, class Job, class... More>
cudaError_t launch_rows(void (*kernel)(Job, Strips, More...), const Job& job, const RowsNeeds& needs,
                        cudaStream_t stream, const More&... more) {
  const Shape& shape = job.input.shape;
  Strips strips;
  int64_t of_rows = 0;
  cudaError_t error = cut_for_rows<Type>(job.input, needs, &strips, &of_rows);
  if (error != cudaSuccess) return error;
  if (strips.count == 0) return cudaErrorInvalidConfiguration;
  const int threads = strips.slots * strips.groups;
  const int64_t shared = std::max(of_rows, counts_bytes(threads));
  int resident = 1;
  error = resident_blocks(kernel, threads, shared, &resident);
  if (error != cudaSuccess) return error;
  cut_bands(strips, shape.batch, shape.height, needs.radius, resident);
  return launch(kernel, shape.batch * strips.count * strips.bands, dim3(strips.groups, strips.slots), shared, stream,
                job, strips, more...);
}

// Calls f(Type{}, layout), the latter as an integral constant.
template <class F>
cudaError_t for_rows(const Input& input, const F& f) {
  return for_type(input.logits.type, [&](auto type) {
    if (input.logits.channels_last) return f(type, std::integral_constant<Layout, Layout::kChannelsLast>{});
    return f(type, std::integral_constant<Layout, Layout::kPlanes>{});
  });
}

}  // namespace eroseg::cuda
