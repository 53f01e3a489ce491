// erosion_grad: confidence, selection against tau, erosion of the neighbourhood and the gradient in one pass.
//
// A block goes over a band of rows of a strip (strips.h), numbered in the order that it takes them. For each row i,
// from the one before the band to the one behind it:
//   1. Wait until its logits have arrived in shared memory, and begin to fetch those of row i + 1 (staging.cuh).
//   2. Reduce it over the classes. Count its pixels if it is the block's own, write their log-odds, and put all
//      confidences, those of the halo too, into shared memory, where the last four rows' stand in a ring.
//   3. Barrier. Then the 3x3 erosion of row i - 1 is known: its logits, which still stand in shared memory, are turned
//      into their gradient in place, and after another barrier copied out.
// So the logits are read once, but for the overlap of strips and bands, and the gradient is written once.
//
// Between the second barriers of rows i and i + 1 threads read the confidences of rows i - 2 to i and write those of
// i + 1: four different places in the ring. Logits have three stages: when row i + 1 is fetched, row i - 2 has been
// copied out, before the barrier at which row i arrived.
//
// Radius 0 is radius 1 with a cone that rises to infinity. For a geodesic erosion the predicted classes stand in a ring
// of their own. A larger radius and more than 256 classes take several passes, erosion_grad_passes.cu.
#include "counts.cuh"
#include "passes.cuh"
#include "rows_launch.cuh"

namespace eroseg::cuda {
namespace {

constexpr int kRing = 4;
constexpr int kStages = 3;

// A row's confidences, with a word beyond the strip on either side: its halo, or +inf as the border of the image.
__host__ __device__ constexpr int ring_pitch(const Strips& strips, int pixels_of_word) {
  return strips.width + 2 * pixels_of_word;
}

__host__ __device__ inline bool is_geodesic(const ErosionGrad& job) { return job.within == Within::kClass; }

// Jobs that are not plain take a kernel of their own, so that what they need costs the others no registers.
inline bool is_plain(const ErosionGrad& job) { return !is_geodesic(job) && job.confidence == Confidence::kLabel; }
__host__ __device__ constexpr int most_threads(bool plain) { return plain ? kMostThreads : 192; }

// pixel_math.h's front_weight of a soft front by the exponential unit: its error grows to 1e-5 only where the weight is
// below 1e-30.
__device__ __forceinline__ float soft_front_weight(float q, float per_tau) {
  const float e = exp2_approx(-kLog2E * per_tau * q);
  const float r = reciprocal(1.0f + e);
  return 4.0f * e * r * r;
}

// A word of pixels of a row in shared memory, with one more on either side.
template <class T, int kPixels>
struct Neighbourhood {
  T at[kPixels + 2];

