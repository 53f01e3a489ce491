// Selection by radix.
//
// 1. The bits of a non-negative float order like the float. Histogram their upper kFirstBits bits over all scores: they
//    cover the exponent and a few bits of the mantissa.
// 2. The bucket that holds the k-th smallest follows from the running sum of the counts.
// 3. Collect that bucket's scores, and go on with them and their next kNextBits bits, until no bits are left.
// This is linear whatever the distribution: the scores are read once for 1, once per k for the first 3, and where all
// of them fall in one bucket, twice more for each of the two digits that follow.
#include "select.h"

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "../pixel_math.h"

namespace eroseg::cpu {
namespace {

constexpr int kFirstBits = 13, kNextBits = 9;
constexpr int kFirstShift = 31 - kFirstBits;
static_assert(kFirstShift % kNextBits == 0);
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

// Adds bucket(i) of every i to a histogram. Equal neighbours are added at once: repeated increments of one counter
// would each wait for the one before.
template <size_t n, class F>
void count_into(std::array<int64_t, n>& histogram, int64_t size, const F& bucket) {
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) {
    const uint32_t a = bucket(i), b = bucket(i + 1), c = bucket(i + 2), d = bucket(i + 3);
    if (a == b && a == c && a == d) {
      histogram[a] += 4;
    } else {
      ++histogram[a], ++histogram[b], ++histogram[c], ++histogram[d];
    }
  }
  for (; i < size; ++i) ++histogram[bucket(i)];
}

// The bucket where the running count reaches the rank, which is lessened by the count before it.
template <size_t n>
uint32_t bucket_of(const std::array<int64_t, n>& histogram, int64_t& rank) {
  uint32_t bucket = 0;
  while (histogram[bucket] < rank) rank -= histogram[bucket++];
  return bucket;
}

// Copies those of n values that are wanted to the front of `out`, which has room for one more than there are; returns
// how many. It has no branch on `wanted`, which cannot be predicted.
template <class Value, class Wanted>
int64_t compact(int64_t n, const Value& value, const Wanted& wanted, uint32_t* out) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = value(i);
    out[kept] = bits;
    kept += wanted(bits);
  }
  return kept;
}

float kth(const Scores& scores, const std::array<int64_t, 1 << kFirstBits>& first, int64_t rank) {
  uint32_t bucket = bucket_of(first, rank);
  uint32_t found = bucket;
  std::vector<uint32_t> candidates(first[bucket] + 1);
  int64_t n = compact(
      scores.size(), [&](int64_t i) { return scores.bits(i); },
      [&](uint32_t bits) { return bits >> kFirstShift == bucket; }, candidates.data());
  for (int shift = kFirstShift - kNextBits; shift >= 0; shift -= kNextBits) {
    const auto digit = [shift](uint32_t bits) { return bits >> shift & ((1u << kNextBits) - 1); };
    std::array<int64_t, 1 << kNextBits> histogram{};
    count_into(histogram, n, [&](int64_t i) { return digit(candidates[i]); });
    bucket = bucket_of(histogram, rank);
    found = found << kNextBits | bucket;
    n = compact(
        n, [&](int64_t i) { return candidates[i]; }, [&](uint32_t bits) { return digit(bits) == bucket; },
        candidates.data());
  }
  return Bits<float>::from(static_cast<int32_t>(found));
}

}  // namespace

void kth_values(const float* values, const bool* valid, int64_t n, const int64_t* k, int64_t count, float* out) {
  if (n == 0) {
    std::fill(out, out + count, std::numeric_limits<float>::infinity());
    return;
  }
  const Scores scores(values, valid, n);
  std::array<int64_t, 1 << kFirstBits> histogram{};
  count_into(histogram, n, [&](int64_t i) { return scores.bits(i) >> kFirstShift; });
  for (int64_t j = 0; j < count; ++j) out[j] = kth(scores, histogram, std::clamp<int64_t>(k[j], 1, n));
}

float next_tau(const float* log_odds, int64_t n, const double* stats, const TauSettings& settings) {
  float bounds[2] = {};
  if (stats[0] > 0) {
    const int64_t k[2] = {rank_of(settings.front_min, stats[0], n), rank_of(settings.front_max, stats[0], n)};
    kth_values(log_odds, nullptr, n, k, k[0] == k[1] ? 1 : 2, bounds);
    if (k[0] == k[1]) bounds[1] = bounds[0];
  }
  return tau_between(bounds[0], bounds[1], stats, settings);
}

}  // namespace eroseg::cpu
