// The operators for CUDA tensors: checks the arguments, brings what the launchers need, calls them on torch's stream.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "../arguments.h"
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

// Makes a tensor's device the current one, and knows its stream.
class On {
 public:
  explicit On(const Tensor& tensor) : guard_(tensor.get_device_index()), device_(tensor.get_device_index()) {}
  int32_t device() const { return device_; }
  cudaStream_t stream() const { return current_stream(device_); }

 private:
  DeviceGuard guard_;
  int32_t device_;
};

// The runtime also keeps an error for whoever asks for the last one; nobody else is to find this one there.
void launched(cudaError_t error, const char* op) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA kernel was not launched: ", cudaGetErrorString(error));
}

// A kernel follows the pointers that it is given: a tensor of another device must not get so far.
void check_device(const Tensor& tensor, const On& on, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == on.device(), op, ": ", name,
                  " is on another device than its companions");
}

void check_device(const MaybeTensor& tensor, const On& on, const char* op, const char* name) {
  if (tensor.has_value()) check_device(*tensor, on, op, name);
}

// Offsets inside an image are of 32 bits.
void check_size(const Shape& shape, const char* op) {
  const int64_t elements = shape.channels * shape.pixels();
  STD_TORCH_CHECK(elements < (int64_t{1} << 31), op, ": the logits of one image have ", elements,
                  " elements, wanted fewer than 2^31");
}

// Which retirement counter launches on a stream have: one each, since launches on a stream do not overlap; none if all
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

// What a Counting points to. The tensors live until the launch, and the allocator keeps their memory for its stream.
class Counted {
 public:
  Counted(const Tensor& like, const Shape& shape, const On& on)
      : stats(torch::stable::new_empty(like, {shape.batch, 4}, ScalarType::Double)),
        partials_(torch::stable::new_empty(like, {most_blocks(shape), 4}, ScalarType::Double)) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    launched(cudaStreamIsCapturing(on.stream(), &status), "counting");
    const auto number = status == cudaStreamCaptureStatusNone ? counter_of(on.device(), on.stream()) : std::nullopt;
    if (number.has_value()) {
      launched(retirement_counters(&retired_), "counting");
      retired_ += *number;
    } else {
      // A CUDA graph gets one of its own, which it sets to 0: it may be replayed on any stream.
      own_ = torch::stable::new_zeros(like, {1}, ScalarType::Int);
      retired_ = static_cast<unsigned*>(own_->mutable_data_ptr());
    }
  }
  Counting counting() const {
    return {static_cast<double*>(stats.mutable_data_ptr()), static_cast<double*>(partials_.mutable_data_ptr()),
            retired_};
  }
  const Tensor stats;

 private:
  Tensor partials_;
  MaybeTensor own_;
  unsigned* retired_ = nullptr;
};

std::tuple<Tensor, Tensor> erosion_grad(const Tensor& logits, const Tensor& labels, const Tensor& tau,
                                        const MaybeTensor& previous, const MaybeTensor& class_weight,
                                        const Tensor& grad, int64_t ignore_index, int64_t confidence, int64_t front,
                                        int64_t direction, int64_t radius, double slope, int64_t within,
                                        bool targeted) {
  constexpr const char* kOp = "erosion_grad";
  const On on(logits);
  ErosionGrad job = checked_erosion_grad(logits, labels, tau, previous, class_weight, grad, ignore_index, confidence,
                                         front, direction, radius, slope, within, targeted);
  check_size(job.input.shape, kOp);
  check_device(labels, on, kOp, "labels");
  check_device(tau, on, kOp, "tau");
  check_device(previous, on, kOp, "previous");
  check_device(class_weight, on, kOp, "class_weight");
  check_device(grad, on, kOp, "grad");
  const Shape& shape = job.input.shape;
  Tensor log_odds = torch::stable::new_empty(logits, {shape.batch, shape.height, shape.width}, ScalarType::Float);
  job.log_odds = static_cast<float*>(log_odds.mutable_data_ptr());
  const Counted counted(logits, shape, on);
  MaybeTensor workspace;
  if (!is_one_pass(job)) workspace = torch::stable::new_empty(logits, {bytes_of_passes(job)}, ScalarType::Byte);
  void* memory = workspace.has_value() ? workspace->mutable_data_ptr() : nullptr;
  launched(launch_erosion_grad(job, counted.counting(), memory, on.stream()), kOp);
  return {log_odds, counted.stats};
}

