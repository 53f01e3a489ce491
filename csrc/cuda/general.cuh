// Single pixels, for what rows.cuh does not take: a thread goes over its pixel's classes as often as it needs to and
// reads them again each time, mostly out of a cache. Any number of classes, both memory layouts, one text.
#pragma once

#include "launchers.h"
#include "types.cuh"

namespace eroseg::cuda {

// One image's logits.
template <class Type>
struct Image {
  __device__ Image(const Input& input, int64_t image)
      : number(image),
        channels(static_cast<int>(input.shape.channels)),
        classes(static_cast<int>(input.shape.classes())),
        first_class(classes - channels),
        class_stride(input.logits.channels_last ? 1 : static_cast<int>(input.shape.pixels())),
        pixel_stride(input.logits.channels_last ? channels : 1),
        offset(image * channels * input.shape.pixels()),
        data(static_cast<const typename Type::Element*>(input.logits.data) + offset) {}

  __device__ float logit(int c, int pixel) const {
    if (c < first_class) return 0.0f;
    return Type::to_float(data[(c - first_class) * class_stride + pixel * pixel_stride]);
  }

  // Writes weight * dl/dz of a pixel; `largest` and `sum` are its m and S.
  __device__ void write(void* grad, int pixel, int label, float largest, float sum, float weight) const {
    auto* to = static_cast<typename Type::Element*>(grad) + offset + pixel * pixel_stride;
    const float scale = weight / sum;
    for (int c = first_class; c < classes; ++c) {
      float g = 0.0f;  // also where logits are not finite: their weight is 0
      if (weight != 0.0f) g = c == label ? -weight : exp2_approx((logit(c, pixel) - largest) * kLog2E) * scale;
      to[(c - first_class) * class_stride] = to_element<Type>(g);
    }
  }

  int64_t number;  // in the batch
  int channels, classes, first_class, class_stride, pixel_stride;
  int64_t offset;
  const typename Type::Element* data;
};

// The terms of pixel_math.h for one pixel.
struct PixelTerms {
  float largest, sum, log_odds, of_label;
  int predicted;  // arg max, the lowest class on ties
  bool right, finite;
};

template <class Type>
__device__ PixelTerms reduce_pixel(const Image<Type>& image, int pixel, int label) {
  PixelTerms terms{-kInf, 0.0f, 0.0f, 0.0f, 0, false, true};
  float poison = 0.0f;
  for (int c = 0; c < image.classes; ++c) {
    const float value = image.logit(c, pixel);
    if (value != -kInf) poison += value * 0.0f;  // a class of probability 0
    if (c == label) {
      terms.of_label = value;
    } else if (value > terms.largest) {
      terms.largest = value;
      terms.predicted = c;
    }
  }
  for (int c = 0; c < image.classes; ++c) {
    if (c != label) terms.sum += exp2_approx((image.logit(c, pixel) - terms.largest) * kLog2E);
  }
  const float gap = terms.of_label - terms.largest;
  terms.right = label >= 0 && (gap > 0.0f || (gap == 0.0f && label < terms.predicted));
  if (terms.right) terms.predicted = label;
  poison += (terms.of_label + terms.largest) * 0.0f;
  terms.finite = poison == 0.0f;
  terms.right = terms.right && terms.finite;
  terms.log_odds = gap - log_positive(terms.sum);
  return terms;
}

// Log-odds of the arg max plus log(C - 1), not below 0; negative where the arg max is not the label.
template <class Type>
__device__ float signed_top_confidence(const Image<Type>& image, int pixel, const PixelTerms& terms) {
  float top = -kInf, second = -kInf, sum = 0.0f;
  for (int c = 0; c < image.classes; ++c) {
    const float value = image.logit(c, pixel);
    if (c == terms.predicted) {
      top = value;
    } else {
      second = fmaxf(second, value);
    }
  }
  for (int c = 0; c < image.classes; ++c) {
    if (c != terms.predicted) sum += exp2_approx((image.logit(c, pixel) - second) * kLog2E);
  }
  const float others = static_cast<float>(image.classes - 1);
  const float confidence = fmaxf(top - second - log_positive(sum) + log_positive(others), 0.0f);
  return terms.right ? confidence : -confidence;
}

// What erosion_grad returns as a pixel's log-odds, and `confidence` the absolute value of.
template <class Type>
__device__ float signed_confidence(const Image<Type>& image, int pixel, int label, const PixelTerms& terms,
                                   Confidence kind) {
  if (label < 0) return kInf;
  if (!terms.finite) return not_a_number();
  return kind == Confidence::kTop ? signed_top_confidence(image, pixel, terms) : terms.log_odds;
}

// Threads for every pixel of the images: an image has at most 256 blocks, each of which takes every so many-th piece of
// it.
constexpr int kPixelThreads = 256;

// Launches a kernel that takes a job, the blocks of an image, and `more`.
template <class Job, class... More>
cudaError_t launch_pixels(void (*kernel)(Job, int, More...), const Job& job, int64_t shared, cudaStream_t stream,
                          const More&... more) {
  const Shape& shape = job.input.shape;
  const auto blocks = static_cast<int>(std::min<int64_t>((shape.pixels() + kPixelThreads - 1) / kPixelThreads, 256));
  return launch(kernel, shape.batch * blocks, dim3(kPixelThreads), shared, stream, job, blocks, more...);
}

// Calls f(image, pixel, the pixel's place in a map [B, H, W]) for the pixels that are this thread's.
template <class Type, class F>
__device__ __forceinline__ void for_each_pixel(const Input& input, int blocks_of_image, const F& f) {
  const Image<Type> image(input, blockIdx.x / blocks_of_image);
  const int pixels = static_cast<int>(input.shape.pixels());
  const int first = static_cast<int>(blockIdx.x % blocks_of_image) * kPixelThreads + static_cast<int>(threadIdx.x);
  for (int pixel = first; pixel < pixels; pixel += blocks_of_image * kPixelThreads) {
    f(image, pixel, image.number * pixels + pixel);
  }
}

}  // namespace eroseg::cuda
