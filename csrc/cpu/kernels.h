// Every kernel of the CPU engine, by name and signature. Each is compiled once for each instruction set, in a
// namespace of that name; one table is chosen when the module is loaded. Kernels know no Python and check nothing.
//
// `bits` are packed masks; sizes are elements unless they say bytes; `threads` is how many may be used at most, and
// no result depends on it. A `kind` of element is 0 for float32 and 1 for bfloat16.
#pragma once

#include <stdint.h>

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
                  uint8_t* bits, int64_t threads))

namespace fastmask {

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
