// confidence, erosion_grad and pixel_grad of logits of another size than the labels.
//
// An interval is what lies between four neighbouring logits: the pixels of the labels that are interpolated from them.
// The logits are small and stay in the caches; the kernels are bound by arithmetic:
//   1. reduce: a thread takes a column of pixels in an interval, kRows of them at a time, and goes over their logits
//      once. It counts them, and leaves what their gradient needs (PixelTerms).
//   2. erode (erosion_grad only): a thread for each pixel, which turns the confidences around it into its weight.
//   3. spread: the transpose of the interpolation. A thread goes down the intervals of one column, for a few classes.
//      It interpolates the pixels once more, and adds their gradient up for the four logits around them. It keeps the
//      sums of the two logits below for the next interval, and hands those of the right over to its neighbour.
// No sum depends on how the work is cut, and its order is fixed.
//
// In spread a block has whole rows of intervals, or parts of rows where they have more than kThreads; a part begins
// with the interval before it, which makes 1/128 more work at most. A block also goes over the row of intervals above
// its own: 1 / cut.rows more work, with as many rows as leave every multiprocessor kBlocksWanted blocks.
#include <algorithm>

#include "counts.cuh"
#include "interpolated.cuh"

namespace eroseg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 2;  // blocks on a multiprocessor; with 3, some architectures would spill registers
constexpr int kRows = 4;
constexpr int kClasses = 4;
constexpr int64_t kBlocksWanted = 4;

__device__ __forceinline__ float exponential_of(float x) { return exp2_approx(x * kLog2E); }

// The sum of exponentials of logits, relative to the largest of them, as one pass over them finds it; -inf adds
// nothing, NaN makes the sum NaN.
template <bool kSquares>
struct ExponentialSum {
  float largest = -std::numeric_limits<float>::max(), sum = 0.0f;
  float squares = 0.0f;  // of the exponentials

  __device__ __forceinline__ void add(float z) {
    const float gap = z - largest, e = exponential_of(-fabsf(gap));
    const bool is_larger = gap > 0.0f;
    sum = is_larger ? fmaf(sum, e, 1.0f) : sum + e;
    if constexpr (kSquares) squares = is_larger ? fmaf(squares, e * e, 1.0f) : fmaf(e, e, squares);
    largest = fmaxf(largest, z);
  }
};

// What the reduction over the classes leaves of a pixel.
struct ReducedPixel {
  int label;         // -1 on void pixels
  bool finite;       // whether the log-odds are
  bool correct;      // whether the arg max is the label
  float largest;     // m
  float sum;         // S
  float norm;        // sum over c != y of (exp(z_c - m) / S)^2
  float log_odds;    // L
  float confidence;  // signed, of the wanted kind; +inf on void pixels, NaN where logits are not finite

  __device__ __forceinline__ bool weighs() const { return label >= 0 && finite; }

  __device__ __forceinline__ PixelTerms terms(float weight) const { return {largest, weight / sum, weight, label}; }

  __device__ __forceinline__ void count(bool front, float moved, Counts& counts) const {
    counts.valid += label >= 0;
    counts.correct += correct;
    counts.front += front;
    counts.movement += label >= 0 && !finite ? not_a_number() : moved;
  }
};

// A pixel in the pass over its logits. Of the classes but the label the largest logit is kept apart from the sum: the
// label may have to take its place there.
template <bool kSquares>
struct PixelPass {
  int label, top = 0;  // the lowest class with the largest logit
  float largest = -kInf, of_label = 0.0f;
  ExponentialSum<kSquares> rest;

  __device__ __forceinline__ void take(int c, float z) {
    const bool is_label = c == label;
    of_label = is_label ? z : of_label;
    const float other = is_label ? -kInf : z;
    const bool is_larger = other > largest;
    rest.add(is_larger ? largest : other);
    largest = is_larger ? other : largest;
    top = is_larger ? c : top;
  }

