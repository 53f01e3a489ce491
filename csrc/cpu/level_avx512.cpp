// The kernels for x86-64-v4: AVX-512 F, BW, CD, DQ, VL.
// Headers come before the target is set: nothing of theirs may be compiled for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define EROSEG_LEVEL avx512
#define EROSEG_LEVEL_NAME "avx512"
#define EROSEG_LANES 16
#define EROSEG_UNROLL 4
#include "kernels.h"
#include "kernels_impl.h"
#endif
