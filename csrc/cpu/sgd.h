// A step of stochastic gradient descent on a vector: the operations of torch.optim.SGD's for-loop in their order, each
// rounded as torch rounds it in float32 (`add` with a factor is one fused operation there, and so it is here).
#pragma once

#include "elements.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

struct Sgd {
  F step_size, mu, decay, share;
  bool decays, moves, nesterov, maximize, first;

  Sgd(double rate, double momentum, double weight_decay, double dampening, int64_t nesterov, int64_t maximize,
      int64_t first)
      : step_size(set1(float(rate))),
        mu(set1(float(momentum))),
        decay(set1(float(weight_decay))),
        share(set1(float(1.0 - dampening))),
        decays(weight_decay != 0.0),
        moves(momentum != 0.0),
        nesterov(nesterov != 0),
        maximize(maximize != 0),
        first(first != 0) {}

  // The new value of p under gradient g; buf is the old momentum, 0 at first, and becomes the new one.
  F operator()(F p, F g, F& buf) const {
    F step = maximize ? -g : g;
    if (decays) step = fma_once(p, decay, step);
    if (moves) {
      buf = first ? step : fma_once(step, share, buf * mu);
      step = nesterov ? fma_once(buf, mu, step) : buf;
    }
    return fma_once(step, step_size, p);
  }
};

}  // namespace
}  // namespace FASTMASK_ISA
}  // namespace fastmask
