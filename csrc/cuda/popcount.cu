// popcount: each block counts a stretch of one mask and adds its number; sums of integers have no order.
#include "kernels.h"
#include "launch.h"
#include "octet.h"

namespace fastmask {
namespace {

// Bytes a block: eight rounds of 16 a thread.
constexpr int64_t kStretch = 8 * 16 * kThreads;

__global__ void __launch_bounds__(kThreads) count(const uint8_t* bits, int64_t bytes, unsigned long long* ones) {
  const uint8_t* mask = bits + int64_t(blockIdx.y) * bytes;
  // Masks may start anywhere: what lies before the first multiple of 16 and behind the last goes byte by byte.
  const int64_t to_first = int64_t(-reinterpret_cast<uintptr_t>(mask) & 15);
  const int64_t head = to_first < bytes ? to_first : bytes;
  const int64_t wide = (bytes - head) / 16, tail = head + 16 * wide;
  int found = 0;
  const int64_t begin = int64_t(blockIdx.x) * (kStretch / 16);
  const uint4* words = reinterpret_cast<const uint4*>(mask + head);
#pragma unroll
  for (int i = 0; i < int(kStretch / 16); i += kThreads) {
    const int64_t at = begin + i + threadIdx.x;
    if (at < wide) {
      const uint4 v = load_once(words + at);
      found += __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w);
    }
  }
  if (blockIdx.x == 0) {
    if (int64_t(threadIdx.x) < head) found += __popc(mask[threadIdx.x]);
    if (tail + threadIdx.x < bytes) found += __popc(mask[tail + threadIdx.x]);
  }
  for (int step = 16; step > 0; step /= 2) found += __shfl_xor_sync(~0u, found, step);
  __shared__ int of_warp[kThreads / 32];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = found;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned long long sum = 0;
    for (int w = 0; w < kThreads / 32; w++) sum += of_warp[w];
    atomicAdd(ones + blockIdx.y, sum);
  }
}

}  // namespace

int popcount(const uint8_t* bits, int64_t samples, int64_t bytes, int64_t* ones, int64_t device, void* stream) {
  auto* sums = reinterpret_cast<unsigned long long*>(ones);
  if (bytes == 0) return 0;
  // A grid has at most 65,535 rows.
  for (int64_t s = 0; s < samples; s += 65535) {
    const int64_t rows = samples - s < 65535 ? samples - s : 65535;
    const int code = launch(device, stream, count, grid(blocks(bytes, kStretch), rows), kThreads, bits + s * bytes,
                            bytes, sums + s);
    if (code != 0) return code;
  }
  return 0;
}

}  // namespace fastmask
