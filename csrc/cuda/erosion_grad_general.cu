// erosion_grad for everything that erosion_grad.cu does not take: radius up to 8, the top class's confidence, a
// geodesic erosion, any number of classes. One thread for each pixel of a row, which reads its logits from memory where
// it needs them.
//
// A block goes down a band of rows of a strip, as there. The erosion is a pipeline over rows: level 0 of row y are its
// confidences; level i of row y - i is the 3x3 erosion of level i - 1, whose row y - i + 1 has just become known; level
// `radius` is final. The last four rows of each level stand in a ring in shared memory, with a barrier after each
// level. A thread's own pixels of the radius + 1 rows under way wait there too, with what their gradient needs.
#include "counts.cuh"
#include "general.cuh"
#include "strips.h"

namespace eroseg::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRing = 4;
constexpr int kClassRing = kMaxRadius + 3;

struct Waiting {
  float largest, sum, gain;
  int label;
};

// Row y's place in a ring; y can be negative, but not below -2 * kMaxRadius.
__device__ __forceinline__ int place_in(int ring, int y) { return (y + 4 * ring * kMaxRadius) % ring; }

template <class Type>
__global__ void __launch_bounds__(kThreads, 8)
    erosion_grad_general_kernel(const __grid_constant__ ErosionGrad job, const __grid_constant__ Strips strips,
                                const __grid_constant__ Counting counting) {
  const Shape& shape = job.input.shape;
  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
  const int per_image = strips.count * strips.bands;
  const int64_t image_index = blockIdx.x / per_image;
  const int within = static_cast<int>(blockIdx.x % per_image);
  const int begin = within % strips.bands * strips.rows;
  const int end = begin + strips.rows < height ? begin + strips.rows : height;
  const int left = within / strips.bands * strips.width;
  const int radius = job.radius, self = static_cast<int>(threadIdx.x);

  const int pitch = strips.width + 2 * strips.halo + 2;
  const int x = left - strips.halo + self;
  const int position = self + 1;
  const bool has_place = position < pitch - 1;
  const bool in_image = has_place && x >= 0 && x < width;
  const bool own = in_image && x >= left && x < left + strips.width;

  unsigned char* memory = shared_memory();
  auto* levels = reinterpret_cast<float*>(memory);
  auto* classes = reinterpret_cast<int*>(levels + (radius + 1) * kRing * pitch);
  auto* waiting = reinterpret_cast<Waiting*>(classes + kClassRing * pitch);
  const auto level = [&](int i, int y) { return levels + (i * kRing + place_in(kRing, y)) * pitch + position; };
  const auto class_row = [&](int y) { return classes + place_in(kClassRing, y) * pitch + position; };
  for (int i = self; i < (radius + 1) * kRing * pitch; i += kThreads) levels[i] = kInf;
  for (int i = self; i < kClassRing * pitch; i += kThreads) classes[i] = -1;
  __syncthreads();

  const Image<Type> image(job.input, image_index);
  const float tau = job.tau[image_index];
  const float rise = job.slope * tau;
  const bool geodesic = job.within == Within::kClass;
  const float* class_weight = job.class_weight == nullptr ? nullptr : job.class_weight + image_index * shape.classes();
  Counts counts;

  const auto eroded = [&](int i, int y) {
    const int own_class = *class_row(y);
    float lowest = kInf;
    for (int dy = -1; dy <= 1; ++dy) {
      const float* row = level(i - 1, y + dy);
      const int* row_class = class_row(y + dy);
      for (int dx = -1; dx <= 1; ++dx) {
        if (!geodesic || row_class[dx] == own_class) lowest = fminf(lowest, row[dx]);
      }
    }
    return fminf(*level(i - 1, y), lowest + rise);
  };

  for (int y = begin - radius; y < end + radius; ++y) {
    float score = kInf;
    int predicted = -1;
    Waiting now{0.0f, 1.0f, 0.0f, -1};
    if (in_image && y >= 0 && y < height) {
      const int pixel = y * width + x;
      const int64_t index = image_index * shape.pixels() + pixel;
      const int label = read_label(job.input.labels, image.classes, index);
      const PixelTerms terms = reduce_pixel(image, pixel, label);
      const float confidence = signed_confidence(image, pixel, label, terms, job.confidence);
      predicted = terms.predicted;
      if (label >= 0 && terms.finite) {
        score = absolute(confidence);
        now = {terms.largest, terms.sum, job.targeted ? -1.0f : 1.0f, label};
        if (job.direction == Direction::kCrossEntropy) now.gain *= sigmoid(-terms.log_odds);
        if (class_weight != nullptr) now.gain *= class_weight[label];
      }
      if (own && y >= begin && y < end) {
        job.log_odds[index] = confidence;
        counts.valid += label >= 0;
        counts.right += terms.right;
        if (confidence != confidence) counts.movement += confidence;
        if (score <= tau) {
          counts.front += 1;
          const float before = job.previous == nullptr ? confidence : job.previous[index];
          counts.movement += job.targeted ? confidence - before : before - confidence;
        }
      }
    }
    if (has_place) {
      *level(0, y) = score;
      *class_row(y) = predicted;
    }
    waiting[place_in(radius + 1, y) * kThreads + self] = now;
    __syncthreads();
    for (int i = 1; i < radius; ++i) {
      if (has_place) *level(i, y - i) = eroded(i, y - i);
      __syncthreads();
    }
    const int done = y - radius;
    if (own && done >= begin) {
      const float q = radius == 0 ? score : eroded(radius, done);
      const Waiting pixel = waiting[place_in(radius + 1, done) * kThreads + self];
      const float weight = pixel.gain == 0.0f ? 0.0f : pixel.gain * front_weight(job.front, q, tau);
      image.write(job.grad, done * width + x, pixel.label, pixel.largest, pixel.sum, weight);
    }
  }
  add_up(counts, shape.batch, counting, memory);
}

}  // namespace

cudaError_t launch_erosion_grad_general(const ErosionGrad& job, const Counting& counting, cudaStream_t stream) {
  const Shape& shape = job.input.shape;
  // As few threads as possible.
  Strips strips = cut_strips(shape.width, {job.radius, 1, 1, kWarp, 1, kThreads}, kNarrowestStrip,
                             [](const Strips& cut) { return static_cast<double>(cut.count * cut.slots); });
  const int64_t pitch = strips.width + 2 * strips.halo + 2;
  const int64_t cells = (job.radius + 1) * kRing * pitch + kClassRing * pitch;
  const int64_t shared = std::max<int64_t>(
      cells * 4 + (job.radius + 1) * kThreads * static_cast<int64_t>(sizeof(Waiting)), counts_bytes(kThreads));
  return for_type(job.input.logits.type, [&](auto type) {
    const auto kernel = erosion_grad_general_kernel<decltype(type)>;
    int resident = 1;
    const cudaError_t error = resident_blocks(kernel, kThreads, shared, &resident);
    if (error != cudaSuccess) return error;
    cut_bands(strips, shape.batch, shape.height, job.radius, resident);
    return launch(kernel, shape.batch * strips.count * strips.bands, dim3(kThreads), shared, stream, job, strips,
                  counting);
  });
}

}  // namespace eroseg::cuda
