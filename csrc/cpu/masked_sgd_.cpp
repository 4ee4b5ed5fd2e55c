// masked_sgd_: the operations of torch.optim.SGD's for-loop in their order. In float32 each is rounded as torch rounds it
// (`add` with a factor is one fused operation there, and so it is here); bfloat16 is rounded once, when it is stored.
#include "kernels.h"
#include "lists.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

template <class T>
void step(const int64_t* table, int64_t count, double rate, double momentum, double weight_decay, double dampening,
          int64_t nesterov, int64_t maximize, int64_t first_step, int64_t threads) {
  const F step_size = set1(float(rate)), mu = set1(float(momentum)), decay = set1(float(weight_decay));
  const F share = set1(float(1.0 - dampening)), zero = set1(0.0f);
  const bool decays = weight_decay != 0.0, moves = momentum != 0.0;
  each_piece(table, 5, count, threads, [=](const int64_t* row, int64_t begin, int64_t end) {
    T* param = pointer<T>(row[0]);
    const T* grad = pointer<const T>(row[1]);
    T* momenta = pointer<T>(row[2]);
    // Momenta that hold nothing yet become 0 where frozen.
    const bool everywhere = moves && first_step;
    free_vectors(pointer<const uint8_t>(row[3]), begin, end, everywhere, [=](int64_t e, auto all, M free) {
      const F p = load(param + e, all);
      F step = load(grad + e, all);
      if (maximize) step = -step;
      if (decays) step = fma_once(p, decay, step);
      if (moves) {
        // Frozen lanes are written back as they are: storing some lanes alone is slower.
        const F old = first_step ? zero : load(momenta + e, all);
        const F buf = first_step ? step : fma_once(step, share, old * mu);
        store(momenta + e, blend(free, rounded<T>(buf), old), all);
        step = nesterov ? fma_once(buf, mu, step) : buf;
      }
      store(param + e, blend(free, rounded<T>(fma_once(step, step_size, p)), p), all);
    });
  });
}

}  // namespace

void masked_sgd_(const int64_t* table, int64_t count, int64_t kind, double rate, double momentum, double weight_decay,
                 double dampening, int64_t nesterov, int64_t maximize, int64_t first_step, int64_t threads) {
  auto* const of_kind = kind == 0 ? step<float> : step<uint16_t>;
  of_kind(table, count, rate, momentum, weight_decay, dampening, nesterov, maximize, first_step, threads);
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
