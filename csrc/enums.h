// The choices of the operations, as the integers that cross the operator schemas. eroseg_ext/ops/fused.py holds the
// same orders as tuples of names; tests/test_ops.py compares every value of them with the reference.
#pragma once

#include <cstdint>

namespace eroseg {

enum class Confidence : int64_t { kLabel, kTop, kLogOdds };
enum class Front : int64_t { kSoft, kHard };
enum class Direction : int64_t { kLogOdds, kCrossEntropy };
enum class Method : int64_t { kPgd, kSegPgd, kCosPgd, kMaskedCe, kJs, kTsallis };

// The reference computes larger radii, and more classes.
constexpr int kMaxRadius = 1;
constexpr int64_t kMaxClasses = 256;
// No threshold is below this confidence: the front's weight divides by it.
constexpr float kTauFloor = 1e-6f;

}  // namespace eroseg
