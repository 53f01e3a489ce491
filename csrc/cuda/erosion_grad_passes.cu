// erosion_grad in three launches, for what erosion_grad.cu does not take: a radius above 1, whose rows would have to
// wait for too many others in shared memory, and more than 256 classes.
//   1. The signed confidences and counts, and the predicted classes if the erosion is geodesic (scores.cu).
//   2. The erosion of the confidences (maps.cu).
//   3. The gradient, here: every pixel is reduced once more, and weighed by its eroded confidence.
// So the logits are read twice. Steps 1 and 3 go down bands of rows (rows.cuh); more than 256 classes take a thread for
// each pixel.
#include "general.cuh"
#include "passes.cuh"
#include "rows_launch.cuh"

namespace eroseg::cuda {
namespace {

struct FrontGrad : ErosionGrad {
  const float* eroded;  // [B, H, W]
};

// The weight of a pixel; 0 if it is void or its logits are not finite.
__device__ __forceinline__ float weight_of(const FrontGrad& job, int64_t image, int64_t index, int label,
                                           float log_odds) {
  if (label < 0 || log_odds != log_odds) return 0.0f;
  float weight = front_weight(job.front, job.eroded[index], job.tau[image]);
  if (job.direction == Direction::kCrossEntropy) weight *= sigmoid(-log_odds);
  if (job.class_weight != nullptr) weight *= job.class_weight[image * job.input.shape.classes() + label];
  return weight;
}

template <class Type, Layout kLayout>
__global__ void __launch_bounds__(kMostThreads, 2)
    front_grad_kernel(const __grid_constant__ FrontGrad job, const __grid_constant__ RowsPlan plan) {
  constexpr int kPixels = Word<Type>::kElements;
  const Place place = Place::of<Type>(job.input.shape, plan.strips, plan.words_of_share);
  Staging<Type, kLayout> staging(job.input, job.grad, plan, place, shared_memory());
  Rows<Type, kLayout, false> rows(job.input, plan, place, staging);
  for_each_row(place, staging, rows, [&](int y, int stage) {
    const Terms<kPixels> terms = rows.reduce(y, stage);
    float weight[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      weight[v] = weight_of(job, place.image, place.index(y) + v, terms.label[v], terms.log_odds[v]);
    }
    rows.put(y, stage, terms.kept, weight, job.targeted);
    staging.copy_out(y, stage);
  });
}

template <class Type>
__global__ void __launch_bounds__(kPixelThreads, 2)
    front_grad_general_kernel(const __grid_constant__ FrontGrad job, int blocks_of_image) {
  for_each_pixel<Type>(job.input, blocks_of_image, [&](const Image<Type>& image, int pixel, int64_t index) {
    const int label = read_label(job.input.labels, image.classes, index);
    const PixelTerms terms = reduce_pixel(image, pixel, label);
    const float weight = weight_of(job, image.number, index, label, terms.finite ? terms.log_odds : not_a_number());
    image.write(job.grad, pixel, label, terms.largest, terms.sum, job.targeted ? -weight : weight);
  });
}

cudaError_t launch_front_grad(const FrontGrad& job, cudaStream_t stream) {
  if (job.input.shape.classes() > kMostClasses) {
    return for_type(job.input.logits.type, [&](auto type) {
      return launch_pixels(front_grad_general_kernel<decltype(type)>, job, 0, stream);
    });
  }
  return for_rows(job.input, job.grad, [&](auto type, auto layout) {
    using Type = decltype(type);
    return launch_rows<Type, layout.value>(front_grad_kernel<Type, layout.value>, job, kSingleRows, stream);
  });
}

}  // namespace

cudaError_t launch_erosion_grad_passes(const ErosionGrad& job, const Counting& counting, void* workspace,
                                       cudaStream_t stream) {
  const Shape& shape = job.input.shape;
  const int64_t pixels = shape.batch * shape.pixels();
  auto* eroded = static_cast<float*>(workspace);
  auto* predicted = job.within == Within::kClass ? reinterpret_cast<int32_t*>(eroded + pixels) : nullptr;
  cudaError_t error = launch_scores(
      {job.input, job.confidence, job.log_odds, job.tau, job.previous, predicted, job.targeted}, counting, stream);
  if (error != cudaSuccess) return error;
  error = launch_erode({shape.height, shape.width, job.radius}, shape.batch, job.log_odds, true, nullptr, predicted,
                       job.tau, job.slope, eroded, stream);
  if (error != cudaSuccess) return error;
  return launch_front_grad({job, eroded}, stream);
}

}  // namespace eroseg::cuda