  __device__ __forceinline__ ReducedPixel reduced(int classes, Confidence kind) {
    ReducedPixel out;
    const float gap = of_label - largest, factor = exponential_of(rest.largest - largest);
    out.label = label;
    out.finite = absolute(largest) < kInf && absolute(of_label) < kInf && rest.sum == rest.sum;
    out.correct = out.weighs() && (gap > 0.0f || (gap == 0.0f && label < top));
    out.largest = largest;
    out.sum = fmaf(rest.sum, factor, 1.0f);
    out.norm = fmaf(rest.squares, factor * factor, 1.0f) / (out.sum * out.sum);
    out.log_odds = gap - log_positive(out.sum);
    out.confidence = kind == Confidence::kLabel && out.correct ? fmaxf(out.log_odds, 0.0f) : out.log_odds;
    if (kind == Confidence::kTop) {
      float log_odds = out.log_odds;
      if (!out.correct) {
        rest.add(of_label);
        log_odds = largest - rest.largest - log_positive(rest.sum);
      }
      const float top_confidence = fmaxf(0.0f, log_odds + log_positive(static_cast<float>(classes - 1)));
      out.confidence = out.correct ? top_confidence : -top_confidence;
    }
    if (!out.finite) out.confidence = not_a_number();
    if (label < 0) out.confidence = kInf;
    return out;
  }
};

