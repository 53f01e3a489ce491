// The erosion as a pipeline over rows. Part of kernels_impl.h.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

// The rows of one level that the next one needs, in a ring; every row has a margin on both sides, filled once.
class Ring {
 public:
  Ring() = default;
  Ring(float* memory, int64_t stride, int64_t rows, float margin)
      : memory_(memory), pitch_(stride + 2 * kMargin), rows_(rows) {
    for (int64_t i = 0; i < rows * pitch_; ++i) memory[i] = margin;
  }
  static int64_t floats(int64_t stride, int64_t rows) { return rows * (stride + 2 * kMargin); }
  float* row(int64_t y) const { return memory_ + (y % rows_ + rows_) % rows_ * pitch_ + kMargin; }

 private:
  static constexpr int64_t kMargin = 16;
  float* memory_ = nullptr;
  int64_t pitch_ = 0, rows_ = 1;
};

// One row of a 3x3 erosion whose outer values are `rise`; the rows have margins.
void erode_row(const float* const (&rows)[3], float rise, int64_t stride, float* out) {
  for (int64_t x = 0; x < stride; x += kLanes) {
    F lowest = splat<F>(kInf);
    for (const float* row : rows) {
      for (int64_t dx = -1; dx <= 1; ++dx) lowest = minimum(lowest, load<F>(row + x + dx));
    }
    store(out + x, minimum(load<F>(rows[1] + x), lowest + rise));
  }
}

// The same, crossing only between pixels of one predicted class; the class rows have margins too.
void erode_row_within(const float* const (&rows)[3], const int32_t* const (&classes)[3], float rise, int64_t stride,
                      float* out) {
  for (int64_t x = 0; x < stride; x += kLanes) {
    const I own = load<I>(classes[1] + x);
    F lowest = splat<F>(kInf);
    for (int i = 0; i < 3; ++i) {
      for (int64_t dx = -1; dx <= 1; ++dx) {
        const F value = load<F>(rows[i] + x + dx);
        lowest = minimum(lowest, load<I>(classes[i] + x + dx) == own ? value : splat<F>(kInf));
      }
    }
    store(out + x, minimum(load<F>(rows[1] + x), lowest + rise));
  }
}

// The erosion as a pipeline over rows: rows go in from the top, and row y - radius comes out when row y has gone in.
// Pixels outside the image go in as +inf and stay that, so that no geodesic path leads around a border; their class is
// nobody's concern.
class ErosionPipeline {
 public:
  ErosionPipeline(int radius, bool geodesic, float rise, int64_t height, int64_t width, int64_t stride, float* memory)
      : radius_(radius), geodesic_(geodesic), rise_(rise), height_(height), width_(width), stride_(stride) {
    for (int level = 0; level <= radius; ++level) {
      levels_[level] = Ring(memory, stride, 3, kInf);
      memory += Ring::floats(stride, 3);
    }
    if (geodesic) classes_ = Ring(memory, stride, kClassRows, 0.0f);
  }
  static int64_t floats(int radius, bool geodesic, int64_t stride) {
    return (radius + 1) * Ring::floats(stride, 3) + (geodesic ? Ring::floats(stride, kClassRows) : 0);
  }
  // Where row y's scores have to be put before push(y), and its classes if the erosion is geodesic.
  float* scores(int64_t y) const { return levels_[0].row(y); }
  int32_t* predicted(int64_t y) const { return reinterpret_cast<int32_t*>(classes_.row(y)); }

  // Returns the eroded row y - radius; it is meaningful once radius rows on either side of it have gone in.
  const float* push(int64_t y) {
    for (int level = 1; level <= radius_; ++level) {
      const Ring& from = levels_[level - 1];
      const int64_t row = y - level;
      const float* const rows[3] = {from.row(row - 1), from.row(row), from.row(row + 1)};
      float* out = levels_[level].row(row);
      const bool inside = row >= 0 && row < height_;
      if (inside && geodesic_) {
        const int32_t* const classes[3] = {predicted(row - 1), predicted(row), predicted(row + 1)};
        erode_row_within(rows, classes, rise_, stride_, out);
      } else if (inside) {
        erode_row(rows, rise_, stride_, out);
      }
      for (int64_t x = inside ? width_ : 0; x < stride_; ++x) out[x] = kInf;
    }
    return levels_[radius_].row(y - radius_);
  }

 private:
  static constexpr int64_t kClassRows = kMaxRadius + 2;
  int radius_;
  bool geodesic_;
  float rise_;
  int64_t height_, width_, stride_;
  Ring levels_[kMaxRadius + 1];
  Ring classes_;
};

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
