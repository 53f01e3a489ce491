// The fused CPU kernels: plain pointers in, plain pointers out, no torch header. kernels_impl.h implements them once;
// the files level_*.cpp compile it for the SIMD levels, and dispatch.cpp picks the level of the CPU it runs on.
#pragma once

#include <cstdint>

#include "../params.h"

namespace eroseg::cpu {

// Counts of one row of pixels; summed in row order, so that no result depends on the number of threads.
struct RowStats {
  int64_t valid = 0, correct = 0, front = 0;
  double movement = 0;  // NaN if a valid pixel's logits are not finite
};

// Working memory of one thread, kept from one tile to the next. It is not a std::vector: std templates instantiated in
// a file for AVX-512 contain AVX-512, and the linker may keep that copy for all files.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // At least so many floats, aligned to a cache line; their content is undefined.
  float* floats(int64_t count);

 private:
  void* memory_ = nullptr;
  int64_t count_ = 0;
};

// Row ranges are half open.
struct Kernels {
  const char* level;
  // The gradient of rows [begin, end) of the logits. stats[B * H] receives the counts of the rows of pixels that begin
  // between them.
  void (*erosion_grad)(const ErosionGrad&, int64_t image, int64_t begin, int64_t end, Scratch& scratch,
                       RowStats* stats);
  void (*pixel_grad)(const PixelGrad&, int64_t image, int64_t begin, int64_t end, Scratch& scratch, RowStats* stats);
  // These two go over rows of pixels.
  void (*confidence)(const ConfidenceMap&, int64_t image, int64_t row_begin, int64_t row_end, Scratch& scratch);
  // counts[classes * classes] += the matrix of these rows.
  void (*confusion)(const Confusion&, int64_t image, int64_t row_begin, int64_t row_end, Scratch& scratch,
                    int64_t* counts);
  // Elements [begin, end) of one image, in memory order.
  void (*linf_step)(const Step&, int64_t image, int64_t begin, int64_t end);
};

// The kernels of the best level that this CPU has, or of the one that the environment variable EROSEG_CPU_LEVEL names;
// std::runtime_error, with a sentence for the user, if it names none.
const Kernels& kernels();

}  // namespace eroseg::cpu
