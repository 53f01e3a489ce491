// pixel_grad on the CPU: row by row, since a pixel's gradient needs that pixel only. Part of kernels_impl.h.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

void pixel_grad(const PixelGrad& job, int64_t image, int64_t begin, int64_t end, Scratch& scratch, RowStats* stats) {
  const Input& input = job.input;
  const Shape& shape = input.shape;
  Workspace workspace(input, image, 1, GradRows::floats(input), scratch);
  GradRows grad(input, job.grad, image, begin, end, workspace.logits().columns(), workspace.beside());
  const Row row = workspace.row(0);
  const PixelReduction reduction =
      job.method.method == Method::kCosPgd ? PixelReduction::kSquares : PixelReduction::kNone;
  const float* class_weight = job.class_weight == nullptr ? nullptr : job.class_weight + image * shape.classes();
  const PixelRows tile(input, begin, end);
  for (int64_t y = tile.first; y < tile.end; ++y) {
    reduce_row(input, image, y, reduction, workspace, row);
    grad.enter(y);
    RowCounter counter;
    for (int64_t x = 0; x < shape.width; x += kBlock) {
      F weight[kUnroll];
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = x + u * kLanes;
        const Pixels at(row, i);
        const I weighty = job.method.targeted ? ~at.correct : at.correct;
        const F w = method_weight(job.method, load<F>(row.log_odds + i), weighty, load<F>(row.norm + i));
        weight[u] = final_weight(w, at, class_weight, job.method.targeted);
        counter.add(at, at.valid, F{});
      }
      grad.write(x, row, weight);
    }
    if (y >= tile.own) stats[image * shape.height + y] = counter.total();
  }
  grad.finish();
}

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
