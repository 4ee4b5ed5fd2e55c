// masked_adamw_: weight, gradient, two or three moments and bits in one pass over all tensors. The step is computed in
// float32 and rounded when stored; an octet that is frozen whole is neither read nor written.
#include "kernels.h"
#include "lists.h"

#include <math.h>
#include <string.h>

namespace fastmask {
namespace {

using Rows = Table<9>;  // param, grad, m, v, largest v, frozen, count of steps, two numbers, n

struct Numbers {
  float lr, beta2, taken1, taken2, eps, weight_decay, log_beta1, log_beta2;
  const float* rate_address;
  bool maximize;
};

template <class T>
__global__ void __launch_bounds__(kThreads) step(const __grid_constant__ Rows table, Numbers with) {
  int64_t begin;
  const int64_t* row = piece(table, begin);
  T* param = pointer<T>(row[0]);
  const T* grad = pointer<const T>(row[1]);
  T* ms = pointer<T>(row[2]);
  T* vs = pointer<T>(row[3]);
  T* largest = pointer<T>(row[4]);
  const uint8_t* frozen = pointer<const uint8_t>(row[5]);
  const bool aligned = on16(param) && on16(grad) && on16(ms) && on16(vs) && on16(largest);
  float corrected1, root2;  // 1 - beta1^t, sqrt(1 - beta2^t)
  if (const float* t = pointer<const float>(row[6])) {
    corrected1 = -expm1f(*t * with.log_beta1);
    root2 = sqrtf(-expm1f(*t * with.log_beta2));
  } else {
    corrected1 = __uint_as_float(uint32_t(row[7]));
    root2 = __uint_as_float(uint32_t(uint64_t(row[7]) >> 32));
  }
  const float lr = with.rate_address != nullptr ? *with.rate_address : with.lr;
  const float rate = lr / corrected1, shrink = 1 - lr * with.weight_decay;
  each_octet(begin, row[8], [&](int64_t e, int count) {
    const unsigned free = there(count) & ~(frozen != nullptr ? frozen[e / 8] : 0u);
    if (free == 0) return;
    const bool whole = aligned && count == 8;
    Octet<T> theta, g, m, v, high;
    load8(param, e, count, whole, theta);
    load8(grad, e, count, whole, g);
    load8<T>(ms, e, count, whole, m);
    load8<T>(vs, e, count, whole, v);
    if (largest != nullptr) load8<T>(largest, e, count, whole, high);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (!(free >> i & 1)) continue;
      const float d = with.maximize ? -widen(g.at[i]) : widen(g.at[i]);
      float first = widen(m.at[i]), second = with.beta2 * widen(v.at[i]) + with.taken2 * d * d;
      first += with.taken1 * (d - first);
      narrow(first, m.at[i]);
      narrow(second, v.at[i]);
      if (largest != nullptr) {
        // As torch.maximum: NaN wins.
        const float before = widen(high.at[i]);
        if (before > second || before != before) second = before;
        narrow(second, high.at[i]);
      }
      narrow(widen(theta.at[i]) * shrink - rate * (first / (sqrtf(second) / root2 + with.eps)), theta.at[i]);
    }
    store8(param, e, count, whole, theta);
    store8(ms, e, count, whole, m);
    store8(vs, e, count, whole, v);
    if (largest != nullptr) store8(largest, e, count, whole, high);
  });
}

}  // namespace

int masked_adamw_(const int64_t* table, int64_t count, int64_t kind, double lr, const float* rate_address,
                  double beta1, double beta2, double eps, double weight_decay, int64_t maximize, int64_t device,
                  void* stream) {
  const Numbers with{float(lr),           float(beta2),      float(1 - beta1),  float(1 - beta2), float(eps),
                     float(weight_decay), float(log(beta1)), float(log(beta2)), rate_address,     maximize != 0};
  if (kind == 0) return launch_list(device, stream, step<float>, table, count, with);
  if (kind == 1) return launch_list(device, stream, step<bfloat16>, table, count, with);
  return launch_list(device, stream, step<float16>, table, count, with);
}

}  // namespace fastmask
