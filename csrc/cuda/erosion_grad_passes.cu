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

constexpr int kStages = 2;

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
    front_grad_kernel(const __grid_constant__ FrontGrad job, const __grid_constant__ Strips strips) {
  constexpr int kPixels = Word<Type>::kElements;
  const Place place = Place::of<Type>(job.input.shape, strips);
  Staging<Type, kLayout> staging(job.input, job.grad, strips, place, kStages, shared_memory());
  Rows<Type, kLayout, false> rows(job.input, place, staging, strips.groups);
  staging.fetch(place.begin, 0);
  for (int y = place.begin, stage = 0; y < place.end; ++y, stage = 1 - stage) {
    staging.arrive();
    if (y + 1 < place.end) {
      staging.fetch(y + 1, 1 - stage);
      rows.prefetch_labels(y + 1);
    }
    const Terms<kPixels> terms = rows.reduce(y, stage);
    float weight[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      weight[v] = weight_of(job, place.image, place.index(y) + v, terms.label[v], terms.log_odds[v]);
    }
    rows.put(y, stage, terms.kept, weight, job.targeted);
    staging.copy_out(y, stage);
  }
}

template <class Type>
__global__ void __launch_bounds__(kPixelThreads)
    front_grad_general_kernel(const __grid_constant__ FrontGrad job, int blocks_of_image) {
  const int64_t image_index = blockIdx.x / blocks_of_image;
  const int first = static_cast<int>(blockIdx.x % blocks_of_image) * kPixelThreads + static_cast<int>(threadIdx.x);
  const Image<Type> image(job.input, image_index);
  const int pixels = static_cast<int>(job.input.shape.pixels());
  for (int pixel = first; pixel < pixels; pixel += blocks_of_image * kPixelThreads) {
    const int64_t index = image_index * pixels + pixel;
    const int label = read_label(job.input.labels, image.classes, index);
    const PixelTerms terms = reduce_pixel(image, pixel, label);
    const float weight = weight_of(job, image_index, index, label, terms.finite ? terms.log_odds : not_a_number());
    image.write(job.grad, pixel, label, terms.largest, terms.sum, job.targeted ? -weight : weight);
  }
}

cudaError_t launch_front_grad(const FrontGrad& job, cudaStream_t stream) {
  const Shape& shape = job.input.shape;
  if (shape.classes() > kMostClasses) {
    const int blocks = pixel_blocks(shape);
    return for_type(job.input.logits.type, [&](auto type) {
      return launch(front_grad_general_kernel<decltype(type)>, shape.batch * blocks, dim3(kPixelThreads), 0, stream,
                    job, blocks);
    });
  }
  return for_rows(job.input, [&](auto type, auto layout) {
    using Type = decltype(type);
    return launch_rows<Type>(front_grad_kernel<Type, decltype(layout)::value>, job, {0, kStages, 0, 0}, stream);
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
