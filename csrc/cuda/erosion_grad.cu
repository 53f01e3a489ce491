// erosion_grad: confidence, selection against tau, erosion of the neighbourhood and the gradient in one pass.
//
// A block goes down a band of rows of a strip (strips.h). For each row y, from one above the band to one below it:
//   1. Load the row's logits into registers and reduce them over the classes (rows.cuh).
//   2. Count the row's pixels if it is the block's own, write their log-odds, and put all confidences, those of the
//   halo
//      too, into shared memory, where the last four rows stand in a ring.
//   3. Barrier. Then the 3x3 erosion of row y - 1 is known: write its gradient from the logits of row y - 1, which this
//      thread has kept in registers, and keep those of row y.
// So the logits are read once, but for the overlap of strips and bands, and the gradient is written once. Between the
// barriers of rows y and y + 1 threads read the confidences of rows y - 2 to y and write those of y + 1: four different
// places in the ring.
//
// Radius 0 is radius 1 with a cone that rises to infinity. What does not fit here (a larger radius, the top class's
// confidence, a geodesic erosion, more than 256 classes) takes the general kernel, erosion_grad_general.cu.
#include "counts.cuh"
#include "general.cuh"
#include "rows.cuh"

namespace eroseg::cuda {
namespace {

constexpr int kRing = 4;

// One +inf on either side of a row's confidences is the border of the image.
int64_t ring_bytes(const Strips& strips) {
  return kRing * (strips.width + 2 * strips.halo + 2) * static_cast<int64_t>(sizeof(float));
}

template <class Type, int kPer, Layout kLayout>
__global__ void __launch_bounds__(kMostThreads, resident_wanted(kPer, kLayout))
    erosion_grad_kernel(const __grid_constant__ ErosionGrad job, const __grid_constant__ Strips strips,
                        const __grid_constant__ Counting counting) {
  constexpr int kPixels = Type::kPixels;
  const Shape& shape = job.input.shape;
  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
  const Place place = Place::of<Type>(shape, strips);
  unsigned char* memory = shared_memory();
  const int pitch = strips.width + 2 * strips.halo + 2;
  auto* ring = reinterpret_cast<float*>(memory);
  Rows<Type, kPer, kLayout, false> rows(job.input, strips, place,
                                        memory + (kRing * pitch * static_cast<int>(sizeof(float)) + 15) / 16 * 16);

  const float tau = job.tau[place.image];
  const float rise = job.radius == 0 ? kInf : job.slope * tau;
  const int pixels = place.pixels<Type>(width);
  const int position = place.x - place.left + strips.halo + 1;
  // Words beyond the strip and its halo have no place in the ring.
  const bool has_place = position >= 1 && position + kPixels < pitch;
  const bool writes = place.own && place.group == 0;

  for (int i = thread_of_block(); i < kRing * pitch; i += threads_of_block()) ring[i] = kInf;

  uint32_t kept[kPer] = {};
  int kept_label[kPixels];
  float kept_scaled[kPixels], kept_sum[kPixels], kept_gain[kPixels];
  for (int v = 0; v < kPixels; ++v) kept_label[v] = -1, kept_scaled[v] = kept_gain[v] = 0.0f, kept_sum[v] = 1.0f;
  Counts counts;
  __syncthreads();

  for (int y = place.begin - 1; y <= place.end; ++y) {
    uint32_t z[kPer] = {};
    int label[kPixels];
    float scaled[kPixels], sum[kPixels], gain[kPixels], score[kPixels];
    for (int v = 0; v < kPixels; ++v) {
      label[v] = -1, scaled[v] = gain[v] = 0.0f, sum[v] = 1.0f, score[v] = kInf;
    }
    if (y >= 0 && y < height) {
      rows.load(y, z);
      const Terms<kPixels> terms = rows.reduce(y, z);
      const bool own_row = y >= place.begin && y < place.end;
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        const bool valid = terms.label[v] >= 0;
        const float log_odds = terms.log_odds[v];
        const bool finite = log_odds == log_odds;
        label[v] = terms.label[v], scaled[v] = terms.scaled[v], sum[v] = terms.sum[v];
        if (valid && finite) {
          score[v] = absolute(log_odds);
          gain[v] = job.targeted ? -1.0f : 1.0f;
          if (job.direction == Direction::kCrossEntropy) gain[v] *= sigmoid(-log_odds);
          if (job.class_weight != nullptr) gain[v] *= job.class_weight[place.image * shape.classes() + label[v]];
        }
        if (writes && own_row && v < pixels) {
          const int64_t index = (place.image * height + y) * width + place.x + v;
          const float now = valid ? log_odds : kInf;
          job.log_odds[index] = now;
          counts.valid += valid;
          counts.right += valid && terms.right[v];
          if (valid && !finite) counts.movement += now;
          if (score[v] <= tau) {
            counts.front += 1;
            const float before = job.previous == nullptr ? now : job.previous[index];
            counts.movement += job.targeted ? now - before : before - now;
          }
        }
      }
    }
    if (place.group == 0 && has_place) {
      float* row = ring + (y & (kRing - 1)) * pitch + position;
#pragma unroll
      for (int v = 0; v < kPixels; ++v) row[v] = score[v];
    }
    __syncthreads();

    if (y > place.begin) {
      float weight[kPixels];
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        float q = kInf;
        if (place.own) {
          float lowest = kInf;
#pragma unroll
          for (int dy = -2; dy <= 0; ++dy) {
            const float* row = ring + ((y + dy) & (kRing - 1)) * pitch + position + v;
            lowest = fminf(lowest, fminf(row[-1], fminf(row[0], row[1])));
          }
          q = fminf(ring[((y - 1) & (kRing - 1)) * pitch + position + v], lowest + rise);
        }
        weight[v] = kept_gain[v] == 0.0f ? 0.0f : kept_gain[v] * front_weight(job.front, q, tau);
      }
      rows.write(y - 1, kept, kept_label, kept_scaled, kept_sum, weight, job.grad);
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) kept[i] = z[i];
    for (int v = 0; v < kPixels; ++v) {
      kept_label[v] = label[v], kept_scaled[v] = scaled[v], kept_sum[v] = sum[v], kept_gain[v] = gain[v];
    }
  }
  add_up(counts, shape.batch, counting, memory);
}