  explicit __device__ __forceinline__ Neighbourhood(const T* word) {
    const auto own = *reinterpret_cast<const Several<T, kPixels>*>(word);
    at[0] = word[-1];
#pragma unroll
    for (int v = 0; v < kPixels; ++v) at[v + 1] = own.at[v];
    at[kPixels + 1] = word[kPixels];
  }
};

// The lowest score among each pixel of a word and its eight neighbours; row(back) is where the word stands in the rows
// of the last, the present and the next one.
template <int kPixels, class Row>
__device__ __forceinline__ void find_lowest(const Row& row, float (&lowest)[kPixels]) {
  float column[kPixels + 2];
#pragma unroll
  for (int i = 0; i < kPixels + 2; ++i) column[i] = kInf;
#pragma unroll
  for (int back = 0; back <= 2; ++back) {
    const Neighbourhood<float, kPixels> scores(row(back));
#pragma unroll
    for (int i = 0; i < kPixels + 2; ++i) column[i] = fminf(column[i], scores.at[i]);
  }
#pragma unroll
  for (int v = 0; v < kPixels; ++v) lowest[v] = fminf(column[v], fminf(column[v + 1], column[v + 2]));
}

// The same among those of the pixel's own class, which stand at class_row(back).
template <int kPixels, class Row, class ClassRow>
__device__ __forceinline__ void find_lowest_of_class(const Row& row, const ClassRow& class_row,
                                                     float (&lowest)[kPixels]) {
  const Neighbourhood<int, kPixels> own(class_row(1));
#pragma unroll
  for (int v = 0; v < kPixels; ++v) lowest[v] = kInf;
#pragma unroll
  for (int back = 0; back <= 2; ++back) {
    const Neighbourhood<float, kPixels> scores(row(back));
    const Neighbourhood<int, kPixels> classes(class_row(back));
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
#pragma unroll
      for (int i = v; i <= v + 2; ++i) {
        if (classes.at[i] == own.at[v + 1]) lowest[v] = fminf(lowest[v], scores.at[i]);
      }
    }
  }
}

template <class Type, Layout kLayout, bool kPlain>
__global__ void __launch_bounds__(most_threads(kPlain), 2)
    erosion_grad_kernel(const __grid_constant__ ErosionGrad job, const __grid_constant__ RowsPlan plan,
                        const __grid_constant__ Counting counting) {
  constexpr int kPixels = Word<Type>::kElements;
  using Scores = Several<float, kPixels>;
  const Shape& shape = job.input.shape;
  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
  const Place place = Place::of<Type>(shape, plan.strips, plan.words_of_share);
  unsigned char* memory = shared_memory();
  const int pitch = ring_pitch(plan.strips, kPixels);
  auto* ring = reinterpret_cast<float*>(memory);
  const bool geodesic = !kPlain && is_geodesic(job);
  Staging<Type, kLayout> staging(job.input, job.grad, plan, place,
                                 memory + (geodesic ? 2 : 1) * kRing * pitch * static_cast<int>(sizeof(float)));
  Rows<Type, kLayout, false> rows(job.input, plan, place, staging);

  const float tau = job.tau[place.image];
  const float per_tau = 1.0f / tau;
  const float rise = job.radius == 0 ? kInf : job.slope * tau;
  const int position = place.x - place.left + kPixels;
  const bool has_place = position >= 0 && position + kPixels <= pitch;
  const bool writes = place.own && place.group == 0;
  const bool aligned = width % kPixels == 0 && reinterpret_cast<uintptr_t>(job.log_odds) % sizeof(Scores) == 0;
  const auto in_ring = [&](int i) { return (i & (kRing - 1)) * pitch + position; };
  const auto classes_of = [&](float* scores) { return reinterpret_cast<int*>(scores + kRing * pitch); };

  for (int i = thread_of_block(); i < kRing * pitch; i += threads_of_block()) ring[i] = kInf;

  typename Terms<kPixels>::Kept kept[kPixels];
  float kept_gain[kPixels];
  for (int v = 0; v < kPixels; ++v) kept[v] = {-1, 0.0f, 1.0f}, kept_gain[v] = 0.0f;
  const float* const class_weight =
      job.class_weight == nullptr ? nullptr : job.class_weight + place.image * shape.classes();
  Counts counts;
  const int own_rows = place.end - place.begin;
  int before = 0, now = 1, after = 2;  // stages of rows i - 1, i and i + 1
  staging.fetch(place.row(-1), now);

  for (int i = -1; i <= own_rows; ++i) {
    staging.arrive();
    if (i < own_rows) {
      staging.fetch(place.row(i + 1), after);
      rows.prefetch_labels(place.row(i + 1));
    }
    const int y = place.row(i);
    typename Terms<kPixels>::Kept keep[kPixels];
    float gain[kPixels];
    float front_before[kPixels], front_now[kPixels];
    Scores score;
    for (int v = 0; v < kPixels; ++v) {
      keep[v] = {-1, 0.0f, 1.0f}, gain[v] = 0.0f, score.at[v] = kInf, front_before[v] = front_now[v] = 0.0f;
    }
    if (y >= 0 && y < height) {
      if (geodesic) {
        Several<int, kPixels> predicted;
        rows.predict(y, now, predicted.at);
        // Beyond the image, where nobody puts a class, all confidences are +inf, which nobody needs to be kept from.
        if (place.group == 0 && has_place) {
          *reinterpret_cast<Several<int, kPixels>*>(classes_of(ring + in_ring(i))) = predicted;
        }
      }
      Scores log_odds;
      const Terms<kPixels> terms = rows.reduce(y, now, kPlain ? Confidence::kLabel : job.confidence, log_odds.at);
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
        const int64_t index = place.index(y);
        if (aligned && place.pixels > 0) {
          write_at_once(job.log_odds + index, log_odds);
        } else {
#pragma unroll
          for (int v = 0; v < kPixels; ++v) {
            if (v < place.pixels) job.log_odds[index + v] = log_odds.at[v];
          }
        }
        bool is_any_broken = false;
#pragma unroll
        for (int v = 0; v < kPixels; ++v) {
          counts.valid += terms.label[v] >= 0;
          counts.right += terms.right[v];
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
    if (place.group == 0 && has_place) *reinterpret_cast<Scores*>(ring + in_ring(i)) = score;
    __syncthreads();

    if (i > 0) {
      float weight[kPixels];
      for (int v = 0; v < kPixels; ++v) weight[v] = 0.0f;
      if (place.own) {
        const auto row = [&](int back) { return ring + in_ring(i - back); };
        float lowest[kPixels];
        if (geodesic) {
          find_lowest_of_class<kPixels>(row, [&](int back) { return classes_of(row(back)); }, lowest);
        } else {
          find_lowest<kPixels>(row, lowest);
        }
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
      rows.put(place.row(i - 1), before, kept, weight, job.targeted);
      staging.copy_out(place.row(i - 1), before);
    }
    // Added up here, where nobody has to wait for the log-odds of the step before any more.
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

cudaError_t launch_erosion_grad(const ErosionGrad& job, const Counting& counting, void* workspace,
                                cudaStream_t stream) {
  const Shape& shape = job.input.shape;
  if (shape.pixels() == 0) return count_nothing(shape, counting, stream);
  if (!is_one_pass(job)) return launch_erosion_grad_passes(job, counting, workspace, stream);
  return for_rows(job.input, job.grad, [&](auto type, auto layout) {
    using Type = decltype(type);
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int kPixels = Word<Type>::kElements;
    const auto kernel =
        is_plain(job) ? erosion_grad_kernel<Type, kLayout, true> : erosion_grad_kernel<Type, kLayout, false>;
    const int of_pixel = (is_geodesic(job) ? 2 : 1) * kRing * static_cast<int>(sizeof(float));
    const RowsNeeds needs{1, kStages, of_pixel, 2 * kPixels * of_pixel, most_threads(is_plain(job))};
    return launch_rows<Type, kLayout>(kernel, job, needs, stream, counting);
  });
}

}  // namespace eroseg::cuda
