// The CUDA kernels compiled for the host, for pytest; tests/cuda_kernels.py builds it and gives it the functions of
// ops/fused.py. Tensors come as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launchers.h"
#include "cuda/platform.cuh"

namespace py = pybind11;
using namespace eroseg;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("the launcher returned error " + std::to_string(error));
}

Input input_of(const std::vector<int64_t>& logits_shape, uintptr_t logits, int type, bool channels_last,
               const std::vector<int64_t>& labels_shape, uintptr_t labels, int label_type, int64_t ignore_index,
               bool align_corners) {
  return {{logits_shape[0], logits_shape[1], labels_shape[1], labels_shape[2]},
          {at<void>(logits), static_cast<FloatType>(type), channels_last, logits_shape[2], logits_shape[3]},
          {at<void>(labels), static_cast<LabelType>(label_type), ignore_index},
          align_corners};
}

// The retirement counter is kept between calls, as the operators keep theirs: every launch has to leave it at 0.
class Summing {
 public:
  Summing(const Shape& shape, uintptr_t stats) : partials_(cuda::most_blocks(shape) * 4 + 1, -1.0), stats_(stats) {}
  cuda::Counting counting() {
    check(cuda::retirement_counters(&retired_));
    return {at<double>(stats_), partials_.data(), retired_};
  }
  ~Summing() noexcept(false) {
    if (*retired_ != 0) throw std::logic_error("a launch left its retirement counter at another number than 0");
  }

 private:
  std::vector<double> partials_;
  uintptr_t stats_;
  unsigned* retired_ = nullptr;
};

// Kernels with a fault each, to show that cuda_on_host.h notices it.
enum class Fault { kNone, kMissingBarrier, kBarrierOfSome, kBeyondSharedMemory };

// Each thread takes its neighbour's number through shared memory.
void rotate_kernel(Fault fault, int* out) {
  auto* shared = reinterpret_cast<int*>(cuda::shared_memory());
  const int self = cuda::thread_of_block(), all = cuda::threads_of_block();
  shared[fault == Fault::kBeyondSharedMemory ? self + 1 : self] = self;
  if (fault != Fault::kMissingBarrier && !(fault == Fault::kBarrierOfSome && self == 3)) __syncthreads();
  out[self] = shared[(self + 1) % all];
}

}  // namespace

PYBIND11_MODULE(cuda_kernels_module, m) {
  py::class_<Input>(m, "Input").def(py::init(&input_of));
  m.def("set_machine", [](unsigned seed, int processors, int64_t shared_of_processor) {
    cuda_on_host::machine().order.seed(seed);
    cuda_on_host::machine().processors = processors;
    cuda_on_host::machine().shared_of_processor = shared_of_processor;
    cuda_on_host::machine().shared_of_kernel.clear();
  });
  m.def("shared_limits", [] {
    std::vector<int64_t> limits;
    for (const auto& [kernel, bytes] : cuda_on_host::machine().shared_of_kernel) limits.push_back(bytes);
    return limits;
  });
  m.def("rotate", [](int fault) {
    std::vector<int> out(64);
    check(cuda::launch(rotate_kernel, 1, dim3(64), 64 * sizeof(int), nullptr, static_cast<Fault>(fault), out.data()));
    return out;
  });
  m.def("erosion_grad", [](const Input& input, uintptr_t tau, uintptr_t previous, uintptr_t class_weight,
                           uintptr_t grad, uintptr_t log_odds, uintptr_t stats, int confidence, int front,
                           int direction, int radius, float slope, bool targeted) {
    const ErosionGrad job{input,
                          at<float>(tau),
                          at<float>(previous),
                          at<float>(class_weight),
                          static_cast<Confidence>(confidence),
                          static_cast<Front>(front),
                          static_cast<Direction>(direction),
                          radius,
                          slope,
                          targeted,
                          at<void>(grad),
                          at<float>(log_odds)};
    Summing summing(input.shape, stats);
    std::vector<cuda::PixelTerms> workspace(cuda::terms_of(input), {NAN, NAN, NAN, 0});
    check(cuda::launch_erosion_grad(job, summing.counting(), workspace.data(), nullptr));
  });
  m.def("pixel_grad", [](const Input& input, uintptr_t class_weight, uintptr_t grad, uintptr_t stats, int method,
                         bool targeted, float lambda, float q_minus_one) {
    const PixelGrad job{
        input, {static_cast<Method>(method), targeted, lambda, q_minus_one}, at<float>(class_weight), at<void>(grad)};
    Summing summing(input.shape, stats);
    std::vector<cuda::PixelTerms> workspace(cuda::terms_of(input), {NAN, NAN, NAN, 0});
    check(cuda::launch_pixel_grad(job, summing.counting(), workspace.data(), nullptr));
  });
  m.def("confidence", [](const Input& input, int kind, uintptr_t out) {
    check(cuda::launch_confidence({input, static_cast<Confidence>(kind), at<float>(out)}, nullptr));
  });
  m.def("confusion", [](const Input& input, uintptr_t prediction, int64_t classes, uintptr_t counts) {
    check(cuda::launch_confusion({input, at<int64_t>(prediction), classes, at<int64_t>(counts)}, nullptr));
  });
  m.def("kth_value",
        [](uintptr_t scores, uintptr_t valid, int64_t batch, int64_t n, uintptr_t k, int64_t count, uintptr_t out) {
          std::vector<unsigned char> workspace(cuda::selections_of(batch, count) * cuda::kBytesOfSelection, 0xff);
          const KthValue job{{at<float>(scores), at<bool>(valid), batch, n}, at<int64_t>(k), count, at<float>(out)};
          check(cuda::launch_kth_value(job, workspace.data(), nullptr));
        });
  m.def("next_tau", [](uintptr_t log_odds, uintptr_t stats, int64_t batch, int64_t n, int64_t steps_left, double reach,
                       double front_min, double front_max, uintptr_t tau) {
    std::vector<unsigned char> workspace(cuda::selections_of(batch, 1) * cuda::kBytesOfSelection, 0xff);
    const NextTau job{{at<float>(log_odds), nullptr, batch, n},
                      at<double>(stats),
                      {steps_left, reach, front_min, front_max},
                      at<float>(tau)};
    check(cuda::launch_next_tau(job, workspace.data(), nullptr));
  });
  m.def("linf_step", [](uintptr_t x_adv, uintptr_t x, uintptr_t grad, uintptr_t mask, int64_t batch, int64_t channels,
                        int64_t pixels, bool channels_last, float eps, float alpha, float low, float high) {
    const Step step{at<float>(x_adv),
                    at<float>(x),
                    at<float>(grad),
                    at<bool>(mask),
                    batch,
                    channels,
                    pixels,
                    channels_last,
                    eps,
                    alpha,
                    low,
                    high};
    check(cuda::launch_linf_step(step, nullptr));
  });
}
