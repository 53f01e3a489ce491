// pixel_grad on the CPU: row by row, since a pixel's gradient needs that pixel only. Part of kernels_impl.h.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

void pixel_grad(const PixelGrad& job, int64_t image, int64_t row_begin, int64_t row_end, Scratch& scratch,
                RowStats* rows) {
  const Shape& shape = job.input.shape;
  const Workspace workspace(shape, 1, 0, scratch);
  const Row row = workspace.row(0);
  const PixelReduction reduction =
      job.method.method == Method::kCosPgd ? PixelReduction::kSquares : PixelReduction::kNone;
  const float* class_weight = job.class_weight == nullptr ? nullptr : job.class_weight + image * shape.classes();
  for (int64_t y = row_begin; y < row_end; ++y) {
    reduce_row(job.input, image, y, reduction, workspace.stride(), row);
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
      write_block(job.input, image, y, x, row, weight, job.grad);
    }
    rows[image * shape.height + y] = counter.total();
  }
  finish_streams();
}

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
