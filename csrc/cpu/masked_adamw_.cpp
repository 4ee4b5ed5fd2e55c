// masked_adamw_: the update of torch.optim.AdamW, one pass over weight, gradient, moments and bits. Computed in float32
// and rounded when it is stored; sqrt and division are IEEE's (torch's sqrt on the CPU is not), and what depends on
// t alone multiplies, so that an element costs one division and one root.
#include "kernels.h"
#include "lists.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

template <class T>
void step(const int64_t* table, const double* scalars, int64_t count, double beta1, double beta2, double eps,
          int64_t maximize, int64_t threads) {
  // As torch's lerp: from the nearer end.
  const bool near = beta1 > 0.5;
  const F toward = set1(float(near ? 1.0 - beta1 : -beta1));
  const F keep2 = set1(float(beta2)), take2 = set1(float(1.0 - beta2)), small = set1(float(eps));
  each_piece(table, 8, count, threads, [=](const int64_t* row, int64_t begin, int64_t end, int64_t at) {
    T *param = pointer<T>(row[0]), *first = pointer<T>(row[2]), *second = pointer<T>(row[3]);
    T* largest = pointer<T>(row[4]);
    const T* grad = pointer<const T>(row[1]);
    const uint8_t* frozen = pointer<const uint8_t>(row[5]);
    const double* own = scalars + 3 * ((row - table) / 8);
    const F shrink = set1(float(own[0])), inverse_root = set1(float(own[1])), step_size = set1(float(own[2]));
    const auto update = [=](auto* params, const auto* grads, int64_t behind, int64_t e, auto all, M free) {
      const int64_t s = behind + e;
      const F p = load(params + e, all), m_old = load(first + s, all), v_old = load(second + s, all);
      F g = load(grads + e, all);
      if (maximize) g = -g;
      const F m = fma_once(toward, g - m_old, near ? m_old : g);
      F v = fma_once(take2 * g, g, keep2 * v_old);
      // Frozen lanes are written back as they are: storing some lanes alone is slower.
      store(first + s, blend(free, rounded<T>(m), m_old), all);
      store(second + s, blend(free, rounded<T>(v), v_old), all);
      if (largest != nullptr) {
        const F before = load(largest + s, all);
        v = larger(before, v);
        store(largest + s, blend(free, rounded<T>(v), before), all);
      }
      const F quotient = m / fma_once(root(v), inverse_root, small);
      store(params + e, blend(free, rounded<T>(fma_once(step_size, quotient, p * shrink)), p), all);
    };
    if (row[6] != row[7])
      return gathered_vectors(param, grad, frozen, begin, end,
                              [=](float* p, const float* g, int64_t behind, int64_t i, auto all, M free) {
                                update(p, g, at + behind, i, all, free);
                              });
    free_vectors(frozen, begin, end, false,
                 [=](int64_t e, auto all, M free) { update(param, grad, 0, e, all, free); });
  });
}

}  // namespace

void masked_adamw_(const int64_t* table, const double* scalars, int64_t count, int64_t kind, double beta1, double beta2,
                   double eps, int64_t maximize, int64_t threads) {
  auto* const of_kind = kind == 0 ? step<float> : step<uint16_t>;
  of_kind(table, scalars, count, beta1, beta2, eps, maximize, threads);
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
