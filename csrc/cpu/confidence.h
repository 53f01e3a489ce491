// confidence on the CPU. Part of kernels_impl.h.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

void confidence(const ConfidenceMap& job, int64_t image, int64_t row_begin, int64_t row_end, Scratch& scratch) {
  const Shape& shape = job.input.shape;
  Workspace workspace(job.input, image, 1, 0, scratch);
  const Row row = workspace.row(0);
  for (int64_t y = row_begin; y < row_end; ++y) {
    reduce_row(job.input, image, y, reduction_of(job.confidence), workspace, row);
    for (int64_t x = 0; x < workspace.stride(); x += kLanes) {
      store(row.signed_confidence + x, absolute(load<F>(row.signed_confidence + x)));
    }
    std::memcpy(job.out + (image * shape.height + y) * shape.width, row.signed_confidence, shape.width * sizeof(float));
  }
}

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
