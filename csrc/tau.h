// The width of the next step's front: eroseg_ext/ops/reference.py, next_tau, for one image.
#pragma once

#include <cmath>

#include "pixel_math.h"

namespace eroseg {

struct TauSettings {
  int64_t steps_left;
  double reach, front_min, front_max;
};

// k(rho) = clamp(round(rho * valid), 1, valid), half rounded to even; never above the number n of pixels, whatever
// `valid` is.
EROSEG_INLINE int64_t rank_of(double rho, double valid, int64_t n) {
  const double rounded = nearbyint(rho * valid), most = valid < static_cast<double>(n) ? valid : static_cast<double>(n);
  const double bounded = rounded < most ? rounded : most;
  return static_cast<int64_t>(bounded > 1.0 ? bounded : 1.0);
}

// `low` and `high` are the k-th values of front_min and front_max; stats are the image's four.
EROSEG_INLINE float tau_between(float low, float high, const double* stats, const TauSettings& settings) {
  const double valid = stats[0], front = stats[2], movement = stats[3];
  if (movement != movement) return Bits<float>::from(0x7fc00000);
  if (valid == 0) return kTauFloor;
  const double velocity = movement / (front > 1.0 ? front : 1.0);
  const double reached =
      settings.reach * (velocity > 0.0 ? velocity : 0.0) * sqrt(static_cast<double>(settings.steps_left));
  const float floor = low > kTauFloor ? low : kTauFloor;
  const float ceiling = high > kTauFloor ? high : kTauFloor;
  const auto tau = static_cast<float>(reached);
  const float raised = tau > floor ? tau : floor;
  return raised < ceiling ? raised : ceiling;
}

}  // namespace eroseg
