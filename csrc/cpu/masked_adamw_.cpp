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
  each_piece(table, 7, count, threads, [=](const int64_t* row, int64_t begin, int64_t end) {
    T* param = pointer<T>(row[0]);
    const T* grad = pointer<const T>(row[1]);
    T* first = pointer<T>(row[2]);
    T* second = pointer<T>(row[3]);
    T* largest = pointer<T>(row[4]);
    const double* own = scalars + 3 * ((row - table) / 7);
    const F shrink = set1(float(own[0])), inverse_root = set1(float(own[1])), step_size = set1(float(own[2]));
    free_vectors(pointer<const uint8_t>(row[5]), begin, end, false, [=](int64_t e, auto all, M free) {
      const F p = load(param + e, all), m_old = load(first + e, all), v_old = load(second + e, all);
      F g = load(grad + e, all);
      if (maximize) g = -g;
      const F m = fma_once(toward, g - m_old, near ? m_old : g);
      F v = fma_once(take2 * g, g, keep2 * v_old);
      // Frozen lanes are written back as they are: storing some lanes alone is slower.
      store(first + e, blend(free, rounded<T>(m), m_old), all);
      store(second + e, blend(free, rounded<T>(v), v_old), all);
      if (largest != nullptr) {
        const F before = load(largest + e, all);
        v = larger(before, v);
        store(largest + e, blend(free, rounded<T>(v), before), all);
      }
      const F quotient = m / fma_once(root(v), inverse_root, small);
      store(param + e, blend(free, rounded<T>(fma_once(step_size, quotient, p * shrink)), p), all);
    });
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
