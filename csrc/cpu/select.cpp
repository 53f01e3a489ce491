// Selection by one histogram and one small partial sort.
//
// 1. The bits of a non-negative float order like the float. Histogram their upper kBits bits over all scores: kBits
//    covers the exponent and a few bits of the mantissa.
// 2. The bucket that holds the k-th smallest follows from the running sum of the counts.
// 3. Collect that bucket's scores and let std::nth_element find the one of rank k - (scores in lower buckets).
// Whatever the distribution, this reads the scores once for 1 and once per k for 3; where all fall in one bucket, 3 is
// std::nth_element over all of them, still linear.
#include "select.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "../pixel_math.h"

namespace eroseg::cpu {
namespace {

constexpr int kBits = 13;
constexpr int kShift = 31 - kBits;
constexpr uint32_t kInfBits = 0x7f800000;

class Scores {
 public:
  Scores(const float* scores, const bool* valid, int64_t n) : scores_(scores), valid_(valid), n_(n) {}
  int64_t size() const { return n_; }
  uint32_t bits(int64_t i) const {
    if (valid_ != nullptr && !valid_[i]) return kInfBits;
    return static_cast<uint32_t>(Bits<float>::of(scores_[i])) & 0x7fffffff;
  }

 private:
  const float* scores_;
  const bool* valid_;
  int64_t n_;
};

float kth(const Scores& scores, const std::array<int64_t, 1 << kBits>& histogram, int64_t k) {
  int64_t below = 0;
  uint32_t bucket = 0;
  while (below + histogram[bucket] < k) below += histogram[bucket++];
  std::vector<uint32_t> candidates;
  candidates.reserve(histogram[bucket]);
  for (int64_t i = 0; i < scores.size(); ++i) {
    const uint32_t bits = scores.bits(i);
    if (bits >> kShift == bucket) candidates.push_back(bits);
  }
  const auto wanted = candidates.begin() + (k - below - 1);
  std::nth_element(candidates.begin(), wanted, candidates.end());
  return Bits<float>::from(static_cast<int32_t>(*wanted));
}

}  // namespace

void kth_values(const float* values, const bool* valid, int64_t n, const int64_t* k, int64_t count, float* out) {
  if (n == 0) {
    std::fill(out, out + count, std::numeric_limits<float>::infinity());
    return;
  }
  const Scores scores(values, valid, n);
  std::array<int64_t, 1 << kBits> histogram{};
  for (int64_t i = 0; i < n; ++i) ++histogram[scores.bits(i) >> kShift];
  for (int64_t j = 0; j < count; ++j) out[j] = kth(scores, histogram, std::clamp<int64_t>(k[j], 1, n));
}

float next_tau(const float* log_odds, int64_t n, const double* stats, const TauSettings& settings) {
  float bounds[2] = {};
  if (stats[0] > 0) {
    const int64_t k[2] = {rank_of(settings.front_min, stats[0]), rank_of(settings.front_max, stats[0])};
    kth_values(log_odds, nullptr, n, k, k[0] == k[1] ? 1 : 2, bounds);
    if (k[0] == k[1]) bounds[1] = bounds[0];
  }
  return tau_between(bounds[0], bounds[1], stats, settings);
}

}  // namespace eroseg::cpu
