// masked_sgd_: weight, gradient, momentum and bits in one pass over all tensors. The step is computed in float32 and
// rounded when stored; an octet that is frozen whole is neither read nor written.
#include "kernels.h"
#include "lists.h"

namespace fastmask {
namespace {

using Rows = Table<5>;  // param, grad, momentum, frozen, n

struct Numbers {
  float lr, momentum, weight_decay, undamped;
  const float* rate_address;
  bool nesterov, maximize, first_step;
};

template <class T>
__global__ void __launch_bounds__(kThreads) step(const __grid_constant__ Rows table, Numbers with) {
  int64_t begin;
  const int64_t* row = piece(table, begin);
  T* param = pointer<T>(row[0]);
  const T* grad = pointer<const T>(row[1]);
  T* momenta = pointer<T>(row[2]);
  const uint8_t* frozen = pointer<const uint8_t>(row[3]);
  const bool aligned = on16(param) && on16(grad) && on16(momenta);
  const float lr = with.rate_address != nullptr ? *with.rate_address : with.lr;
  each_octet(begin, row[4], [&](int64_t e, int count) {
    const unsigned free = there(count) & ~(frozen != nullptr ? frozen[e / 8] : 0u);
    // A first step writes 0 where frozen.
    if (free == 0 && !with.first_step) return;
    const bool whole = aligned && count == 8, held = momenta != nullptr && !with.first_step;
    Octet<T> theta, g, buf;
    load8(param, e, count, whole, theta);
    load8(grad, e, count, whole, g);
    if (held) load8<T>(momenta, e, count, whole, buf);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (!(free >> i & 1)) {
        if (!held) buf.at[i] = T{};
        continue;
      }
      const float old = widen(theta.at[i]);
      float d = with.maximize ? -widen(g.at[i]) : widen(g.at[i]);
      if (with.weight_decay != 0) d += with.weight_decay * old;
      if (momenta != nullptr) {
        const float b = held ? with.momentum * widen(buf.at[i]) + with.undamped * d : d;
        narrow(b, buf.at[i]);
        d = with.nesterov ? d + with.momentum * b : b;
      }
      narrow(old - lr * d, theta.at[i]);
    }
    store8(param, e, count, whole, theta);
    if (momenta != nullptr) store8(momenta, e, count, whole, buf);
  });
}

}  // namespace

int masked_sgd_(const int64_t* table, int64_t count, int64_t kind, double lr, const float* rate_address,
                double momentum, double weight_decay, double dampening, int64_t nesterov, int64_t maximize,
                int64_t first_step, int64_t device, void* stream) {
  const Numbers with{float(lr),    float(momentum), float(weight_decay), float(1 - dampening),
                     rate_address, nesterov != 0,   maximize != 0,       first_step != 0};
  if (kind == 0) return launch_list(device, stream, step<float>, table, count, with);
  if (kind == 1) return launch_list(device, stream, step<bfloat16>, table, count, with);
  return launch_list(device, stream, step<float16>, table, count, with);
}

}  // namespace fastmask
