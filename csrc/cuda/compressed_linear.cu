// compressed_linear: the bits say where each kept value belongs.
//
// The weight is cut into tiles of one row and 1024 columns. Two passes over the bits give the place of each tile's first
// value (`count_tiles`, `scan_totals`). In `multiply` a warp keeps 1024 columns of x in registers, 32 a lane, and goes
// down a few rows with them:
//
//   values    of a tile lie together: copied 16 bytes at a time to shared memory, a row ahead
//   bits      a word a lane; one popcount and a scan over lanes give the place of the lane's first value
//   products  for each bit of 1, the lane's next value times the column of x that bit stands for: all 32 bits as
//             predicates, or, where no lane has more than 16 ones, one after the other
//
// Sums over tiles of a row are added in order, in `add_chunks`: the same in every run.
#include "kernels.h"
#include "launch.h"
#include "octet.h"

namespace fastmask {
namespace {

constexpr int kLanes = 32, kWarps = 4, kColumns = 32 * kLanes;
// Rows of a weight that a warp goes down.
constexpr int kDown = 8;
// Ones a lane up to which it goes from one to the next, at some 10 instructions each, and not through all 32 bits.
constexpr int kFewOnes = 16;
// x of a tile as float32, with four numbers between lanes so that each lane reads 16 bytes from other banks.
constexpr int kSpread = kColumns + 4 * kLanes;

struct Shape {
  int64_t count, b, n, k, chunks;
};

__device__ inline int sum_over_lanes(int v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// The sum of the lanes before this one, and this one.
__device__ inline int scan_over_lanes(int v) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int before = __shfl_up_sync(~0u, v, step);
    if (lane >= step) v += before;
  }
  return v;
}

// The bits of this lane's 32 columns in a tile; 0 for columns that are not there.
__device__ inline uint32_t tile_word(const uint32_t* words, const Shape& shape, int64_t row, int64_t chunk) {
  const int64_t column = chunk * kColumns + 32 * (threadIdx.x % kLanes);
  if (column >= shape.k) return 0;
  const int64_t there = shape.k - column, bit = row * shape.k + column, at = bit / 32;
  const int shift = int(bit % 32);
  uint32_t word = words[at];
  // A second word is there where bits of this one end: masks are padded to 64 bits.
  if (shift != 0) word = __funnelshift_r(word, 32 * (at + 1) < shape.n * shape.k ? words[at + 1] : 0, shift);
  return there < 32 ? word & ((1u << there) - 1) : word;
}

// The ones of each tile, as sums within a block of tiles, and of each block.
__global__ void __launch_bounds__(kThreads)
    count_tiles(const uint32_t* words, Shape shape, int64_t tiles, int64_t* offsets, int64_t* totals) {
  __shared__ int ones[kThreads];
  __shared__ int of_warp[kThreads / kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t begin = int64_t(blockIdx.x) * kThreads;
  for (int i = warp; i < kThreads; i += kThreads / kLanes) {
    const int64_t tile = begin + i;
    const int found =
        tile < tiles ? sum_over_lanes(__popc(tile_word(words, shape, tile / shape.chunks, tile % shape.chunks))) : 0;
    if (lane == 0) ones[i] = found;
  }
  __syncthreads();
  const int own = ones[threadIdx.x];
  int sum = scan_over_lanes(own);
  if (lane == kLanes - 1) of_warp[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; w++) sum += of_warp[w];
  // One more than there are tiles: where the last one ends.
  if (begin + threadIdx.x <= tiles) offsets[begin + threadIdx.x] = sum - own;
  if (threadIdx.x == kThreads - 1) totals[blockIdx.x] = sum;
}

// Sums of blocks become sums of the blocks before.
__global__ void __launch_bounds__(kThreads) scan_totals(int64_t* totals, int64_t count) {
  __shared__ int64_t of_thread[kThreads];
  const int64_t each = (count + kThreads - 1) / kThreads, begin = each * threadIdx.x;
  const int64_t end = begin + each < count ? begin + each : count;
  int64_t sum = 0;
  for (int64_t i = begin; i < end; i++) sum += totals[i];
  of_thread[threadIdx.x] = sum;
  __syncthreads();
  int64_t before = 0;
  for (int t = 0; t < int(threadIdx.x); t++) before += of_thread[t];
  for (int64_t i = begin; i < end; i++) {
    const int64_t own = totals[i];
    totals[i] = before;
    before += own;
  }
}

__device__ inline int64_t offset(const int64_t* offsets, const int64_t* totals, int64_t tile) {
  return offsets[tile] + totals[tile / kThreads];
}

// Values of a tile to shared memory; where they start there.
template <class T>
__device__ inline int stage(T* to, const T* values, int64_t count, int64_t begin, int64_t end) {
  constexpr int kEach = 16 / sizeof(T);
  // From the last multiple of 16 bytes on, which may lie before the first value of all.
  const int skip = int((reinterpret_cast<uintptr_t>(values + begin) & 15) / sizeof(T));
  for (int64_t at = begin - skip + kEach * (threadIdx.x % kLanes); at < end; at += kEach * kLanes) {
    T* here = to + (at - begin + skip);
    if (at >= 0 && at + kEach <= count) {
      copy_async(here, values + at);
    } else {
      for (int i = 0; i < kEach; i++) here[i] = at + i >= 0 && at + i < count ? values[at + i] : T{};
    }
  }
  commit_copies();
  return skip;
}

template <class T, int ROWS>
__global__ void __launch_bounds__(kWarps * kLanes)
    multiply(const T* x, const T* values, const uint32_t* words, const int64_t* offsets, const int64_t* totals,
             float* sums, Shape shape) {
  constexpr int kStage = kColumns + 32 / sizeof(T);
  // One row of x in 16 bits stays in shared memory besides, where few ones find their columns. In float32 there is
  // no room for it, and less need: values are twice the bytes and the instructions the same.
  constexpr bool kStays = ROWS == 1 && sizeof(T) == 2;
  constexpr int kValues = 2 * kStage * sizeof(T);
  constexpr int kBytes = kStays ? kValues + 4 * kSpread : kValues > 4 * kSpread ? kValues : 4 * kSpread;
  __shared__ __align__(16) unsigned char memory[kWarps][kBytes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  // Warps of a block have chunks beside each other, whose values follow each other; so have blocks of the same
  // values, for other rows of x: all but the first read them from L2.
  const unsigned groups = unsigned((shape.b + ROWS - 1) / ROWS);
  const int64_t unit = int64_t(blockIdx.x / groups) * kWarps + warp, chunk = unit % shape.chunks;
  const int64_t top = unit / shape.chunks * kDown, row = int64_t(blockIdx.x % groups) * ROWS;
  if (top >= shape.n) return;  // a whole warp, and no warp waits for another
  const int down = shape.n - top < kDown ? int(shape.n - top) : kDown;

  float columns[ROWS][32];
  float* const spread = reinterpret_cast<float*>(memory[warp] + (kStays ? kValues : 0));
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const T* from = x + (row + r < shape.b ? row + r : shape.b - 1) * shape.k;
    for (int i = lane; i < kColumns; i += kLanes) {
      const int64_t at = chunk * kColumns + i;
      spread[i + i / 32 * 4] = at < shape.k ? widen(from[at]) : 0;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 32; i++) columns[r][i] = spread[lane * 36 + i];
    __syncwarp();
  }

  // Lanes 0 to 7 hold where the tiles of these rows begin, lanes 16 to 23 where they end.
  const int which = lane % 16 < down ? lane % 16 : 0;
  const int64_t bound = offset(offsets, totals, (top + which) * shape.chunks + chunk + lane / 16);
  T* const staged = reinterpret_cast<T*>(memory[warp]);
  int skip = stage(staged, values, shape.count, __shfl_sync(~0u, bound, 0), __shfl_sync(~0u, bound, 16));
  uint32_t word = tile_word(words, shape, top, chunk);
#pragma unroll 1
  for (int d = 0; d < down; d++) {
    // The next row's values and bits are under way while this one's are used.
    int next_skip = 0;
    uint32_t next_word = 0;
    const int64_t begin = __shfl_sync(~0u, bound, (d + 1) % 16), end = __shfl_sync(~0u, bound, (d + 1) % 16 + 16);
    if (d + 1 < down) {
      next_skip = stage(staged + (d + 1) % 2 * kStage, values, shape.count, begin, end);
      next_word = tile_word(words, shape, top + d + 1, chunk);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncwarp();
    const int own = __popc(word);
    const T* next = staged + d % 2 * kStage + skip + scan_over_lanes(own) - own;
    float sum[ROWS] = {};
    if (kStays && __all_sync(~0u, own <= kFewOnes)) {
      for (uint32_t left = word; left != 0; left &= left - 1)
        sum[0] = fmaf(widen(*next++), spread[36 * lane + __ffs(left) - 1], sum[0]);
    } else {
#pragma unroll
      for (int i = 0; i < 32; i++) {
        if (word >> i & 1) {
          const float value = widen(*next++);
#pragma unroll
          for (int r = 0; r < ROWS; r++) sum[r] = fmaf(value, columns[r][i], sum[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      for (int step = 16; step > 0; step /= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], step);
      if (lane == 0 && row + r < shape.b) sums[(chunk * shape.b + row + r) * shape.n + top + d] = sum[r];
    }
    __syncwarp();
    skip = next_skip;
    word = next_word;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_chunks(const float* sums, const T* bias, T* y, Shape shape) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, size = shape.b * shape.n;
  if (at >= size) return;
  float sum = bias != nullptr ? widen(bias[at % shape.n]) : 0;
  for (int64_t c = 0; c < shape.chunks; c++) sum += sums[c * size + at];
  narrow(sum, y[at]);
}

template <class T>
int run(const void* x, const void* values, const uint8_t* bits, const void* bias, void* y, int64_t* offsets,
        float* sums, Shape shape, int64_t device, void* stream) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(bits);
  const int64_t tiles = shape.n * shape.chunks, counters = blocks(tiles + 1, kThreads);
  int64_t* totals = offsets + tiles + 1;
  if (shape.k > 0) {
    int code = launch(device, stream, count_tiles, grid(counters), kThreads, words, shape, tiles, offsets, totals);
    if (code == 0) code = launch(device, stream, scan_totals, grid(1), kThreads, totals, counters);
    const int64_t units = blocks(shape.n, kDown) * shape.chunks;
    if (code == 0)
      code = launch(device, stream, shape.b == 1 ? multiply<T, 1> : multiply<T, 4>,
                    grid(blocks(units, kWarps) * blocks(shape.b, shape.b == 1 ? 1 : 4)), kWarps * kLanes,
                    static_cast<const T*>(x), static_cast<const T*>(values), words, offsets, totals, sums, shape);
    if (code != 0) return code;
  }
  return launch(device, stream, add_chunks<T>, grid(blocks(shape.b * shape.n, kThreads)), kThreads, sums,
                static_cast<const T*>(bias), static_cast<T*>(y), shape);
}

}  // namespace

int compressed_linear(const void* x, const void* values, int64_t kind, int64_t count, const uint8_t* bits, int64_t b,
                      int64_t n, int64_t k, const void* bias, void* y, int64_t* offsets, float* sums, int64_t device,
                      void* stream) {
  if (b == 0 || n == 0) return 0;
  const Shape shape{count, b, n, k, blocks(k, kColumns)};
  if (kind == 0) return run<float>(x, values, bits, bias, y, offsets, sums, shape, device, stream);
  if (kind == 1) return run<bfloat16>(x, values, bits, bias, y, offsets, sums, shape, device, stream);
  return run<float16>(x, values, bits, bias, y, offsets, sums, shape, device, stream);
}

}  // namespace fastmask
