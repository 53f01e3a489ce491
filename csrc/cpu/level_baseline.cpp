// The kernels for any CPU that the compiler targets by default.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#define EROSEG_LEVEL baseline
#define EROSEG_LEVEL_NAME "baseline"
#define EROSEG_LANES 4
#define EROSEG_UNROLL 2
#include "kernels.h"
#include "kernels_impl.h"
