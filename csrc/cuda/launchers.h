// The CUDA kernels' launchers: plain pointers on the device, a stream, and an error code. No torch header.
#pragma once

#include "../params.h"
#include "runtime.h"
#include "tiles.h"

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

// No launch over these images has more blocks than this.
inline int64_t most_blocks(const Shape& shape) {
  const int64_t tiles = (shape.width + kNarrowestTile - 1) / kNarrowestTile;
  return shape.batch * tiles * std::min(shape.height, kMostTilesDown);
}

// What the gradient of interpolated logits needs of a pixel: weight * exp(z_c - largest) / S, -weight at the label.
struct alignas(16) PixelTerms {
  float largest, scale, weight;  // the second is weight / S
  int label;
};

// A gradient's `workspace` has terms_of(input) PixelTerms.
inline int64_t terms_of(const Input& input) {
  return input.interpolates() ? input.shape.batch * input.shape.pixels() : 0;
}
cudaError_t launch_erosion_grad(const ErosionGrad& job, const Counting& counting, PixelTerms* workspace,
                                cudaStream_t stream);
cudaError_t launch_pixel_grad(const PixelGrad& job, const Counting& counting, PixelTerms* workspace,
                              cudaStream_t stream);
cudaError_t launch_confidence(const ConfidenceMap& job, cudaStream_t stream);

// The same for logits of another size than the labels.
cudaError_t launch_interpolated(const ErosionGrad& job, const Counting& counting, PixelTerms* workspace,
                                cudaStream_t stream);
cudaError_t launch_interpolated(const PixelGrad& job, const Counting& counting, PixelTerms* workspace,
                                cudaStream_t stream);
cudaError_t launch_interpolated(const ConfidenceMap& job, cudaStream_t stream);

cudaError_t launch_confusion(const Confusion& job, cudaStream_t stream);
cudaError_t launch_linf_step(const Step& step, cudaStream_t stream);

// `workspace` has kBytesOfSelection for each of selections_of(batch, count), next_tau's count being 1.
constexpr int64_t kBytesOfSelection = 16640;
inline int64_t selections_of(int64_t batch, int64_t count) { return batch * ((count + 1) / 2); }
cudaError_t launch_kth_value(const KthValue& job, void* workspace, cudaStream_t stream);
cudaError_t launch_next_tau(const NextTau& job, void* workspace, cudaStream_t stream);

}  // namespace eroseg::cuda
