// Exact selection of order statistics: the thresholds of the front.
#pragma once

#include <cstdint>

#include "../tau.h"

namespace eroseg::cpu {

// The k-th smallest of |scores[i]| (k from 1, clamped to [1, n]) over the valid i, others counting as +inf, for each of
// the `count` values in k. NaN sorts last. n = 0 gives +inf.
void kth_values(const float* scores, const bool* valid, int64_t n, const int64_t* k, int64_t count, float* out);

// eroseg_ext/ops/reference.py, next_tau, for one image; stats are its four.
float next_tau(const float* log_odds, int64_t n, const double* stats, const TauSettings& settings);

}  // namespace eroseg::cpu