// Calls f(image, pixel, reduced) for the pixels of a thread. A block takes kThreads columns of a row of intervals, and
// then others.
template <class Type, bool kSquares, class F>
__device__ __forceinline__ void reduce_pixels(const Input& input, Confidence kind, const F& f) {
  const int channels = static_cast<int>(input.shape.channels), classes = static_cast<int>(input.shape.classes());
  const int width = static_cast<int>(input.shape.width), across = (width + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(gridDim.x) / static_cast<int>(input.shape.batch);
  const int64_t image = static_cast<int>(blockIdx.x) / blocks;
  const Axis rows = input.rows();
  for (int64_t part = static_cast<int>(blockIdx.x) % blocks; part < across * input.logits.height; part += blocks) {
    const int row = static_cast<int>(part / across);
    const int x = static_cast<int>(part % across) * kThreads + static_cast<int>(threadIdx.x);
    if (x >= width) continue;
    const Tap column = input.columns().at(x);
    const AllCorners<Type> corners(input, image, row, static_cast<int>(column.index));
    const int end = static_cast<int>(rows.first_at(row + 1));
    for (int y = static_cast<int>(rows.first_at(row)); y < end; y += kRows) {
      PixelPass<kSquares> pixels[kRows];
      float next[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        int label[1];
        const int64_t index = image * input.shape.pixels() + (y + k) * width + x;
        read_labels(input.labels, classes, index, y + k < end ? 1 : 0, label);
        pixels[k].label = label[0];
        next[k] = rows.next(y + k, row);
      }
      if (channels < classes) {
#pragma unroll
        for (int k = 0; k < kRows; ++k) pixels[k].take(0, 0.0f);
      }
#pragma unroll 2
      for (int c = 0; c < channels; ++c) {
        float ends[2];
        corners(c).in_column(column.next, ends);
#pragma unroll
        for (int k = 0; k < kRows; ++k) pixels[k].take(c + classes - channels, between(ends[0], ends[1], next[k]));
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (y + k < end) f(image, (y + k) * width + x, pixels[k].reduced(classes, kind));
      }
    }
  }
}

template <class Type>
__global__ void __launch_bounds__(kThreads, kResident) confidence_kernel(const __grid_constant__ ConfidenceMap job) {
  reduce_pixels<Type, false>(job.input, job.confidence, [&](int64_t image, int pixel, const ReducedPixel& reduced) {
    job.out[image * job.input.shape.pixels() + pixel] = absolute(reduced.confidence);
  });
}

template <class Type>
__global__ void __launch_bounds__(kThreads, kResident)
    reduce_kernel(const __grid_constant__ PixelGrad job, const __grid_constant__ Counting counting, PixelTerms* terms) {
  const Shape& shape = job.input.shape;
  Counts counts;
  reduce_pixels<Type, true>(
      job.input, Confidence::kLogOdds, [&](int64_t image, int pixel, const ReducedPixel& reduced) {
        float weight = 0.0f;
        if (reduced.weighs()) {
          weight = method_weight(job.method, reduced.log_odds, job.method.targeted != reduced.correct, reduced.norm);
          if (job.class_weight != nullptr) weight *= job.class_weight[image * shape.classes() + reduced.label];
        }
        terms[image * shape.pixels() + pixel] = reduced.terms(job.method.targeted ? -weight : weight);
        reduced.count(reduced.label >= 0, 0.0f, counts);
      });
  add_up(counts, shape.batch, counting, shared_memory());
}

// The terms have the weight that a pixel has on the front.
template <class Type>
__global__ void __launch_bounds__(kThreads, kResident)
    reduce_kernel(const __grid_constant__ ErosionGrad job, const __grid_constant__ Counting counting,
                  PixelTerms* terms) {
  const Shape& shape = job.input.shape;
  Counts counts;
  reduce_pixels<Type, false>(job.input, job.confidence, [&](int64_t image, int pixel, const ReducedPixel& reduced) {
    const int64_t index = image * shape.pixels() + pixel;
    job.log_odds[index] = reduced.confidence;
    float weight = 0.0f;
    if (reduced.weighs()) {
      weight = job.direction == Direction::kCrossEntropy ? sigmoid(-reduced.log_odds) : 1.0f;
      if (job.class_weight != nullptr) weight *= job.class_weight[image * shape.classes() + reduced.label];
    }
    terms[index] = reduced.terms(job.targeted ? -weight : weight);
    const bool front = absolute(reduced.confidence) <= job.tau[image];
    const float lost = front && job.previous != nullptr ? job.previous[index] - reduced.confidence : 0.0f;
    reduced.count(front, job.targeted ? -lost : lost, counts);
  });
  add_up(counts, shape.batch, counting, shared_memory());
}

// A thread for each pixel. Radius 0 is radius 1 with a cone that rises to infinity.
__global__ void __launch_bounds__(kThreads) erode_kernel(const __grid_constant__ ErosionGrad job, PixelTerms* terms) {
  const int height = static_cast<int>(job.input.shape.height), width = static_cast<int>(job.input.shape.width);
  const int pixels = height * width, blocks = (pixels + kThreads - 1) / kThreads;
  const int64_t image = static_cast<int>(blockIdx.x) / blocks;
  const int pixel = static_cast<int>(blockIdx.x) % blocks * kThreads + static_cast<int>(threadIdx.x);
  if (pixel >= pixels) return;
  const float tau = job.tau[image];
  const float* const log_odds = job.log_odds + image * pixels;
  const int y = pixel / width, x = pixel % width;
  float lowest = kInf;  // NaN lends nothing
  for (int row = max(y - 1, 0); row <= min(y + 1, height - 1); ++row) {
    for (int column = max(x - 1, 0); column <= min(x + 1, width - 1); ++column) {
      lowest = fminf(lowest, absolute(log_odds[row * width + column]));
    }
  }
  const float rise = job.radius == 0 ? kInf : job.slope * tau;
  const float weight = front_weight(job.front, fminf(absolute(log_odds[pixel]), lowest + rise), tau);
  PixelTerms& own = terms[image * pixels + pixel];
  own.scale *= weight;
  own.weight *= weight;
}

// How the intervals of an image are cut into blocks: into `across` parts side by side, with a thread for each of
// `columns` and of `halo` before them, and `down` parts below each other; the classes into `class_blocks`.
struct Cut {
  int across, columns, halo, down, rows, class_blocks;
};

template <class Type>
__global__ void __launch_bounds__(kThreads, kResident)
    spread_kernel(const __grid_constant__ Input input, const __grid_constant__ Cut cut, const PixelTerms* terms,
                  void* grad) {
  using Element = typename Type::Element;
  const Shape& shape = input.shape;
  const Planes& logits = input.logits;
  const Axis rows = input.rows(), columns = input.columns();
  const int width = static_cast<int>(logits.width), height = static_cast<int>(logits.height);
  const int channels = static_cast<int>(shape.channels), first_class = channels == 1 ? 1 : 0;

  int block = static_cast<int>(blockIdx.x);
  const auto part_of = [&](int count) {
    const int part = block % count;
    block /= count;
    return part;
  };
  const int begin = part_of(cut.down) * cut.rows, end = min(begin + cut.rows, height);
  const int left = part_of(cut.across) * cut.columns, slot = static_cast<int>(threadIdx.x);
  const int own_end = min(left + cut.columns, width), column = left - cut.halo + slot;
  const int group = part_of(cut.class_blocks) * static_cast<int>(blockDim.y) + static_cast<int>(threadIdx.y);
  const int first = group * kClasses, count = min(channels - first, kClasses);
  const int64_t image = block;
  const bool works = column >= 0 && column < own_end && count > 0;
  const int x_begin = works ? static_cast<int>(columns.first_at(column)) : 0;
  const int x_end = works ? static_cast<int>(columns.first_at(column + 1)) : 0;
  terms += image * shape.pixels();
  auto* const out = static_cast<Element*>(grad) + image * channels * logits.pixels();
  const int threads = threads_of_block();
  // For the sums of two rows: a thread may be one ahead of its neighbour.
  auto* const handed = reinterpret_cast<float*>(shared_memory()) + thread_of_block();

  float above[kClasses][2] = {};  // sums of the logits on the left and on the right
  int row = max(begin - 1, 0), y_begin = static_cast<int>(rows.first_at(row));
  for (; row < end; ++row) {
    float below[kClasses][2] = {};
    Corners corners[kClasses] = {};
    if (works) {
      const AllCorners<Type> all(input, image, row, column);
#pragma unroll
      for (int k = 0; k < kClasses; ++k) corners[k] = all(min(first + k, channels - 1));
    }
    const int y_end = static_cast<int>(rows.first_at(row + 1));
    for (int x = x_begin; x < x_end; ++x) {
      const float next_column = columns.next(x, column);
      float ends[kClasses][2], sums[kClasses][2] = {};
#pragma unroll
      for (int k = 0; k < kClasses; ++k) corners[k].in_column(next_column, ends[k]);
      for (int y = y_begin; y < y_end; ++y) {
        const PixelTerms pixel = terms[y * static_cast<int>(shape.width) + x];
        if (pixel.weight == 0.0f) continue;
        const float next = rows.next(y, row);
#pragma unroll
        for (int k = 0; k < kClasses; ++k) {
          const float e = exponential_of(between(ends[k][0], ends[k][1], next) - pixel.largest);
          const float g = pixel.label == first_class + first + k ? -pixel.weight : e * pixel.scale;
          sums[k][0] = fmaf(g, 1.0f - next, sums[k][0]);
          sums[k][1] = fmaf(g, next, sums[k][1]);
        }
      }
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        above[k][0] = fmaf(sums[k][0], 1.0f - next_column, above[k][0]);
        above[k][1] = fmaf(sums[k][0], next_column, above[k][1]);
        below[k][0] = fmaf(sums[k][1], 1.0f - next_column, below[k][0]);
        below[k][1] = fmaf(sums[k][1], next_column, below[k][1]);
      }
    }
    y_begin = y_end;

    float* const handed_now = handed + row % 2 * kClasses * threads;
#pragma unroll
    for (int k = 0; k < kClasses; ++k) {
      // The last row and the last column stand for those behind them.
      if (row == height - 1) above[k][0] += below[k][0], above[k][1] += below[k][1];
      if (column == width - 1) above[k][0] += above[k][1];
      handed_now[k * threads] = above[k][1];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kClasses; ++k) {
      if (works && k < count && row >= begin && slot >= cut.halo) {
        const float sum = above[k][0] + (slot > 0 ? handed_now[k * threads - 1] : 0.0f);
        const int at = row * width + column, channel = first + k;
        out[logits.channels_last ? at * channels + channel : channel * height * width + at] = to_element<Type>(sum);
      }
      above[k][0] = below[k][0], above[k][1] = below[k][1];
    }
  }
}

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