Tensor pixel_grad(const Tensor& logits, const Tensor& labels, const MaybeTensor& class_weight, const Tensor& grad,
                  int64_t method, double progress, int64_t ignore_index, bool targeted, double q) {
  constexpr const char* kOp = "pixel_grad";
  const On on(logits);
  const PixelGrad job =
      checked_pixel_grad(logits, labels, class_weight, grad, method, progress, ignore_index, targeted, q);
  check_size(job.input.shape, kOp);
  check_device(labels, on, kOp, "labels");
  check_device(class_weight, on, kOp, "class_weight");
  check_device(grad, on, kOp, "grad");
  const Counted counted(logits, job.input.shape, on);
  launched(launch_pixel_grad(job, counted.counting(), on.stream()), kOp);
  return counted.stats;
}

Tensor confidence(const Tensor& logits, const Tensor& labels, int64_t ignore_index, int64_t kind) {
  constexpr const char* kOp = "confidence";
  const On on(logits);
  ConfidenceMap job{};
  job.input = checked_input(logits, labels, ignore_index, kOp);
  const Shape& shape = job.input.shape;
  check_size(shape, kOp);
  check_device(labels, on, kOp, "labels");
  Tensor out = torch::stable::new_empty(logits, {shape.batch, shape.height, shape.width}, ScalarType::Float);
  job.confidence = checked_choice<Confidence>(kind, 2, kOp, "confidence");
  job.out = static_cast<float*>(out.mutable_data_ptr());
  launched(launch_confidence(job, on.stream()), kOp);
  return out;
}

Tensor selection_workspace(const Tensor& like, int64_t batch, int64_t count) {
  return torch::stable::new_empty(like, {selections_of(batch, count) * kBytesOfSelection}, ScalarType::Byte);
}

Tensor kth_value(const Tensor& scores, const Tensor& k, const MaybeTensor& valid) {
  constexpr const char* kOp = "kth_value";
  const On on(scores);
  check_kth_value(scores, k, valid);
  check_device(k, on, kOp, "k");
  check_device(valid, on, kOp, "valid");
  const int64_t batch = scores.size(0), n = scores.size(1), count = k.size(1);
  Tensor out = torch::stable::new_empty(scores, {batch, count}), workspace = selection_workspace(scores, batch, count);
  launched(launch_kth_value(static_cast<const float*>(scores.const_data_ptr()), data_or_null<bool>(valid), batch, n,
                            static_cast<const int64_t*>(k.const_data_ptr()), count,
                            static_cast<float*>(out.mutable_data_ptr()), workspace.mutable_data_ptr(), on.stream()),
           kOp);
  return out;
}

Tensor next_tau(const Tensor& log_odds, const Tensor& stats, int64_t steps_left, double reach, double front_min,
                double front_max) {
  constexpr const char* kOp = "next_tau";
  const On on(log_odds);
  const TauSettings settings = checked_next_tau(log_odds, stats, steps_left, reach, front_min, front_max);
  check_device(stats, on, kOp, "stats");
  const int64_t batch = log_odds.size(0), n = log_odds.size(1) * log_odds.size(2);
  Tensor tau = torch::stable::new_empty(log_odds, {batch}), workspace = selection_workspace(log_odds, batch, 1);
  launched(launch_next_tau(static_cast<const float*>(log_odds.const_data_ptr()),
                           static_cast<const double*>(stats.const_data_ptr()), batch, n, settings,
                           static_cast<float*>(tau.mutable_data_ptr()), workspace.mutable_data_ptr(), on.stream()),
           kOp);
  return tau;
}

