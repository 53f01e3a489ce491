// The kernels for x86-64-v4: AVX-512 F, BW, CD, DQ, VL.
// Headers come before the target is set: nothing of theirs may be compiled for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif
#define EROSEG_LEVEL avx512
#define EROSEG_LEVEL_NAME "avx512"
#define EROSEG_LANES 16
#define EROSEG_UNROLL 4
#include "kernels.h"
#include "kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
