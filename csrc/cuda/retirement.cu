// The retirement counters of launches that add up counts (counts.cuh). They lie in the module's own memory: what torch
// allocates may belong to a CUDA graph's pool, and be given to others once the graph is done with it.
#include "launchers.h"
#include "platform.cuh"

namespace eroseg::cuda {
namespace {

__device__ unsigned counters[kRetirementCounters];

}  // namespace

cudaError_t retirement_counters(unsigned** first) {
  void* address = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&address, counters);
  *first = static_cast<unsigned*>(address);
  return error;
}

}  // namespace eroseg::cuda
