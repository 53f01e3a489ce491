// The operators for CUDA tensors: launches on torch's current stream of their device.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <utility>

#include "../operators.h"
#include "launchers.h"

namespace eroseg::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// libtorch_cuda has this function, but the module must build, and load, beside a torch without it.
cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const auto getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(getter != nullptr && getter(device, &stream) == AOTI_TORCH_SUCCESS,
                  "torch does not tell its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// The runtime also records the error until cudaGetLastError is called; later checks must not report this one.
void launched(cudaError_t error, const char* op) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA kernel was not launched: ", cudaGetErrorString(error));
}

// The retirement counter of launches on a stream. Each stream has one, since its launches do not overlap; none if all
// are taken.
std::optional<int> counter_of(int32_t device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<std::pair<int32_t, cudaStream_t>, int> numbers;
  static std::map<int32_t, int> taken;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = numbers.try_emplace({device, stream}, taken[device]);
  if (is_new) ++taken[device];
  return found->second < kRetirementCounters ? std::optional(found->second) : std::nullopt;
}

class Backend {
 public:
  explicit Backend(const Tensor& first)
      : first_(first), device_(first.get_device_index()), guard_(device_), stream_(current_stream(device_)) {}

  Tensor erosion_grad(const ErosionGrad& job) const {
    const Counted counted(*this, job.input.shape);
    const Tensor workspace = bytes(terms_of(job.input) * static_cast<int64_t>(sizeof(PixelTerms)));
    auto* terms = static_cast<PixelTerms*>(workspace.mutable_data_ptr());
    launched(launch_erosion_grad(job, counted.counting, terms, stream_), "erosion_grad");
    return counted.stats;
  }

  Tensor pixel_grad(const PixelGrad& job) const {
    const Counted counted(*this, job.input.shape);
    const Tensor workspace = bytes(terms_of(job.input) * static_cast<int64_t>(sizeof(PixelTerms)));
    auto* terms = static_cast<PixelTerms*>(workspace.mutable_data_ptr());
    launched(launch_pixel_grad(job, counted.counting, terms, stream_), "pixel_grad");
    return counted.stats;
  }

  void confidence(const ConfidenceMap& job) const { launched(launch_confidence(job, stream_), "confidence"); }

  void kth_value(const KthValue& job) const {
    const Tensor workspace = bytes(selections_of(job.batch, job.count) * kBytesOfSelection);
    launched(launch_kth_value(job, workspace.mutable_data_ptr(), stream_), "kth_value");
  }

  void next_tau(const NextTau& job) const {
    const Tensor workspace = bytes(selections_of(job.batch, 1) * kBytesOfSelection);
    launched(launch_next_tau(job, workspace.mutable_data_ptr(), stream_), "next_tau");
  }

  void linf_step(const Step& step) const { launched(launch_linf_step(step, stream_), "linf_step_"); }

  void confusion(const Confusion& job) const { launched(launch_confusion(job, stream_), "confusion"); }

 private:
  // What a Counting points to. The tensors live until the launch, and the allocator keeps their memory for its stream.
  struct Counted {
    Counted(const Backend& on, const Shape& shape)
        : stats(torch::stable::new_empty(on.first_, {shape.batch, 4}, ScalarType::Double)),
          partials(torch::stable::new_empty(on.first_, {most_blocks(shape), 4}, ScalarType::Double)) {
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
      launched(cudaStreamIsCapturing(on.stream_, &status), "counting");
      const auto number = status == cudaStreamCaptureStatusNone ? counter_of(on.device_, on.stream_) : std::nullopt;
      unsigned* retired = nullptr;
      if (number.has_value()) {
        launched(retirement_counters(&retired), "counting");
        retired += *number;
      } else {
        // A CUDA graph gets one of its own, which it sets to 0: it may be replayed on any stream.
        own_counter = torch::stable::new_zeros(on.first_, {1}, ScalarType::Int);
        retired = static_cast<unsigned*>(own_counter->mutable_data_ptr());
      }
      counting = {static_cast<double*>(stats.mutable_data_ptr()), static_cast<double*>(partials.mutable_data_ptr()),
                  retired};
    }
    Tensor stats, partials;
    MaybeTensor own_counter;
    Counting counting{};
  };

  Tensor bytes(int64_t count) const { return torch::stable::new_empty(first_, {count}, ScalarType::Byte); }

  const Tensor& first_;
  int32_t device_;
  DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace
}  // namespace eroseg::cuda

STABLE_TORCH_LIBRARY_IMPL(eroseg, CUDA, m) { eroseg::implement<eroseg::cuda::Backend>(m); }
