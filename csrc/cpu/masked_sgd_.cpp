// masked_sgd_: one step of free entries (sgd.h); bfloat16 is rounded once, when it is stored.
#include "kernels.h"
#include "lists.h"
#include "sgd.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

template <class T>
void step(const int64_t* table, int64_t count, double rate, double momentum, double weight_decay, double dampening,
          int64_t nesterov, int64_t maximize, int64_t first_step, int64_t threads) {
  const Sgd sgd(rate, momentum, weight_decay, dampening, nesterov, maximize, first_step);
  const F zero = set1(0.0f);
  const auto update = [=](auto* param, const auto* grad, T* momenta, int64_t e, auto all, M free) {
    const F p = load(param + e, all);
    const F old = sgd.moves && !sgd.first ? load(momenta + e, all) : zero;
    F buf = old;
    const F moved = sgd(p, load(grad + e, all), buf);
    // Frozen lanes are written back as they are: storing some lanes alone is slower.
    if (sgd.moves) store(momenta + e, blend(free, rounded<T>(buf), old), all);
    store(param + e, blend(free, rounded<T>(moved), p), all);
  };
  each_piece(table, 6, count, threads, [=](const int64_t* row, int64_t begin, int64_t end, int64_t at) {
    T *param = pointer<T>(row[0]), *momenta = pointer<T>(row[2]);
    const T* grad = pointer<const T>(row[1]);
    const uint8_t* frozen = pointer<const uint8_t>(row[3]);
    if (row[4] != row[5])
      return gathered_vectors(param, grad, frozen, begin, end,
                              [=](float* p, const float* g, int64_t behind, int64_t i, auto all, M free) {
                                update(p, g, momenta + at + behind, i, all, free);
                              });
    // Momenta that hold nothing yet become 0 where frozen.
    free_vectors(frozen, begin, end, sgd.moves && sgd.first,
                 [=](int64_t e, auto all, M free) { update(param, grad, momenta, e, all, free); });
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
