// The fused CPU kernels, for one SIMD level.
//
// A level_*.cpp file sets the compiler's target, defines what vectors.h asks for and includes this. Everything here has
// internal linkage or lives in the level's namespace: the linker cannot pick a function that was compiled for another
// CPU.
//
// vectors.h comes first: the others are written in its types.
#include "vectors.h"
// Blocks of logits in memory,
#include "memory.h"
// read as rows of pixels,
#include "logits.h"
// which are reduced over the classes,
#include "rows.h"
// and their gradients and counts.
#include "counts.h"
#include "grad.h"
// The operations.
#include "confidence.h"
#include "confusion.h"
#include "erosion_grad.h"
#include "linf_step.h"
#include "pixel_grad.h"

namespace eroseg::cpu::EROSEG_LEVEL {

extern const Kernels kKernels;
const Kernels kKernels = {EROSEG_LEVEL_NAME, erosion_grad, pixel_grad, confidence, confusion, linf_step};

}  // namespace eroseg::cpu::EROSEG_LEVEL