template <class Type, int kPer, Layout kLayout>
cudaError_t launch_rows(const ErosionGrad& job, const Counting& counting, cudaStream_t stream) {
  const Shape& shape = job.input.shape;
  const auto kernel = erosion_grad_kernel<Type, kPer, kLayout>;
  Strips strips = cut_strips(shape.width, 1, Type::kPixels, groups_for(shape.classes()), kMostThreads);
  const dim3 threads(strips.slots, strips.groups);
  const int all = strips.slots * strips.groups;
  const int64_t shared =
      std::max((ring_bytes(strips) + 15) / 16 * 16 + rows_bytes(strips, Type::kPixels, job.input), counts_bytes(all));
  int resident = 1;
  const cudaError_t error = resident_blocks(kernel, all, shared, &resident);
  if (error != cudaSuccess) return error;
  cut_bands(strips, shape.batch, shape.height, 1, resident);
  return launch(kernel, shape.batch * strips.count * strips.bands, threads, shared, stream, job, strips, counting);
}

}  // namespace

cudaError_t launch_erosion_grad(const ErosionGrad& job, const Counting& counting, cudaStream_t stream) {
  const Shape& shape = job.input.shape;
  if (shape.pixels() == 0) return count_nothing(shape, counting, stream);
  const bool fits = job.radius <= 1 && job.within == Within::kAny && job.confidence == Confidence::kLabel;
  if (!fits || !fits_rows(shape)) return launch_erosion_grad_general(job, counting, stream);
  return for_rows(job.input, job.grad, [&](auto type, auto per, auto layout) {
    return launch_rows<decltype(type), decltype(per)::value, decltype(layout)::value>(job, counting, stream);
  });
}

}  // namespace eroseg::cuda
