// erosion_grad: confidence, selection against tau, erosion of the neighbourhood and the gradient in one pass.
//
// A block goes over the rows of its tile (tiles.h), numbered in the order that it takes them. For each row i, from the
// one before the tile to the one behind it:
//   1. Wait until its logits have arrived in shared memory, and begin to fetch those of row i + 1 (staging.cuh).
//   2. Reduce it over the classes. If it belongs to the tile, count its pixels and write their log-odds. Put all
//      confidences, those of the halo too, into shared memory, where a ring holds the last four rows.
//   3. After a barrier, erode the confidences of row i - 1, turn its logits, which are still in shared memory, into
//      their gradient, and copy that out after another barrier.
// So the logits are read once, but for the overlap of tiles, and the gradient is written once.
//
// Between the second barriers of rows i and i + 1 threads read the confidences of rows i - 2 to i and write those of
// i + 1: four different places in the ring. Logits have three stages: when row i + 1 is fetched, row i - 2 has been
// copied out, before the barrier at which row i arrived.
//
// Radius 0 is radius 1 with a cone that rises to infinity.
#include "counts.cuh"
#include "rows_launch.cuh"

namespace eroseg::cuda {
namespace {

constexpr int kRing = 4;
constexpr int kStages = 3;

// Elements of a row of confidences, with a vector on either side of the tile: its halo, or +inf outside the image.
__host__ __device__ constexpr int ring_pitch(const Tiles& tiles, int pixels_of_vector) {
  return tiles.width + 2 * pixels_of_vector;
}

// The confidence of the top class takes a kernel of its own, so that what it needs costs the other no registers.
__host__ __device__ constexpr int most_threads(Confidence kind) {
  return kind == Confidence::kTop ? 192 : kMostThreads;
}

// pixel_math.h's front_weight of a soft front by the exponential unit: its error grows to 1e-5 only where the weight is
// below 1e-30.
__device__ __forceinline__ float soft_front_weight(float q, float per_tau) {
  const float e = exp2_approx(-kLog2E * per_tau * q);
  const float r = reciprocal(1.0f + e);
  return 4.0f * e * r * r;
}

// The lowest score among each pixel of a vector and its eight neighbours; row(0), row(1) and row(2) point to the
// vector's pixels in the next, the present and the last row.
template <int kPixels, class Row>
__device__ __forceinline__ void find_lowest(const Row& row, float (&lowest)[kPixels]) {
  float column[kPixels + 2];
#pragma unroll
  for (int i = 0; i < kPixels + 2; ++i) column[i] = kInf;
#pragma unroll
  for (int back = 0; back <= 2; ++back) {
    const float* const vector = row(back);
    const auto own = *reinterpret_cast<const AlignedVector<float, kPixels>*>(vector);
    column[0] = fminf(column[0], vector[-1]);
#pragma unroll
    for (int v = 0; v < kPixels; ++v) column[v + 1] = fminf(column[v + 1], own.at[v]);
    column[kPixels + 1] = fminf(column[kPixels + 1], vector[kPixels]);
  }
#pragma unroll
  for (int v = 0; v < kPixels; ++v) lowest[v] = fminf(column[v], fminf(column[v + 1], column[v + 2]));
}

template <class Type, bool kPieces, Confidence kConfidence>
__global__ void __launch_bounds__(most_threads(kConfidence), 2)
    erosion_grad_kernel(const __grid_constant__ ErosionGrad job, const __grid_constant__ RowsPlan plan,
                        const __grid_constant__ Counting counting) {
  constexpr int kPixels = Vector<Type>::kElements;
  using Scores = AlignedVector<float, kPixels>;
  const Shape& shape = job.input.shape;
  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
  const ThreadTile tile = ThreadTile::of<Type>(shape, plan.tiles, plan.slice_classes);
  unsigned char* memory = shared_memory();
  const int pitch = ring_pitch(plan.tiles, kPixels);
  auto* ring = reinterpret_cast<float*>(memory);
  Staging<Type, kPieces> staging(job.input, job.grad, plan, tile,
                                 memory + kRing * pitch * static_cast<int>(sizeof(float)));
  Rows<Type, false> rows(job.input, plan, tile);

  const float tau = job.tau[tile.image];
  const float per_tau = 1.0f / tau;
  const float rise = job.radius == 0 ? kInf : job.slope * tau;
  const int position = tile.x - tile.left + kPixels;
  const bool has_slot = position >= 0 && position + kPixels <= pitch;
  const bool writes = tile.own && tile.group == 0;
  const bool aligned = width % kPixels == 0 && reinterpret_cast<uintptr_t>(job.log_odds) % sizeof(Scores) == 0;
  const auto in_ring = [&](int i) { return (i & (kRing - 1)) * pitch + position; };

  for (int i = thread_of_block(); i < kRing * pitch; i += threads_of_block()) ring[i] = kInf;

  typename Terms<kPixels>::Kept kept[kPixels];
  float kept_gain[kPixels];
  for (int v = 0; v < kPixels; ++v) kept[v] = {-1, 0.0f, 1.0f}, kept_gain[v] = 0.0f;
  const float* const class_weight =
      job.class_weight == nullptr ? nullptr : job.class_weight + tile.image * shape.classes();
  Counts counts;
  const int own_rows = tile.end - tile.begin;
  int before = 0, now = 1, after = 2;  // stages of rows i - 1, i and i + 1
  staging.fetch(tile.row(-1), now);

  for (int i = -1; i <= own_rows; ++i) {
    staging.arrive();
    if (i < own_rows) {
      staging.fetch(tile.row(i + 1), after);
      rows.prefetch_labels(tile.row(i + 1));
    }
    const int y = tile.row(i);
    typename Terms<kPixels>::Kept keep[kPixels];
    float gain[kPixels];
    float front_before[kPixels], front_now[kPixels];
    Scores score;
    for (int v = 0; v < kPixels; ++v) {
      keep[v] = {-1, 0.0f, 1.0f}, gain[v] = 0.0f, score.at[v] = kInf, front_before[v] = front_now[v] = 0.0f;
    }
    if (y >= 0 && y < height) {
      Scores log_odds;
      const Terms<kPixels> terms = rows.reduce(y, staging.at(now, tile.x), kConfidence, log_odds.at);
#pragma unroll
      for (int v = 0; v < kPixels; ++v) {
        const bool weighs = terms.label[v] >= 0 && log_odds.at[v] == log_odds.at[v];
        score.at[v] = weighs ? absolute(log_odds.at[v]) : kInf;
        gain[v] = weighs ? 1.0f : 0.0f;
        keep[v] = terms.kept[v];
      }
      if (class_weight != nullptr) {
#pragma unroll
        for (int v = 0; v < kPixels; ++v) gain[v] *= class_weight[terms.label[v] < 0 ? 0 : terms.label[v]];
      }
      if (job.direction == Direction::kCrossEntropy) {
#pragma unroll
        for (int v = 0; v < kPixels; ++v) gain[v] *= gain[v] == 0.0f ? 0.0f : sigmoid(-terms.log_odds[v]);
      }
      if (writes && i >= 0 && i < own_rows) {
        const int64_t index = tile.index(y);
        if (aligned && tile.pixels > 0) {
          write_at_once(job.log_odds + index, log_odds);
        } else {
#pragma unroll
          for (int v = 0; v < kPixels; ++v) {
            if (v < tile.pixels) job.log_odds[index + v] = log_odds.at[v];
          }
        }
        bool is_any_broken = false;
#pragma unroll
        for (int v = 0; v < kPixels; ++v) {
          counts.valid += terms.label[v] >= 0;
          counts.correct += terms.correct[v];
          counts.front += score.at[v] <= tau;
          is_any_broken = is_any_broken || log_odds.at[v] != log_odds.at[v];
        }
        if (job.previous != nullptr) {
#pragma unroll
          for (int v = 0; v < kPixels; ++v) {
            if (score.at[v] <= tau) front_before[v] = job.previous[index + v], front_now[v] = log_odds.at[v];
          }
        }
        if (is_any_broken) counts.movement += not_a_number();
      }
    }
    if (tile.group == 0 && has_slot) *reinterpret_cast<Scores*>(ring + in_ring(i)) = score;
    __syncthreads();

    if (i > 0) {
      float weight[kPixels];
      for (int v = 0; v < kPixels; ++v) weight[v] = 0.0f;
      if (tile.own) {
        const auto row = [&](int back) { return ring + in_ring(i - back); };
        float lowest[kPixels];
        find_lowest<kPixels>(row, lowest);
        const auto own = *reinterpret_cast<const Scores*>(row(1));
#pragma unroll
        for (int v = 0; v < kPixels; ++v) weight[v] = fminf(own.at[v], lowest[v] + rise);
        if (job.front == Front::kSoft) {
#pragma unroll
          for (int v = 0; v < kPixels; ++v) weight[v] = soft_front_weight(weight[v], per_tau);
        } else {
#pragma unroll
          for (int v = 0; v < kPixels; ++v) weight[v] = weight[v] <= tau ? 1.0f : 0.0f;
        }
#pragma unroll
        for (int v = 0; v < kPixels; ++v) weight[v] = kept_gain[v] == 0.0f ? 0.0f : kept_gain[v] * weight[v];
      }
      rows.put(staging.at(before, tile.x), kept, weight, job.targeted);
      staging.copy_out(tile.row(i - 1), before);
    }
    // Added up here, since the log-odds of the step before have arrived by now.
    float lost = 0.0f;
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      kept[v] = keep[v], kept_gain[v] = gain[v];
      lost += front_before[v] - front_now[v];
    }
    counts.movement += job.targeted ? -lost : lost;
    const int done = before;
    before = now, now = after, after = done;
  }
  add_up(counts, shape.batch, counting, memory);
}

}  // namespace

cudaError_t launch_erosion_grad(const ErosionGrad& job, const Counting& counting, PixelTerms* workspace,
                                cudaStream_t stream) {
  if (job.input.interpolates()) return launch_interpolated(job, counting, workspace, stream);
  const Shape& shape = job.input.shape;
  if (shape.pixels() == 0) return count_nothing(shape, counting, stream);
  return for_rows(job.input, job.grad, [&](auto type, auto pieces) {
    using Type = decltype(type);
    constexpr bool kPieces = decltype(pieces)::value;
    constexpr int kPixels = Vector<Type>::kElements, kOfPixel = kRing * static_cast<int>(sizeof(float));
    auto kernel = erosion_grad_kernel<Type, kPieces, Confidence::kLabel>;
    if (job.confidence == Confidence::kTop) kernel = erosion_grad_kernel<Type, kPieces, Confidence::kTop>;
    if (job.confidence == Confidence::kLogOdds) kernel = erosion_grad_kernel<Type, kPieces, Confidence::kLogOdds>;
    const RowsNeeds needs{1, kStages, kOfPixel, 2 * kPixels * kOfPixel, most_threads(job.confidence)};
    return launch_rows<Type>(kernel, job, needs, stream, counting);
  });
}

}  // namespace eroseg::cuda
