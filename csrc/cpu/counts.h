// What a weight and the counts look at, and the counts of a row. Part of kernels_impl.h.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

// kLanes pixels of a reduced row from i on.
struct Pixels {
  EROSEG_INLINE Pixels(const Row& row, int64_t i)
      : label(load<I>(row.label + i)),
        confidence(load<F>(row.signed_confidence + i)),
        valid(label >= 0),
        finite(confidence == confidence),
        correct(valid & finite & (load<I>(row.predicted + i) == label)) {}
  I label;
  F confidence;  // signed
  I valid, finite, correct;
};

// The counts of a row in vectors of lanes, added up in a fixed order at its end.
class RowCounter {
 public:
  EROSEG_INLINE void add(const Pixels& at, I front, F moved) {
    valid_ -= at.valid;  // a mask's lanes are 0 or -1
    correct_ -= at.correct;
    front_ -= front;
    // A pixel whose logits are not finite has a confidence of NaN.
    movement_ += __builtin_convertvector((at.valid & ~at.finite) ? at.confidence : moved, D);
  }
  RowStats total() const {
    RowStats stats;
    for (int i = 0; i < kLanes; ++i) {
      stats.valid += valid_[i];
      stats.correct += correct_[i];
      stats.front += front_[i];
      stats.movement += movement_[i];
    }
    return stats;
  }

 private:
  I valid_{}, correct_{}, front_{};
  D movement_{};
};

// The weight of a loss, times the class's; 0 on pixels that are void or not finite, negated if targeted.
EROSEG_INLINE F final_weight(F weight, const Pixels& at, const float* class_weight, bool targeted) {
  if (class_weight != nullptr) weight *= gather(class_weight, at.label, at.valid);
  return (at.valid & at.finite) ? (targeted ? -weight : weight) : F{};
}

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
