// pixel_grad: the weighted cross-entropy of the other methods. A pixel's gradient needs that pixel only: a block goes
// down its band of rows, reduces each in shared memory and turns it into its gradient there (rows.cuh) while the next
// one is fetched (staging.cuh). More than 256 classes, and cospgd's sigmoid variant, which needs another pass over the
// classes, take a kernel with one thread for each pixel.
#include "counts.cuh"
#include "general.cuh"
#include "rows_launch.cuh"

namespace eroseg::cuda {
namespace {

// The weight of a valid, finite pixel; `norm` is method_weight's.
__device__ __forceinline__ float weight_of(const PixelGrad& job, const float* class_weight, int label, bool right,
                                           float log_odds, float norm) {
  const bool weighty = job.method.targeted ? !right : right;
  float weight = method_weight(job.method, log_odds, weighty, norm);
  return class_weight == nullptr ? weight : weight * class_weight[label];
}

__device__ __forceinline__ const float* class_weight_of(const PixelGrad& job, int64_t image) {
  return job.class_weight == nullptr ? nullptr : job.class_weight + image * job.input.shape.classes();
}

__device__ __forceinline__ void count(Counts& counts, bool valid, bool right, float log_odds) {
  counts.valid += valid;
  counts.front += valid;
  counts.right += right;
  if (valid && log_odds != log_odds) counts.movement += log_odds;
}

template <class Type, Layout kLayout>
__global__ void __launch_bounds__(kMostThreads, 2)
    pixel_grad_kernel(const __grid_constant__ PixelGrad job, const __grid_constant__ RowsPlan plan,
                      const __grid_constant__ Counting counting) {
  constexpr int kPixels = Word<Type>::kElements;
  const Place place = Place::of<Type>(job.input.shape, plan.strips, plan.words_of_share);
  unsigned char* memory = shared_memory();
  Staging<Type, kLayout> staging(job.input, job.grad, plan, place, memory);
  Rows<Type, kLayout, true> rows(job.input, plan, place, staging);
  const float* class_weight = class_weight_of(job, place.image);
  Counts counts;
  for_each_row(place, staging, rows, [&](int y, int stage) {
    const Terms<kPixels> terms = rows.reduce(y, stage);
    float weight[kPixels];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      const bool valid = terms.label[v] >= 0;
      const float log_odds = terms.log_odds[v];
      weight[v] = 0.0f;
      if (valid && log_odds == log_odds) {
        weight[v] = weight_of(job, class_weight, terms.label[v], terms.right[v], log_odds, terms.norm[v]);
      }
      if (place.own && place.group == 0) count(counts, valid, terms.right[v], log_odds);
    }
    rows.put(y, stage, terms.kept, weight, job.method.targeted);
    staging.copy_out(y, stage);
  });
  add_up(counts, job.input.shape.batch, counting, memory);
}

template <class Type>
__global__ void __launch_bounds__(kPixelThreads, 2)
    pixel_grad_general_kernel(const __grid_constant__ PixelGrad job, int blocks_of_image,
                              const __grid_constant__ Counting counting) {
  Counts counts;
  for_each_pixel<Type>(job.input, blocks_of_image, [&](const Image<Type>& image, int pixel, int64_t index) {
    const int label = read_label(job.input.labels, image.classes, index);
    const PixelTerms terms = reduce_pixel(image, pixel, label);
    const float log_odds = signed_confidence(image, pixel, label, terms, Confidence::kLabel);
    float weight = 0.0f;
    if (label >= 0 && terms.finite) {
      float norm = 0.0f;
      if (job.method.method == Method::kCosPgd) {
        for (int c = 0; c < image.classes; ++c) {
          const float e = exp2_approx((image.logit(c, pixel) - terms.largest) * kLog2E) / terms.sum;
          if (c != label) norm += e * e;
        }
      } else if (job.method.method == Method::kCosPgdSigmoid) {
        const float of_label = log_sigmoid(terms.of_label);
        for (int c = 0; c < image.classes; ++c) norm += squared_sigmoid_ratio(image.logit(c, pixel), of_label);
      }
      weight = weight_of(job, class_weight_of(job, image.number), label, terms.right, log_odds, norm);
    }
    count(counts, label >= 0, terms.right, log_odds);
    image.write(job.grad, pixel, label, terms.largest, terms.sum, job.method.targeted ? -weight : weight);
  });
  add_up(counts, job.input.shape.batch, counting, shared_memory());
}

cudaError_t launch_pixel_grad_general(const PixelGrad& job, const Counting& counting, cudaStream_t stream) {
  return for_type(job.input.logits.type, [&](auto type) {
    const auto kernel = pixel_grad_general_kernel<decltype(type)>;
    return launch_pixels(kernel, job, counts_bytes(kPixelThreads), stream, counting);
  });
}

}  // namespace

cudaError_t launch_pixel_grad(const PixelGrad& job, const Counting& counting, cudaStream_t stream) {
  const Shape& shape = job.input.shape;
  if (shape.pixels() == 0) return count_nothing(shape, counting, stream);
  if (job.method.method == Method::kCosPgdSigmoid || shape.classes() > kMostClasses) {
    return launch_pixel_grad_general(job, counting, stream);
  }
  return for_rows(job.input, job.grad, [&](auto type, auto layout) {
    using Type = decltype(type);
    return launch_rows<Type, layout.value>(pixel_grad_kernel<Type, layout.value>, job, kSingleRows, stream, counting);
  });
}

}  // namespace eroseg::cuda
