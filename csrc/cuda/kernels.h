// Every launcher of the CUDA engine, by name and signature. Launchers know no Python, allocate nothing, wait for
// nothing and check nothing but the launch: they return the runtime's error code, 0 where the kernels are on the
// stream. So all of them can be captured into a CUDA graph.
//
// `bits` are packed masks; sizes are elements unless they say bytes. A `kind` of element is 0 for float32, 1 for
// bfloat16, 2 for float16. Pointers are of the device and may have any alignment their elements have; those of
// 16 bytes are read 16 bytes at a time.
#pragma once

#include <stdint.h>

// X(name, arguments); each ends with the device's index and its stream.
#define FASTMASK_CUDA_KERNELS(X)                                                                                      \
  /* bits of n bools; of n scores > mu */                                                                             \
  X(pack_bools, (const uint8_t* mask, int64_t n, uint8_t* bits, int64_t device, void* stream))                        \
  X(pack_scores, (const void* scores, int64_t kind, double mu, int64_t n, uint8_t* bits, int64_t device,              \
                  void* stream))                                                                                      \
  /* adds to ones[s] the number of ones of mask s of `samples`, each of so many bytes */                              \
  X(popcount, (const uint8_t* bits, int64_t samples, int64_t bytes, int64_t* ones, int64_t device, void* stream))     \
  /* y (b, n) of x (b, k) and w (n, k); row r has mask groups[r], or mask r / (b / samples) where groups is null */   \
  X(masked_linear, (const void* x, const void* w, int64_t kind, const uint8_t* bits, const int64_t* groups,           \
                    int64_t samples, int64_t b, int64_t n, int64_t k, const void* bias, void* y, int64_t device,      \
                    void* stream))                                                                                    \
  /* y (b, n) of x (b, k), the `count` kept values of w (n, k), and its bits, which start on a multiple of 8.         \
     Scratch: `offsets` (compressed_tiles(n, k) + a block's), `sums` (chunks of k, b, n) */                           \
  X(compressed_linear, (const void* x, const void* values, int64_t kind, int64_t count, const uint8_t* bits,          \
                        int64_t b, int64_t n, int64_t k, const void* bias, void* y, int64_t* offsets, float* sums,    \
                        int64_t device, void* stream))                                                                \
  /* Over many tensors: `table`, on the host, has a row of addresses a tensor, the number of elements last. */        \
  /* rows: param, grad, momentum or 0, frozen or 0, n; a rate_address other than 0 is of a float32 that holds lr */   \
  X(masked_sgd_, (const int64_t* table, int64_t count, int64_t kind, double lr, const float* rate_address,            \
                  double momentum, double weight_decay, double dampening, int64_t nesterov, int64_t maximize,         \
                  int64_t first_step, int64_t device, void* stream))                                                  \
  /* rows: param, grad, m, v, largest v or 0, frozen or 0, the count of steps as a float32's address or 0, then the   \
     float32 numbers 1 - beta1^t and sqrt(1 - beta2^t) side by side for rows without one, n */                        \
  X(masked_adamw_, (const int64_t* table, int64_t count, int64_t kind, double lr, const float* rate_address,          \
                    double beta1, double beta2, double eps, double weight_decay, int64_t maximize, int64_t device,    \
                    void* stream))                                                                                    \
  /* rows: param, saved, frozen, n; elements of 2, 4 or 8 bytes */                                                    \
  X(restore_frozen_, (const int64_t* table, int64_t count, int64_t size, int64_t device, void* stream))

namespace fastmask {

#define X(kernel, arguments) int kernel arguments;
FASTMASK_CUDA_KERNELS(X)
#undef X

// Why no kernel can run in this process, as the end of a sentence; null where one can.
const char* missing();

// What an error code says, and whether it says that this machine cannot run kernels at all.
const char* said(int code);
bool unavailable(int code);

}  // namespace fastmask
