// What the SIMD levels share and must not be compiled for one of them: the choice among them, and memory.
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace eroseg::cpu {

namespace baseline {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

const Kernels& pick() {
  // Best first.
  std::vector<const Kernels*> levels;
#if defined(__x86_64__)
  // Feature by feature: not every compiler knows the names of the x86-64 levels.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) levels.push_back(&avx512::kKernels);
  if (v3) levels.push_back(&avx2::kKernels);
#endif
  levels.push_back(&baseline::kKernels);
  const char* wanted = std::getenv("EROSEG_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return *levels.front();
  std::string names;
  for (const Kernels* level : levels) {
    if (std::strcmp(wanted, level->level) == 0) return *level;
    names += (names.empty() ? "" : ", ") + std::string(level->level);
  }
  throw std::runtime_error("EROSEG_CPU_LEVEL is '" + std::string(wanted) + "', wanted one that this CPU has: " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& picked = pick();
  return picked;
}

Scratch::~Scratch() { std::free(memory_); }

float* Scratch::floats(int64_t count) {
  constexpr size_t kCacheLine = 64;
  if (count > count_) {
    std::free(memory_);
    count_ = 0;
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    memory_ = std::aligned_alloc(kCacheLine, (bytes + kCacheLine - 1) / kCacheLine * kCacheLine);
    if (memory_ == nullptr) throw std::bad_alloc();
    count_ = count;
  }
  return static_cast<float*>(memory_);
}

}  // namespace eroseg::cpu
