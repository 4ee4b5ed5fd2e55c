// Every kernel of the CPU engine, by name and signature. Each is compiled once for each instruction set, in a
// namespace of that name; one table is chosen when the module is loaded. Kernels know no Python and check nothing.
//
// `bits` are packed masks; sizes are elements unless they say bytes; `threads` is how many may be used at most, and
// no result depends on it. A `kind` of element is 0 for float32 and 1 for bfloat16.
#pragma once

#include <stdint.h>

#include "../bits.h"

// X(name, arguments); all return nothing.
#define FASTMASK_KERNELS(X)                                                                                       \
  /* bits of n bools; of n scores > mu */                                                                         \
  X(pack_bools, (const uint8_t* mask, int64_t n, uint8_t* bits, int64_t threads))                                 \
  X(pack_scores, (const void* scores, int64_t kind, double mu, int64_t n, uint8_t* bits, int64_t threads))        \
  /* bools (samples, n) of bits (samples, bytes) */                                                               \
  X(unpack, (const uint8_t* bits, int64_t samples, int64_t n, uint8_t* mask, int64_t threads))                    \
  /* number of ones of each of `samples` masks of so many bytes */                                                \
  X(popcount, (const uint8_t* bits, int64_t samples, int64_t bytes, int64_t* ones, int64_t threads))              \
  /* bits (samples, bytes) of n logits */                                                                         \
  X(sample_mask, (const void* logits, int64_t kind, int64_t n, uint64_t seed, int64_t samples, uint32_t stream,   \
                  uint8_t* bits, int64_t threads))                                                                \
  /* bits of the k largest of n scores, the lower index first among equals */                                     \
  X(topk_mask, (const void* scores, int64_t kind, int64_t n, int64_t k, uint8_t* bits, int64_t threads))          \
  /* y (b, n) of x (b, k), w (n, k) and bias (n) or null, all of a kind; rows of x by mask: `starts` (samples + 1),  \
     or null for equal groups; what is masked out counts as 0 or, to flip, as -w; sums are times `scales` (samples)  \
     of their mask, or null for 1; not both */                                                                       \
  X(masked_linear, (const void* x, const void* w, int64_t kind, const uint8_t* bits, const int64_t* starts,          \
                    int64_t samples, const float* scales, int64_t flip, int64_t b, int64_t n, int64_t k,             \
                    const void* bias, void* y, int64_t threads))                                                     \
  /* dx (b, k) of grad (b, n) */                                                                                     \
  X(masked_linear_grad_input, (const void* grad, const void* w, int64_t kind, const uint8_t* bits,                   \
                               const int64_t* starts, int64_t samples, const float* scales, int64_t flip, int64_t b, \
                               int64_t n, int64_t k, void* dx, int64_t threads))                                     \
  /* out (n) = scale * where(active, w, 0 or, to flip, -w), rounded once */                                          \
  X(effective_weight, (const void* w, int64_t kind, const uint8_t* bits, int64_t n, int64_t flip, double scale,      \
                       void* out, int64_t threads))                                                                  \
  /* out (n, k) = sum over samples of ((grad^T x) * w * factor * scale - shift) * slope, grad (b, n) and x (b, k) like\
     w, by sample; slope is s(1 - s) / tau of the relaxed sample, its noise drawn again, or 1 where logits is null;\
     scales and shifts (samples), or null for 1 and 0 */                                                           \
  X(straight_through, (const void* grad, const void* x, const void* w, int64_t kind, const float* logits,          \
                       uint64_t seed, const int64_t* starts, int64_t samples, int64_t b, int64_t n, int64_t k,     \
                       double tau, double factor, const float* scales, const float* shifts, float* out,            \
                       int64_t threads))                                                                           \
  /* the same, which steps scores (n, k) and momenta where they lie; `sampled`: the scores are the logits */       \
  X(straight_through_step, (const void* grad, const void* x, const void* w, int64_t kind, int64_t sampled,         \
                            uint64_t seed, const int64_t* starts, int64_t samples, int64_t b, int64_t n,           \
                            int64_t k, double tau, double factor, const float* scales, const float* shifts,        \
                            float* scores, float* momenta, double rate, double momentum, double weight_decay,      \
                            double dampening, int64_t nesterov, int64_t maximize, int64_t first_step,              \
                            int64_t threads))                                                                      \
  /* out (n) = sum over samples of (g * w * factor * scale - shift) * slope, g (samples, n), the rest as above */  \
  X(score_grad, (const float* g, const void* w, int64_t kind, const float* logits, uint64_t seed, int64_t samples, \
                 int64_t n, double tau, double factor, const float* scales, const float* shifts, float* out,       \
                 int64_t threads))                                                                                 \
  /* out (n) = where(active, w, 0) of elements of 2 or 4 bytes; out may be w */                                    \
  X(select, (const void* w, int64_t size, const uint8_t* bits, int64_t n, void* out, int64_t threads))            \
  /* out (n) = where(active, dense, 0), or plus that */                                                           \
  X(add_selected, (const float* dense, const uint8_t* bits, int64_t n, int64_t add, float* out, int64_t threads)) \
  /* starts (n + 1): ones before each row of k bits, and in all */                                                \
  X(count_ones, (const uint8_t* bits, int64_t n, int64_t k, int64_t* starts, int64_t threads))                    \
  /* y (b, n) of x (b, k), the kept values of w (n, k) and bias (n) or null, all of a kind */                     \
  X(compressed_linear, (const void* x, const void* values, int64_t kind, const uint8_t* bits,                     \
                        const int64_t* starts, int64_t b, int64_t n, int64_t k, const void* bias, void* y,        \
                        int64_t threads))                                                                         \
  /* `count` rows of w (n, k), from a first row on: the next kept value, or 0 */                                  \
  X(expand_values, (const void* values, int64_t kind, const uint8_t* bits, const int64_t* starts, int64_t n,      \
                    int64_t k, int64_t first, int64_t count, void* out, int64_t threads))                         \
  /* Over many tensors: `table` has a row of addresses a tensor (lists.h), then `held`, the number of values its state   \
     has, and n, that of its elements; `frozen` may be 0. */                                                       \
  /* rows: param, grad, momentum, frozen, held, n; first_step: momenta are written and not read */                \
  X(masked_sgd_, (const int64_t* table, int64_t count, int64_t kind, double rate, double momentum,                \
                  double weight_decay, double dampening, int64_t nesterov, int64_t maximize, int64_t first_step,  \
                  int64_t threads))                                                                               \
  /* rows: param, grad, m, v, largest v or 0, frozen, held, n; scalars, 3 a row: 1 - lr wd, 1 / sqrt(1 - beta2^t), \
     and -lr / (1 - beta1^t) */                                                                                   \
  X(masked_adamw_, (const int64_t* table, const double* scalars, int64_t count, int64_t kind, double beta1,       \
                    double beta2, double eps, int64_t maximize, int64_t threads))                                 \
  /* rows: param, saved, frozen, held, n; elements of 2, 4 or 8 bytes */                                                \
  X(restore_frozen_, (const int64_t* table, int64_t count, int64_t size, int64_t threads))

namespace fastmask {

// Whether all n bits of all masks are 1; of every instruction set.
inline bool all_ones(const uint8_t* bits, int64_t samples, int64_t n) {
  const int64_t words = packed_words(n);
  for (int64_t s = 0; s < samples; s++)
    for (int64_t i = 0; i < words; i++)
      if (load_word(bits, s * words + i) != low_ones(n - 64 * i)) return false;
  return true;
}

struct Kernels {
  const char* name;
#define X(kernel, arguments) void(*kernel) arguments;
  FASTMASK_KERNELS(X)
#undef X
};

#ifdef FASTMASK_ISA
namespace FASTMASK_ISA {
#define X(kernel, arguments) void kernel arguments;
FASTMASK_KERNELS(X)
#undef X
}  // namespace FASTMASK_ISA
#endif

}  // namespace fastmask
