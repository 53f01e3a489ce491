// The kernels for x86-64-v3: AVX2, FMA.
// Headers come before the target is set: nothing of theirs may be compiled for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#define EROSEG_LEVEL avx2
#define EROSEG_LEVEL_NAME "avx2"
#define EROSEG_LANES 8
#define EROSEG_UNROLL 2
#include "kernels.h"
#include "kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
