// confusion on the CPU. Part of kernels_impl.h.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

void confusion(const Confusion& job, int64_t image, int64_t row_begin, int64_t row_end, Scratch& scratch,
               int64_t* counts) {
  const Shape& shape = job.input.shape;
  Workspace workspace(job.input, image, 1, 0, scratch);
  const Row row = workspace.row(0);
  int32_t no_label[kBlock];  // the arg max is over all classes
  for (int32_t& label : no_label) label = -1;
  for (int64_t y = row_begin; y < row_end; ++y) {
    read_labels(job.input, image, y, workspace.stride(), row.label);
    const int64_t first = (image * shape.height + y) * shape.width;
    if (job.prediction == nullptr) workspace.logits().enter(y);
    for (int64_t x = 0; job.prediction == nullptr && x < shape.width; x += kBlock) {
      const Maxima maxima = workspace.logits().stage(x, no_label, row.e);
      for (int u = 0; u < kUnroll; ++u) store(row.predicted + x + u * kLanes, maxima.top[u]);
    }
    for (int64_t x = 0; x < shape.width; ++x) {
      const int64_t predicted = job.prediction == nullptr ? row.predicted[x] : job.prediction[first + x];
      if (row.label[x] >= 0 && is_class(predicted, job.classes)) ++counts[row.label[x] * job.classes + predicted];
    }
  }
}

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
