// masked_linear for few rows, on CUDA cores: a warp's lanes lie along k, each with eight weights and the byte of mask
// beside them; W is read once and serves up to eight rows of x, each through its own mask.
//
//   block     4 outputs n, its 4 warps side by side along k (32 lanes of 8: 1024 k a round)
//   weights   16 bytes a lane (float32: twice), past L1, which is left to x
//   products  one multiply-add for a weight, a row and a bit of 1: masked-out weights are not multiplied, whatever
//             they hold
//   sums      over lanes by halving, then over warps in order: the same in every run, and for a row the same
//             whatever other rows there are
#include "kernels.h"
#include "launch.h"
#include "octet.h"

namespace fastmask {
namespace {

constexpr int kOutputs = 4, kWarps = 4, kLanes = 32;

struct Shape {
  int64_t samples, per, b, n, k, bytes, chunks;
};

// Sums over the lanes of a warp of COUNT values each; lane l ends with that of value l / (32 / COUNT). Each step
// halves the values a lane holds, then the lanes that hold the same.
template <int COUNT, int STEP = kLanes / 2>
__device__ inline float sum_over_lanes(const float (&v)[COUNT]) {
  if constexpr (COUNT > 1) {
    const bool upper = threadIdx.x & STEP;
    float half[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
      const float other = __shfl_xor_sync(~0u, upper ? v[i] : v[i + COUNT / 2], STEP);
      half[i] = (upper ? v[i + COUNT / 2] : v[i]) + other;
    }
    return sum_over_lanes<COUNT / 2, STEP / 2>(half);
  } else {
    float sum = v[0];
#pragma unroll
    for (int step = STEP; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  }
}

// Bits e to e + 7 of a mask; ALIGNED: e is a multiple of 8.
template <bool ALIGNED>
__device__ inline unsigned byte_at(const uint8_t* bits, int64_t e, int64_t bytes) {
  const int64_t at = e / 8;
  if (ALIGNED) return bits[at];
  const unsigned next = at + 1 < bytes ? bits[at + 1] : 0;
  return (bits[at] | next << 8) >> int(e % 8);
}

// ROWS rows of x in one reading of W. OWN: each has its mask, otherwise all have the first. ALIGNED: rows of W are
// multiples of 8 elements and of 16 bytes; others start anywhere, and there each element goes by itself. (Two blocks a
// multiprocessor: left to itself nvcc takes 128 registers for some of these, and spills.)
template <class T, int ROWS, bool OWN, bool ALIGNED>
__global__ void __launch_bounds__(kWarps * kLanes, 2)
    few(const T* x, const T* w, const uint8_t* bits, const int64_t* groups, const T* bias, T* y, Shape shape) {
  const int64_t k = shape.k, tile = blockIdx.x / shape.chunks, first = blockIdx.x % shape.chunks * ROWS;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  // Rows and outputs behind the last are computed as the last and not stored.
  const T* rows[ROWS];
  const uint8_t* masks[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int64_t row = first + r < shape.b ? first + r : shape.b - 1;
    rows[r] = x + row * k;
    int64_t sample = !OWN ? 0 : groups != nullptr ? groups[row] : row / shape.per;
    if (sample < 0 || sample >= shape.samples) sample = 0;
    masks[r] = bits + sample * shape.bytes;
  }
  int64_t start[kOutputs];
#pragma unroll
  for (int j = 0; j < kOutputs; j++) {
    const int64_t n = tile * kOutputs + j;
    start[j] = (n < shape.n ? n : shape.n - 1) * k;
  }
  float sums[ROWS * kOutputs] = {};
  for (int64_t at = 8 * int64_t(threadIdx.x); at < k; at += 8 * kWarps * kLanes) {
    const int count = ALIGNED || k - at >= 8 ? 8 : int(k - at);
    float weights[kOutputs][8];
#pragma unroll
    for (int j = 0; j < kOutputs; j++) {
      Octet<T> v;
      if (ALIGNED) {
#pragma unroll
        for (int i = 0; i < int(sizeof(T) / 2); i++)
          v.sixteen[i] = load_once(reinterpret_cast<const uint4*>(w + start[j] + at) + i);
      } else {
        load8(w, start[j] + at, count, false, v);
      }
#pragma unroll
      for (int i = 0; i < 8; i++) keep(weights[j][i] = widen(v.at[i]));
    }
    unsigned byte[kOutputs];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      Octet<T> of_x;
      load8(rows[r], at, count, ALIGNED, of_x);
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; i++) keep(values[i] = widen(of_x.at[i]));
#pragma unroll
      for (int j = 0; j < kOutputs; j++) {
        if (OWN || r == 0) byte[j] = there(count) & byte_at<ALIGNED>(masks[r], start[j] + at, shape.bytes);
        float& sum = sums[r * kOutputs + j];
#pragma unroll
        for (int i = 0; i < 8; i++)
          if (byte[j] >> i & 1) sum = fmaf(weights[j][i], values[i], sum);
      }
    }
  }
  constexpr int kSums = ROWS * kOutputs, kHolders = kLanes / kSums;
  __shared__ float parts[kWarps][kSums];
  const float part = sum_over_lanes(sums);
  if (lane % kHolders == 0) parts[warp][lane / kHolders] = part;
  __syncthreads();
  const int64_t row = first + threadIdx.x / kOutputs, n = tile * kOutputs + threadIdx.x % kOutputs;
  if (threadIdx.x >= kSums || row >= shape.b || n >= shape.n) return;
  float sum = bias != nullptr ? widen(bias[n]) : 0;
  for (int each = 0; each < kWarps; each++) sum += parts[each][threadIdx.x];
  // A row that names no mask has no answer.
  if (groups != nullptr && (groups[row] < 0 || groups[row] >= shape.samples)) sum = __uint_as_float(0x7fffffffu);
  narrow(sum, y[row * shape.n + n]);
}

template <class T, int ROWS, bool OWN, bool ALIGNED>
int run(const T* x, const T* w, const uint8_t* bits, const int64_t* groups, const T* bias, T* y, Shape shape,
        int64_t device, void* stream) {
  shape.chunks = blocks(shape.b, ROWS);
  // Blocks of the same weights are neighbours: all but the first read them from L2.
  return launch(device, stream, few<T, ROWS, OWN, ALIGNED>, grid(blocks(shape.n, kOutputs) * shape.chunks),
                kWarps * kLanes, x, w, bits, groups, bias, y, shape);
}

template <class T>
int run(const void* x, const void* w, const uint8_t* bits, const int64_t* groups, const void* bias, void* y,
        Shape shape, int64_t device, void* stream) {
  const bool places = ((reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(w)) & 15) == 0;
  const bool aligned = places && shape.k % 8 == 0, own = shape.samples > 1, one = shape.b == 1;
  // Eight rows off alignment would need more registers than there are.
  auto* rows = aligned ? own   ? run<T, 8, true, true>
                         : one ? run<T, 1, false, true>
                               : run<T, 4, false, true>
               : own   ? run<T, 4, true, false>
               : one   ? run<T, 1, false, false>
                       : run<T, 4, false, false>;
  return rows(static_cast<const T*>(x), static_cast<const T*>(w), bits, groups, static_cast<const T*>(bias),
              static_cast<T*>(y), shape, device, stream);
}

}  // namespace

int masked_linear(const void* x, const void* w, int64_t kind, const uint8_t* bits, const int64_t* groups,
                  int64_t samples, int64_t b, int64_t n, int64_t k, const void* bias, void* y, int64_t device,
                  void* stream) {
  if (b == 0 || n == 0 || samples == 0) return 0;
  const Shape shape{samples, b / samples > 0 ? b / samples : 1, b, n, k, blocks(n * k, 64) * 8, 1};
  if (kind == 0) return run<float>(x, w, bits, groups, bias, y, shape, device, stream);
  if (kind == 1) return run<bfloat16>(x, w, bits, groups, bias, y, shape, device, stream);
  return run<float16>(x, w, bits, groups, bias, y, shape, device, stream);
}

}  // namespace fastmask