template <class... Parameters, class... Arguments>
cudaError_t launch_reduce(void (*kernel)(Parameters...), const Input& input, cudaStream_t stream,
                          const Arguments&... arguments) {
  const Shape& shape = input.shape;
  const int64_t most = most_blocks({1, shape.channels, shape.height, shape.width});
  const int64_t blocks = std::min(input.logits.height * parts(shape.width, kThreads), most);
  return launch(kernel, shape.batch * blocks, dim3(kThreads), counts_bytes(kThreads), stream, arguments...);
}

template <class Type>
cudaError_t launch_spread(const Input& input, const PixelTerms* terms, void* grad, cudaStream_t stream) {
  const int64_t width = input.logits.width, height = input.logits.height;
  if (input.shape.batch * width * height == 0) return cudaSuccess;
  DeviceLimits device;
  const cudaError_t error = device_limits(&device);
  if (error != cudaSuccess) return error;
  const int64_t across = width <= kThreads ? 1 : parts(width, kThreads - 1), columns = parts(width, across);
  const int64_t halo = across > 1 ? 1 : 0, groups = parts(input.shape.channels, kClasses);
  const dim3 threads(static_cast<unsigned>(columns + halo),
                     static_cast<unsigned>(std::min(kThreads / (columns + halo), groups)));
  const int64_t class_blocks = parts(groups, threads.y), beside = input.shape.batch * class_blocks * across;
  const int64_t rows = parts(height, std::min(parts(kBlocksWanted * device.processors, beside), height));
  const int64_t down = parts(height, rows);
  const Cut cut{static_cast<int>(across), static_cast<int>(columns), static_cast<int>(halo),
                static_cast<int>(down),   static_cast<int>(rows),    static_cast<int>(class_blocks)};
  const int64_t shared = 2 * kClasses * static_cast<int64_t>(sizeof(float)) * threads.x * threads.y;
  return launch(spread_kernel<Type>, beside * down, threads, shared, stream, input, cut, terms, grad);
}

