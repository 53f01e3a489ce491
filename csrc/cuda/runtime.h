// The CUDA runtime's interface, or its stand-in on the host (platform.cuh).
#pragma once

#if defined(EROSEG_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif
