// linf_step_ on the CPU: vectors of an image's elements, in the order of memory. Part of kernels_impl.h.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

void linf_step(const Step& step, int64_t image, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = end - i < kLanes ? end - i : kLanes, first = image * step.elements() + i;
    F x_adv{}, x{}, grad{};
    if (n == kLanes) {
      x_adv = load<F>(step.x_adv + first), x = load<F>(step.x + first), grad = load<F>(step.grad + first);
    } else {
      std::memcpy(&x_adv, step.x_adv + first, n * sizeof(float));
      std::memcpy(&x, step.x + first, n * sizeof(float));
      std::memcpy(&grad, step.grad + first, n * sizeof(float));
    }
    F stepped = linf_stepped(x_adv, x, grad, step.eps, step.alpha, step.low, step.high);
    if (step.mask != nullptr) {
      I inside{};
      for (int lane = 0; lane < n; ++lane) inside[lane] = step.is_inside(image, i + lane) ? -1 : 0;
      stepped = inside ? stepped : x_adv;
    }
    std::memcpy(step.x_adv + first, &stepped, n * sizeof(float));
  }
}

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
