// CUDA C++ as far as csrc/cuda uses it, for a C++ compiler: the kernels' own sources run on the CPU.
//
// The threads of a block are fibers. Between barriers they run one after the other, in an order shuffled anew each
// time, so that a barrier that is missing lets one of them read what another has not written. Shared memory is filled
// with junk before each block, and asynchronous copies happen as late as they may. That shows that indices, masks and
// arithmetic are right; it knows nothing of caches, of true races or of time.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("on_host_shared")))

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The runtime of a machine with one device, of any compute capability asked for.
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };

inline cudaError_t cuda_last_error = cudaSuccess;
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "threads of a block wait at different barriers"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const char* asked = getenv("EMULATED_CAPABILITY");
  const int capability = asked == nullptr ? 90 : atoi(asked);
  *value = which == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  return cudaSuccess;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
extern char __start_on_host_shared[], __stop_on_host_shared[];

namespace on_host {

enum State { Ready, AtWarp, AtBlock, Done };

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  ucontext_t context;  // to begin with; from then on jumps, which make no system calls
  jmp_buf at;
  bool started;
  std::vector<char> stack = std::vector<char>(1 << 16);
  State state;
  std::vector<Copy> begun;
  std::deque<std::vector<Copy>> groups;
};

inline std::vector<Thread> threads(1024);
inline jmp_buf scheduler;
inline unsigned current;
inline std::mt19937 chance(7);
inline uint64_t exchanged[32][32];
inline void (*body)(void*);
inline void* with;

inline Thread& self() { return threads[current]; }

inline void pause(State state) {
  self().state = state;
  if (_setjmp(self().at) == 0) _longjmp(scheduler, 1);
}

inline void resume() {
  if (_setjmp(scheduler) != 0) return;
  if (self().started) _longjmp(self().at, 1);
  self().started = true;
  setcontext(&self().context);
}

inline void enter() {
  body(with);
  pause(Done);
}

// Run one block; false where its threads wait for each other at different barriers.
inline bool run_block(unsigned count) {
  memset(__start_on_host_shared, 0xcd, size_t(__stop_on_host_shared - __start_on_host_shared));
  for (unsigned t = 0; t < count; t++) {
    Thread& thread = threads[t];
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.data(), 0, thread.stack.size()};
    thread.state = Ready;
    thread.started = false;
    thread.begun.clear();
    thread.groups.clear();
    makecontext(&thread.context, enter, 0);
  }
  std::vector<unsigned> order;
  for (;;) {
    order.clear();
    for (unsigned t = 0; t < count; t++)
      if (threads[t].state == Ready) order.push_back(t);
    std::shuffle(order.begin(), order.end(), chance);
    for (unsigned t : order) {
      current = t;
      threadIdx = dim3(t, 0, 0);
      resume();
    }
    auto all = [&](unsigned begin, unsigned end, State one, State other) {
      for (unsigned t = begin; t < end; t++)
        if (threads[t].state != one && threads[t].state != other) return false;
      return true;
    };
    auto release = [&](unsigned begin, unsigned end) {
      for (unsigned t = begin; t < end; t++)
        if (threads[t].state != Done) threads[t].state = Ready;
    };
    if (all(0, count, Done, Done)) return true;
    bool moved = false;
    if (all(0, count, AtBlock, Done)) {
      release(0, count);
      moved = true;
    }
    // All 32 lanes take part: one that has left would be waited for in vain.
    for (unsigned w = 0; w < count; w += 32)
      if (all(w, w + 32, AtWarp, AtWarp)) {
        release(w, w + 32);
        moved = true;
      }
    if (!moved) return false;
  }
}

template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t* slots = exchanged[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  memcpy(slots + lane, &value, sizeof value);
  pause(AtWarp);
  if (from >= 0 && from < 32) memcpy(&value, slots + from, sizeof value);
  pause(AtWarp);
  return value;
}

}  // namespace on_host

inline void __syncthreads() { on_host::pause(on_host::AtBlock); }
inline void __syncwarp() { on_host::pause(on_host::AtWarp); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return on_host::exchange(value, lane % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return on_host::exchange(value, int(threadIdx.x % 32) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  return on_host::exchange(value, int(threadIdx.x % 32) - by);
}
inline int __all_sync(unsigned, int value) {
  int all = value != 0;
  for (int step = 16; step > 0; step /= 2) all &= __shfl_xor_sync(~0u, all, step);
  return all;
}
inline int __ffs(unsigned v) { return __builtin_ffs(int(v)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
}
inline float __uint_as_float(unsigned v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}
template <class T>
T atomicAdd(T* at, T value) {
  return std::exchange(*at, *at + value);
}

// What ptx.h says in PTX.
namespace fastmask {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float widen(float v) { return v; }
inline float widen(bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
inline float widen(float16 v) {
  _Float16 half;
  memcpy(&half, &v, 2);
  return float(half);
}
inline void narrow(float v, float& out) { out = v; }
inline void narrow(float v, bfloat16& out) {
  uint32_t u;
  memcpy(&u, &v, 4);
  out.bits = v != v ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void narrow(float v, float16& out) {
  const _Float16 half = _Float16(v);
  memcpy(&out, &half, 2);
}
inline void keep(float&) {}
inline uint4 load_once(const uint4* p) { return *p; }

inline void copy_async(void* to, const void* from) {
  memset(to, 0xcd, 16);
  on_host::self().begun.push_back({to, from});
}
inline void commit_copies() { on_host::self().groups.push_back(std::move(on_host::self().begun)); }
template <int PENDING>
void wait_copies() {
  auto& groups = on_host::self().groups;
  for (; groups.size() > PENDING; groups.pop_front())
    for (const on_host::Copy& each : groups.front())
      *static_cast<uint4*>(each.to) = *static_cast<const uint4*>(each.from);
}

template <class... P>
void start(void (*kernel)(P...), dim3 blocks, int threads, cudaStream_t, const P&... arguments) {
  using Call = std::pair<void (*)(P...), std::tuple<P...>>;
  Call call(kernel, std::tuple<P...>(arguments...));
  on_host::body = [](void* with) { std::apply(static_cast<Call*>(with)->first, static_cast<Call*>(with)->second); };
  on_host::with = &call;
  gridDim = blocks;
  blockDim = dim3(unsigned(threads));
  if (blocks.y > 65535) {
    cuda_last_error = cudaErrorInvalidConfiguration;
    return;
  }
  // Blocks have no order either.
  std::vector<unsigned> order(blocks.x * blocks.y);
  for (unsigned i = 0; i < order.size(); i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), on_host::chance);
  for (unsigned i : order) {
    blockIdx = dim3(i % blocks.x, i / blocks.x, 0);
    if (!on_host::run_block(unsigned(threads))) cuda_last_error = cudaErrorLaunchFailure;
  }
}

}  // namespace fastmask
