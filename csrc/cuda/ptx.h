// What C++ has no words for: launches, conversions, cache hints, asynchronous copies. All else is plain C++, so that
// the tests can run the kernels on the CPU over a header that says the same (tests/cuda/emulated).
#pragma once

#include <stdint.h>

#ifdef __CUDACC__

namespace fastmask {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class... P>
void start(void (*kernel)(P...), dim3 blocks, int threads, cudaStream_t stream, const P&... arguments) {
  kernel<<<blocks, threads, 0, stream>>>(arguments...);
}

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ inline float widen(float16 v) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
}

// Rounded to the nearest, ties to even.
__device__ inline void narrow(float v, float& out) { out = v; }
__device__ inline void narrow(float v, bfloat16& out) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }
__device__ inline void narrow(float v, float16& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }

// A number that is used often is computed once and kept, not again for each use: nvcc would widen each weight anew
// for each row of x, 5.8 instructions a product instead of 3.3 (sm_90a, bfloat16, 8 rows).
__device__ inline void keep(float& v) { asm("" : "+f"(v)); }

// 16 bytes that are read once: they displace nothing in L1.
__device__ inline uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// 16 bytes from global to shared memory, in groups that are waited for by their number.
__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace fastmask

#endif
