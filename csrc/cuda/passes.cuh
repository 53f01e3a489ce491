// Passes over the logits that erosion_grad is made of where it is not one (erosion_grad_passes.cu).
#pragma once

#include "launchers.h"

namespace eroseg::cuda {

// How sure the model is of each pixel.
struct ScorePass {
  Input input;
  Confidence confidence;
  float* out;  // [B, H, W], signed if it is a step's
  // Of a step, whose counts are wanted; tau is null otherwise.
  const float* tau;       // [B]
  const float* previous;  // [B, H, W] or null
  int32_t* predicted;     // [B, H, W] or null
  bool targeted;
};

cudaError_t launch_scores(const ScorePass& job, const Counting& counting, cudaStream_t stream);

// For what erosion_grad.cu does not take. `workspace` has bytes_of_passes.
cudaError_t launch_erosion_grad_passes(const ErosionGrad& job, const Counting& counting, void* workspace,
                                       cudaStream_t stream);

}  // namespace eroseg::cuda
