// pack: a byte of bits from eight elements, which one thread reads.
#include "kernels.h"
#include "launch.h"
#include "octet.h"

namespace fastmask {
namespace {

// Bytes a block.
constexpr int kBytes = 4 * kThreads;

struct AnyByte {
  __device__ bool operator()(uint8_t v) const { return v != 0; }
};

template <class T>
struct Above {
  float mu;
  __device__ bool operator()(T v) const { return widen(v) > mu; }
};

template <class T, class Test>
__global__ void __launch_bounds__(kThreads) pack(const T* source, Test test, int64_t n, uint8_t* bits, int64_t bytes) {
  const int64_t begin = int64_t(blockIdx.x) * kBytes;
  const bool aligned = (reinterpret_cast<uintptr_t>(source) & (sizeof(T) == 1 ? 7 : 15)) == 0;
#pragma unroll
  for (int i = 0; i < kBytes; i += kThreads) {
    const int64_t at = begin + i + threadIdx.x, e = 8 * at;
    if (at >= bytes) return;
    const int count = n - e >= 8 ? 8 : n > e ? int(n - e) : 0;
    Octet<T> v;
    load8(source, e, count, aligned && count == 8, v);
    unsigned byte = 0;
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (test(v.at[j])) byte |= 1u << j;
    bits[at] = uint8_t(byte & there(count));
  }
}

template <class T, class Test>
int run(const T* source, Test test, int64_t n, uint8_t* bits, int64_t device, void* stream) {
  const int64_t bytes = blocks(n, 64) * 8;
  return launch(device, stream, pack<T, Test>, grid(blocks(bytes, kBytes)), kThreads, source, test, n, bits, bytes);
}

}  // namespace

int pack_bools(const uint8_t* mask, int64_t n, uint8_t* bits, int64_t device, void* stream) {
  return run(mask, AnyByte{}, n, bits, device, stream);
}

int pack_scores(const void* scores, int64_t kind, double mu, int64_t n, uint8_t* bits, int64_t device, void* stream) {
  // The level is a number of the scores' dtype, which float32 holds.
  const float level = float(mu);
  if (kind == 0) return run(static_cast<const float*>(scores), Above<float>{level}, n, bits, device, stream);
  if (kind == 1) return run(static_cast<const bfloat16*>(scores), Above<bfloat16>{level}, n, bits, device, stream);
  return run(static_cast<const float16*>(scores), Above<float16>{level}, n, bits, device, stream);
}

}  // namespace fastmask