Tensor erode(const Tensor& scores, const MaybeTensor& valid, int64_t radius, const Tensor& cone,
             const MaybeTensor& predicted) {
  constexpr const char* kOp = "erode";
  const On on(scores);
  const Erode job = checked_erode(scores, valid, radius, cone, predicted);
  check_device(valid, on, kOp, "valid");
  check_device(cone, on, kOp, "cone");
  check_device(predicted, on, kOp, "predicted");
  Tensor out = torch::stable::new_empty(scores, {scores.size(0), job.height, job.width});
  launched(launch_erode(job, scores.size(0), static_cast<const float*>(scores.const_data_ptr()), false,
                        data_or_null<bool>(valid), data_or_null<int32_t>(predicted),
                        static_cast<const float*>(cone.const_data_ptr()), 1.0f,
                        static_cast<float*>(out.mutable_data_ptr()), on.stream()),
           kOp);
  return out;
}

Step step_on(const On& on, const Tensor& x_adv, const Tensor& x, const Tensor& grad, const MaybeTensor& mask,
             double eps, double alpha, double low, double high, const char* op) {
  const Step step = checked_step(x_adv, x, grad, mask, eps, alpha, low, high, op);
  check_device(x, on, op, "x");
  check_device(grad, on, op, "grad");
  check_device(mask, on, op, "mask");
  return step;
}

void linf_step_(const Tensor& x_adv, const Tensor& x, const Tensor& grad, double eps, double alpha, double low,
                double high, const MaybeTensor& mask) {
  const On on(x_adv);
  const Step step = step_on(on, x_adv, x, grad, mask, eps, alpha, low, high, "linf_step_");
  if (x_adv.numel() > 0) launched(launch_linf_step(step, x_adv.size(0), on.stream()), "linf_step_");
}

void l2_step_(const Tensor& x_adv, const Tensor& x, const Tensor& grad, double eps, double alpha, double low,
              double high, const MaybeTensor& mask) {
  const On on(x_adv);
  const Step step = step_on(on, x_adv, x, grad, mask, eps, alpha, low, high, "l2_step_");
  if (x_adv.numel() == 0) return;
  const int64_t batch = x_adv.size(0);
  Tensor sums = torch::stable::new_empty(x_adv, {batch, 2, kSumsOfImage}, ScalarType::Double);
  launched(launch_l2_step(step, batch, eps, alpha, static_cast<double*>(sums.mutable_data_ptr()), on.stream()),
           "l2_step_");
}

Tensor confusion(const Tensor& prediction, const Tensor& labels, int64_t classes, int64_t ignore_index) {
  constexpr const char* kOp = "confusion";
  const On on(prediction);
  const Confusion job = checked_confusion(prediction, labels, classes, ignore_index);
  check_size(job.input.shape, kOp);
  check_device(labels, on, kOp, "labels");
  Tensor counts = torch::stable::new_zeros(prediction, {classes, classes}, ScalarType::Long);
  launched(launch_confusion(job, static_cast<unsigned long long*>(counts.mutable_data_ptr()), on.stream()), kOp);
  return counts;
}

}  // namespace
}  // namespace eroseg::cuda

STABLE_TORCH_LIBRARY_IMPL(eroseg, CUDA, m) {
  m.impl("erosion_grad", TORCH_BOX(&eroseg::cuda::erosion_grad));
  m.impl("pixel_grad", TORCH_BOX(&eroseg::cuda::pixel_grad));
  m.impl("confidence", TORCH_BOX(&eroseg::cuda::confidence));
  m.impl("kth_value", TORCH_BOX(&eroseg::cuda::kth_value));
  m.impl("next_tau", TORCH_BOX(&eroseg::cuda::next_tau));
  m.impl("erode", TORCH_BOX(&eroseg::cuda::erode));
  m.impl("linf_step_", TORCH_BOX(&eroseg::cuda::linf_step_));
  m.impl("l2_step_", TORCH_BOX(&eroseg::cuda::l2_step_));
  m.impl("confusion", TORCH_BOX(&eroseg::cuda::confusion));
}
