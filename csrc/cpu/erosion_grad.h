// erosion_grad on the CPU. Part of kernels_impl.h.
//
// The kernel goes down the rows of pixels of a tile, some rows of one image's logits. For each row y, from `radius`
// rows above the tile to `radius` rows below it:
//   1. It reduces row y: reads its logits once, in blocks of kBlock pixels, and keeps exp(z_c - m) and the terms of its
//      pixels in scratch memory (reduce_row). The confidences of the last three rows are kept beside them.
//   2. It erodes the confidences of row y - radius, whose neighbours are known now.
//   3. It writes the gradient of row y - radius from scratch memory (GradRows).
// So the logits are read once, but for the rows around a tile, and the gradient is written once; radius + 1 rows of
// exponentials stay in the cache between 1 and 3.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

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

// `before` is the row's log-odds of the step before, or its present ones; q is the eroded confidence.
RowStats write_erosion_row(const ErosionGrad& job, int64_t image, const Row& row, const float* q, const float* before,
                           GradRows& grad) {
  const float tau = job.tau[image];
  const float* class_weight =
      job.class_weight == nullptr ? nullptr : job.class_weight + image * job.input.shape.classes();
  RowCounter counter;
  for (int64_t x = 0; x < job.input.shape.width; x += kBlock) {
    F weight[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = x + u * kLanes;
      const Pixels at(row, i);
      F w = front_weight(job.front, load<F>(q + i), tau);
      if (job.direction == Direction::kCrossEntropy) w *= sigmoid(-load<F>(row.log_odds + i));
      weight[u] = final_weight(w, at, class_weight, job.targeted);
      const F was = load<F>(before + i);
      const I in_front = at.valid & (absolute(at.confidence) <= tau);
      counter.add(at, in_front, in_front ? (job.targeted ? at.confidence - was : was - at.confidence) : F{});
    }
    grad.write(x, row, weight);
  }
  return counter.total();
}

void erosion_grad(const ErosionGrad& job, int64_t image, int64_t begin, int64_t end, Scratch& scratch,
                  RowStats* stats) {
  const Input& input = job.input;
  const Shape& shape = input.shape;
  const int64_t width = shape.width, radius = job.radius, slots = radius + 1;
  constexpr int64_t kMargin = 16;
  const int64_t stride = rounded_up(width, kBlock), pitch = stride + 2 * kMargin;
  Workspace workspace(input, image, slots, 2 * stride + 3 * pitch + GradRows::floats(input), scratch);
  float* const eroded = workspace.beside();
  float* const before = eroded + stride;
  float* const ring = before + stride;
  GradRows grad(input, job.grad, image, begin, end, workspace.logits().columns(), ring + 3 * pitch);
  for (int64_t i = 0; i < 3 * pitch; ++i) ring[i] = kInf;
  const auto scores = [&](int64_t y) { return ring + (y + 3) % 3 * pitch + kMargin; };

  const PixelRows tile(input, begin, end);
  for (int64_t y = tile.first - radius; y < tile.end + radius; ++y) {
    float* const score = scores(y);
    if (y >= 0 && y < shape.height) {
      const Row row = workspace.row(y % slots);
      reduce_row(input, image, y, reduction_of(job.confidence), workspace, row);
      for (int64_t x = 0; x < stride; x += kLanes) {
        // Void pixels, and those beyond the image, have +inf; pixels that are not finite lend nothing either.
        const F confidence = absolute(load<F>(row.signed_confidence + x));
        store(score + x, confidence <= kInf ? confidence : splat<F>(kInf));
      }
    } else {
      for (int64_t x = 0; x < stride; ++x) score[x] = kInf;
    }
    const int64_t done = y - radius;
    if (done < tile.first) continue;
    const float* q = score;
    if (radius > 0) {
      erode_row({scores(done - 1), scores(done), scores(done + 1)}, job.slope * job.tau[image], stride, eroded);
      q = eroded;
    }
    const Row row = workspace.row(done % slots);
    const int64_t first = (image * shape.height + done) * width;
    const float* was = row.signed_confidence;
    if (job.previous != nullptr) {
      std::memcpy(before, job.previous + first, width * sizeof(float));
      for (int64_t x = width; x < stride; ++x) before[x] = kInf;
      was = before;
    }
    grad.enter(done);
    const RowStats found = write_erosion_row(job, image, row, q, was, grad);
    if (done < tile.own) continue;
    stats[image * shape.height + done] = found;
    std::memcpy(job.log_odds + first, row.signed_confidence, width * sizeof(float));
  }
  grad.finish();
}

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