template <class Job>
cudaError_t launch_gradient(const Job& job, const Counting& counting, PixelTerms* terms, cudaStream_t stream) {
  return for_type(job.input.logits.type, [&](auto type) {
    using Type = decltype(type);
    const Shape& shape = job.input.shape;
    void (*const kernel)(Job, Counting, PixelTerms*) = reduce_kernel<Type>;
    cudaError_t error = shape.pixels() == 0 ? count_nothing(shape, counting, stream)
                                            : launch_reduce(kernel, job.input, stream, job, counting, terms);
    if constexpr (std::is_same_v<Job, ErosionGrad>) {
      const int64_t blocks = shape.batch * parts(shape.pixels(), kThreads);
      if (error == cudaSuccess) error = launch(erode_kernel, blocks, dim3(kThreads), 0, stream, job, terms);
    }
    return error != cudaSuccess ? error : launch_spread<Type>(job.input, terms, job.grad, stream);
  });
}

}  // namespace

cudaError_t launch_interpolated(const ErosionGrad& job, const Counting& counting, PixelTerms* workspace,
                                cudaStream_t stream) {
  return launch_gradient(job, counting, workspace, stream);
}

cudaError_t launch_interpolated(const PixelGrad& job, const Counting& counting, PixelTerms* workspace,
                                cudaStream_t stream) {
  return launch_gradient(job, counting, workspace, stream);
}

cudaError_t launch_interpolated(const ConfidenceMap& job, cudaStream_t stream) {
  return for_type(job.input.logits.type,
                  [&](auto type) { return launch_reduce(confidence_kernel<decltype(type)>, job.input, stream, job); });
}

}  // namespace eroseg::cuda
