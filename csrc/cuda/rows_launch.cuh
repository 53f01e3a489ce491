// Launches of the kernels over rows in shared memory (rows.cuh).
#pragma once

#include <algorithm>
#include <type_traits>

#include "counts.cuh"
#include "rows.cuh"

namespace eroseg::cuda {

// Threads of a block at most, and blocks that should fit on a multiprocessor: one fetches while others compute.
constexpr int kMostThreads = 256;
constexpr int kResidentWanted = 3;
// A thread's classes, at most: with fewer threads on a pixel's many classes too few would fit a multiprocessor, whose
// shared memory the logits fill.
constexpr int kMostPer = 24;
constexpr int64_t kMostClasses = 256;

// What a kernel needs.
struct RowsNeeds {
  int radius;          // of what a pixel needs around it
  int stages;          // of rows
  int bytes_of_pixel;  // of the kernel's own shared memory, for every pixel of a row
  int64_t bytes;       // and beside them
};

// Cuts images into strips, with their bytes of shared memory; strips->count is 0 if they do not fit. Memory is shared
// out so that kResidentWanted blocks fit on a multiprocessor, or else as a block may have it.
template <class Type>
cudaError_t cut_for_rows(const Input& input, const RowsNeeds& needs, Strips* strips, int64_t* shared) {
  *strips = {};
  const Shape& shape = input.shape;
  if (shape.classes() > kMostClasses) return cudaSuccess;
  constexpr int kPixels = Word<Type>::kElements;
  // Two groups may share a warp: half of one reads whole words of 128 bytes.
  const int wanted = static_cast<int>((shape.classes() + kMostPer - 1) / kMostPer);
  const int groups = wanted == 1 ? 1 : (wanted + 1) / 2 * 2;
  const int slots_of_step = groups == 1 ? kWarp : kWarp / 2;
  int64_t of_block = 0, of_processor = 0;
  const cudaError_t error = shared_memory_limits(&of_block, &of_processor);
  if (error != cudaSuccess) return error;
  // Each block has 1 KB that is not its own.
  const int64_t shares[] = {std::min(of_processor / kResidentWanted - 1024, of_block), of_block};
  for (const int64_t share : shares) {
    const int64_t each = needs.stages * shape.channels * static_cast<int64_t>(sizeof(typename Type::Element)) +
                         needs.bytes_of_pixel + exchanged_of_pixel(groups);
    // Slots beyond the strip's pixels exchange, too.
    const int64_t idle = slots_of_step * kPixels * exchanged_of_pixel(groups);
    const int64_t most_pixels = (share - needs.bytes - needs.stages * kBytesOfPiece - idle) / each;
    const Strips cut =
        cut_strips(shape.width, {needs.radius, kPixels, 2, slots_of_step, groups, kMostThreads, most_pixels});
    if (cut.count == 0 || (cut.count > 1 && cut.width < kNarrowestStrip)) continue;
    const StagingMemory memory = StagingMemory::of<Type>(input, cut, needs.stages);
    *strips = cut;
    *shared = memory.bytes() + exchanged_of_pixel(groups) * static_cast<int64_t>(cut.slots * kPixels) +
              needs.bytes_of_pixel * static_cast<int64_t>(memory.pitch) + needs.bytes;
    return cudaSuccess;
  }
  return cudaSuccess;
}

// Launches a kernel over rows, or, where these do not fit, what `general` launches.
template <class Type, class Job>
cudaError_t launch_rows(void (*kernel)(Job, Strips, Counting),
                        cudaError_t (*general)(const Job&, const Counting&, cudaStream_t), const Job& job,
                        const RowsNeeds& needs, const Counting& counting, cudaStream_t stream) {
  const Shape& shape = job.input.shape;
  Strips strips;
  int64_t of_rows = 0;
  cudaError_t error = cut_for_rows<Type>(job.input, needs, &strips, &of_rows);
  if (error != cudaSuccess) return error;
  if (strips.count == 0) return general(job, counting, stream);
  const int threads = strips.slots * strips.groups;
  const int64_t shared = std::max(of_rows, counts_bytes(threads));
  int resident = 1;
  error = resident_blocks(kernel, threads, shared, &resident);
  if (error != cudaSuccess) return error;
  cut_bands(strips, shape.batch, shape.height, needs.radius, resident);
  return launch(kernel, shape.batch * strips.count * strips.bands, dim3(strips.slots, strips.groups), shared, stream,
                job, strips, counting);
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
