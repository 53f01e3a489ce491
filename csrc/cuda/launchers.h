// The CUDA kernels' launchers: plain pointers on the device, a stream, and an error code. No torch header.
#pragma once

#include <algorithm>

#include "../jobs.h"
#include "../tau.h"
#include "runtime.h"

namespace eroseg::cuda {

// The counts of a gradient, and memory that summing them needs.
struct Counting {
  double* stats;      // [B, 4]
  double* partials;   // [most_blocks(shape), 4]
  unsigned* retired;  // retirement counter: 0 before and after every launch; launches that may overlap need one each
};

// The current device's retirement counters, zeros from the start.
constexpr int kRetirementCounters = 1024;
cudaError_t retirement_counters(unsigned** first);

// No launch over these images has more blocks than this: no strip but the last is narrower, and no band is empty.
constexpr int kNarrowestStrip = 16;
inline int64_t most_blocks(const Shape& shape) {
  const int64_t strips = (shape.width + kNarrowestStrip - 1) / kNarrowestStrip;
  return shape.batch * strips * std::min<int64_t>(shape.height, 256);
}

// Images of more classes are not worked on in shared memory.
constexpr int64_t kMostClasses = 256;
// Whether erosion_grad is one pass over the logits, and the bytes of `workspace` that it needs otherwise.
inline bool is_one_pass(const ErosionGrad& job) { return job.radius <= 1 && job.input.shape.classes() <= kMostClasses; }
inline int64_t bytes_of_passes(const ErosionGrad& job) {
  const int64_t maps = job.within == Within::kClass ? 2 : 1;
  return is_one_pass(job) ? 0 : maps * job.input.shape.batch * job.input.shape.pixels() * 4;
}
cudaError_t launch_erosion_grad(const ErosionGrad& job, const Counting& counting, void* workspace, cudaStream_t stream);
cudaError_t launch_pixel_grad(const PixelGrad& job, const Counting& counting, cudaStream_t stream);
cudaError_t launch_confidence(const ConfidenceMap& job, cudaStream_t stream);
// counts[classes * classes] += the confusion matrix.
cudaError_t launch_confusion(const Confusion& job, unsigned long long* counts, cudaStream_t stream);

// [batch, n] scores, k[batch, count], and for out; valid may be null. `workspace` has kBytesOfSelection for each of
// selections_of(batch, count), next_tau's count being 1.
constexpr int64_t kBytesOfSelection = 16640;
inline int64_t selections_of(int64_t batch, int64_t count) { return batch * ((count + 1) / 2); }
cudaError_t launch_kth_value(const float* scores, const bool* valid, int64_t batch, int64_t n, const int64_t* k,
                             int64_t count, float* out, void* workspace, cudaStream_t stream);
cudaError_t launch_next_tau(const float* log_odds, const double* stats, int64_t batch, int64_t n,
                            const TauSettings& settings, float* tau, void* workspace, cudaStream_t stream);

// Maps [batch, height, width]; valid and predicted may be null. The cone rises slope * rise[image] for each pixel.
cudaError_t launch_erode(const Erode& job, int64_t batch, const float* scores, bool of_absolute, const bool* valid,
                         const int32_t* predicted, const float* rise, float slope, float* out, cudaStream_t stream);

cudaError_t launch_linf_step(const Step& step, int64_t batch, cudaStream_t stream);
// eps and alpha once more, in double precision; `sums` is [batch, 2, kSumsOfImage].
constexpr int64_t kSumsOfImage = 128;
cudaError_t launch_l2_step(const Step& step, int64_t batch, double eps, double alpha, double* sums,
                           cudaStream_t stream);

}  // namespace eroseg::cuda
