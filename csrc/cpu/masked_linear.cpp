// masked_linear: rows of x through where(active, W, 0), and back.
//
// Few rows of x a mask (decoding, heads): dot products along k. W streams from memory once, selected as it is loaded
// (AVX-512: a zeroing load under 16 of the mask's bits, which costs nothing), and is used for all rows and masks
// while it is in cache. Memory sets the pace. Bfloat16 is multiplied in pairs where the processor can (vdpbf16ps).
//
// More rows: masked_linear_many.cpp.
//
// An output is the sum of its products in an order that depends on K alone: neither on threads nor on other rows.
#include <type_traits>

#include "elements.h"
#include "kernels.h"
#include "linear.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

// A tile of dot products is kTall rows of W by up to kTallB of x, or kLow by up to kTileB: all sums in registers.
#if defined(__AVX512F__)
constexpr int kTall = 4, kTallB = 6, kLow = 3, kTileB = 8;
#elif defined(__AVX2__)
constexpr int kTall = 4, kTallB = 2, kLow = 2, kTileB = 4;
#else
constexpr int kTall = 2, kTallB = 2, kLow = 1, kTileB = 4;
#endif
// Up to so many rows a mask, W is multiplied as it is read; more rows go to masked_linear_many.cpp where it can. With
// 4 masks of 16 rows over 4096 x 4096 weights in float32 this takes 14.0 ms forward and 13.1 ms back, that 18.2 and
// 20.7 (Zen 4, 2 threads). In bfloat16 64 rows take 6.7 ms each way there, where this takes 7.1 and 9.0, and 48 rows
// forward 6.0 for 5.5.
#if defined(__AVX512F__)
template <class T>
constexpr int64_t kFewRows = sizeof(T) == 4 ? 32 : 56;
#else
template <class T>
constexpr int64_t kFewRows = 8;
#endif
// Weights a task: a megabyte, so that streams are long; less where threads would idle, never less than pays for one.
constexpr int64_t kMostWeights = 1 << 18, kLeastProducts = 1 << 17;

// Weights of a row that are multiplied at once, their numbers of x, and how.
template <class T>
struct Step {
  static constexpr int64_t width = L;
  using X = float;
  using V = F;
  static V all(const float* p) { return load(p); }
  static V all(const uint16_t* p) { return widen(p); }
  template <bool flip>
  static V some(const T* p, const uint8_t* bits) {
    return weight<flip>(p, lanes(bits));
  }
  template <bool flip>
  static V tail(const T* p, uint64_t bits, int64_t count) {
    return weight_tail<flip>(p, lanes(bits, 0), count);
  }
  template <bool flip>
  static V select(V v, const uint8_t* bits) {
    return flip ? negate(v, lanes(bits)) : keep(v, lanes(bits));
  }
  static V rows(const float* p) { return load(p); }
  static F add(F sum, V w, V x) { return fma(w, x, sum); }
};

#if defined(__AVX512BF16__)
// Two products a lane, one after the other, each rounded once; numbers below 2^-126 count as 0.
template <>
struct Step<uint16_t> {
  static constexpr int64_t width = 2 * L;
  using X = uint16_t;
  using V = __m512i;
  static __mmask32 lanes32(const uint8_t* bits) {
    uint32_t value;
    memcpy(&value, bits, 4);
    return value;
  }
  static V all(const uint16_t* p) { return _mm512_loadu_si512(p); }
  template <bool flip>
  static V some(const uint16_t* p, const uint8_t* bits) {
    return halves<flip>(p, lanes32(bits));
  }
  template <bool flip>
  static V tail(const uint16_t* p, uint64_t bits, int64_t count) {
    return halves<flip>(p, uint32_t(bits), count);
  }
  template <bool flip>
  static V select(V v, const uint8_t* bits) {
    if constexpr (!flip) return _mm512_maskz_mov_epi16(lanes32(bits), v);
    return _mm512_mask_add_epi16(v, lanes32(bits), v, _mm512_set1_epi16(int16_t(0x8000)));
  }
  static V rows(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static F add(F sum, V w, V x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
};
#endif

// Numbers of x up to a whole step: zeros past the end of a row.
template <class T>
int64_t whole_steps(int64_t k) {
  return (k + Step<T>::width - 1) / Step<T>::width * Step<T>::width;
}

inline void convert(float* to, const float* from, int64_t count) { memcpy(to, from, size_t(count) * 4); }
inline void convert(uint16_t* to, const uint16_t* from, int64_t count) { memcpy(to, from, size_t(count) * 2); }
inline void convert(float* to, const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = widen_one(from[i]);
}

// `count` rows of x, step after step: (k / width, count, width), zeros past the end. Rows a power of two apart would
// share one set of the cache.
template <class T>
void interleave(const T* x, int64_t count, int64_t k, typename Step<T>::X* out) {
  constexpr int64_t width = Step<T>::width;
  for (int64_t b = 0; b < count; b++) {
    typename Step<T>::X* at = out + b * width;
    const T* row = x + b * k;
    int64_t i = 0;
    for (; i + width <= k; i += width, at += count * width) convert(at, row + i, width);
    if (i < k) {
      memset(at, 0, width * sizeof *at);
      convert(at, row + i, k - i);
    }
  }
}

// The `count` bits at an address, in the lowest places.
inline uint64_t last_bits(const uint8_t* bits, int64_t count) {
  uint64_t value = 0;
  memcpy(&value, bits, size_t(count + 7) / 8);
  return value & low_ones(count);
}

template <class T, bool flip>
struct Few {
  const T* w;
  const uint8_t* bits;
  Rows rows;
  int64_t n, k;
  const typename Step<T>::X* x;  // interleaved, up to kTileB rows of a mask at a time
  const T* bias;
  T* y;
  int64_t depth;   // numbers of x a row
  int64_t bytes;   // a mask
  int64_t stride;  // bytes from the bits of a row to those of the next
  int64_t tiles;   // of x
};

// Weights that a tile brings near, so that memory does not wait for the sums: those `far` ahead of its own in `count`
// columns. Tiles that read the same rows of W share them out.
struct Ahead {
  int64_t begin, count, far;
};

// y[at + b, row + r] for R rows of W and B interleaved rows of x. Row r of W has its bits at bits[0] + r * stride or,
// where each row of x has a mask of its own, at bits[b] + r * stride. Every sum has lanes of its own, whatever R and B.
template <int R, int B, bool own, class T, bool flip>
inline void tile(const Few<T, flip>& f, int64_t row, const uint8_t* const* bits, const typename Step<T>::X* x,
                 int64_t at, int64_t sample, Ahead ahead) {
  using S = Step<T>;
  const int64_t k = f.k, stride = f.stride;
  const T* w = f.w + row * k;
  // Every loop over it is unrolled: one that is not keeps it in memory.
  F sums[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) sums[r][b] = set1(0.0f);
  int64_t i = 0;
  for (; i + S::width <= k; i += S::width) {
    typename S::V v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const T* p = w + r * k + i;
      v[r] = own ? S::all(p) : S::template some<flip>(p, bits[0] + r * stride + i / 8);
      if (uint64_t(i - ahead.begin) < uint64_t(ahead.count)) __builtin_prefetch(p + ahead.far, 0, 2);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
      const typename S::V rows = S::rows(x + i * B + b * S::width);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        sums[r][b] = S::add(sums[r][b], own ? S::template select<flip>(v[r], bits[b] + r * stride + i / 8) : v[r], rows);
    }
  }
  if (i < k) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) {
        const uint64_t here = last_bits(bits[own ? b : 0] + r * stride + i / 8, k - i);
        const typename S::V v = S::template tail<flip>(w + r * k + i, here, k - i);
        sums[r][b] = S::add(sums[r][b], v, S::rows(x + i * B + b * S::width));
      }
    }
  }
  T* y = f.y + at * f.n + row;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const float plus = f.bias != nullptr ? plain(f.bias[row + r]) : 0.0f;
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) put(y + b * f.n + r, sum(sums[r][b]) * f.rows.scale(own ? at + b : sample) + plus);
  }
}

template <int R, bool own, class T, bool flip, int B = 1>
inline void tiles(int64_t count, const Few<T, flip>& f, int64_t row, const uint8_t* const* bits,
                  const typename Step<T>::X* x, int64_t at, int64_t sample, Ahead ahead) {
  if (count == B) return tile<R, B, own>(f, row, bits, x, at, sample, ahead);
  if constexpr (B < (R == kTall ? kTallB : kTileB))
    tiles<R, own, T, flip, B + 1>(count, f, row, bits, x, at, sample, ahead);
}

// Where R rows of one mask lie from element `position` on: as they are where rows begin on a byte, else shifted into
// `scratch`, which has zeros past the end of a row.
template <int R>
inline const uint8_t* row_bits(const uint8_t* mask, int64_t position, int64_t k, int64_t stride, uint8_t* scratch) {
  if (k % 8 == 0) return mask + position / 8;
  for (int r = 0; r < R; r++)
    for (int64_t i = 0; i < k; i += 64)
      store_word(scratch + r * stride, i / 64, bits_at(mask, position + r * k + i, k - i < 64 ? k - i : 64));
  return scratch;
}

// R rows of W against all rows of x, mask after mask.
template <int R, class T, bool flip>
inline void mask_by_mask(const Few<T, flip>& f, int64_t row, uint8_t* scratch) {
  Ahead ahead{0, (f.k + f.tiles - 1) / f.tiles, R * f.k};
  for (int64_t s = 0; s < f.rows.samples; s++) {
    const int64_t end = f.rows.end(s);
    int64_t b = f.rows.begin(s);
    if (b == end) continue;
    const uint8_t* here = row_bits<R>(f.bits + s * f.bytes, row * f.k, f.k, f.stride, scratch);
    for (; b < end; b += kTileB, ahead.begin += ahead.count)
      tiles<R, false>(end - b < kTileB ? end - b : kTileB, f, row, &here, f.x + b * f.depth, b, s, ahead);
  }
}

// The same where each row of x has a mask of its own: W is loaded once for kTileB masks.
template <int R, class T, bool flip>
inline void masks_at_once(const Few<T, flip>& f, int64_t row, uint8_t* scratch) {
  for (int64_t b = 0; b < f.rows.rows; b += kTileB) {
    const int64_t count = f.rows.rows - b < kTileB ? f.rows.rows - b : kTileB;
    const uint8_t* here[kTileB];
    for (int64_t m = 0; m < count; m++)
      here[m] = row_bits<R>(f.bits + (b + m) * f.bytes, row * f.k, f.k, f.stride, scratch + m * R * f.stride);
    tiles<R, true>(count, f, row, here, f.x + b * f.depth, b, 0, Ahead{0, b == 0 ? f.k : 0, R * f.k});
  }
}

template <int R, class T, bool flip>
void rows_of_w(const Few<T, flip>& f, int64_t begin, int64_t end, bool own) {
  static thread_local Scratch kept;
  uint8_t* scratch = f.k % 8 == 0 ? nullptr : kept.get<uint8_t>(f.stride * R * kTileB);
  int64_t row = begin;
  for (; row + R <= end; row += R) own ? masks_at_once<R>(f, row, scratch) : mask_by_mask<R>(f, row, scratch);
  for (; row < end; row++) own ? masks_at_once<1>(f, row, scratch) : mask_by_mask<1>(f, row, scratch);
}

template <bool flip, class T>
void dots(const T* x, const T* w, const uint8_t* bits, const Rows& rows, int64_t n, int64_t k, const T* bias, T* y,
          int64_t threads) {
  static thread_local Scratch kept;
  const int64_t depth = whole_steps<T>(k);
  auto* interleaved = kept.get<typename Step<T>::X>(rows.rows * depth);
  int64_t widest = 0, groups = 0;
  bool own = rows.samples > 1;
  for (int64_t s = 0; s < rows.samples; s++) {
    widest = rows.count(s) > widest ? rows.count(s) : widest;
    groups += (rows.count(s) + kTileB - 1) / kTileB;
    own = own && rows.count(s) == 1;
  }
  for (int64_t s = 0; s < (own ? 1 : rows.samples); s++) {
    const int64_t end = own ? rows.rows : rows.end(s);
    for (int64_t b = rows.begin(s); b < end; b += kTileB)
      interleave(x + b * k, end - b < kTileB ? end - b : kTileB, k, interleaved + b * depth);
  }
  if (own) widest = rows.rows;
  const Few<T, flip> f{w, bits, rows, n, k, interleaved, bias, y, depth, packed_words(n * k) * 8,
                 k % 8 == 0 ? k / 8 : packed_words(k) * 8, groups > 0 ? groups : 1};
  // Pieces hold whole tiles of either height; no sum depends on them.
  const int64_t fair = n * k / (8 * threads), least = kLeastProducts / (rows.rows + 1);
  const int64_t weights = fair > kMostWeights ? kMostWeights : fair > least ? fair : least;
  const int64_t grain = (weights / (k + 1) / (kTall * kLow) + 1) * kTall * kLow;
  pieces(n, grain, threads, [&](int64_t begin, int64_t end) {
    widest <= kTallB ? rows_of_w<kTall>(f, begin, end, own) : rows_of_w<kLow>(f, begin, end, own);
  });
}

// Whether all of W stays in L2, so that it may be read for each tile of x rather than once, and one mask is all there is.
template <class T>
bool is_small(const Rows& rows, int64_t n, int64_t k) {
  return rows.samples == 1 && n * k * int64_t(sizeof(T)) <= 1 << 18;
}

// Many rows through a small layer: tiles of x are dealt out, not rows of W, of which there are too few.
template <bool flip, class T>
void small_layer(const T* x, const T* w, const uint8_t* bits, const Rows& rows, int64_t n, int64_t k, const T* bias,
                 T* y, int64_t threads) {
  const int64_t depth = whole_steps<T>(k), tile_products = kTileB * n * k + 1;
  const int64_t stride = k % 8 == 0 ? k / 8 : packed_words(k) * 8;
  const Rows all = rows;
  pieces(rows.rows, (kLeastProducts / tile_products + 1) * kTileB, threads, [=](int64_t begin, int64_t end) {
    static thread_local Scratch kept;
    auto* interleaved = kept.get<typename Step<T>::X>(kTileB * depth);
    for (int64_t b = begin; b < end; b += kTileB) {
      const int64_t count = end - b < kTileB ? end - b : kTileB;
      interleave(x + b * k, count, k, interleaved);
      const Few<T, flip> f{w, bits, Rows{nullptr, count, 1, all.scales, all.sign}, n, k, interleaved, bias, y + b * n, depth, 0, stride, 1};
      count <= kTallB ? rows_of_w<kTall>(f, 0, n, false) : rows_of_w<kLow>(f, 0, n, false);
    }
  });
}

// The transposed product: rows of W whose multiples are added while sums stay in registers, and columns at a time.
// What so many rows give is summed before it is added to the rest: 4096 additions one after the other would leave the
// error budget.
constexpr int64_t kNear = 32, kColumns = 512;
constexpr int64_t kSummed = 128;  // rows of W in a sum, a multiple of kNear

#if defined(__AVX512F__)
constexpr int kWideB = 4, kWide = 4, kAddedB = 8, kNarrow = 3;
#elif defined(__AVX2__)
constexpr int kWideB = 2, kWide = 4, kAddedB = 4, kNarrow = 2;
#else
constexpr int kWideB = 2, kWide = 2, kAddedB = 4, kNarrow = 1;
#endif

// dx (B, ld) += grad[b, r] * W[r, columns] for `count` rows of W from element `position` on; V vectors of columns, or
// what is left of one.
template <bool flip, int B, int V, class T>
inline void add_rows(const T* w, const uint8_t* mask, int64_t position, int64_t k, int64_t count, int64_t left,
                     const T* grad, int64_t n, float* dx, int64_t ld, Ahead ahead) {
  F sums[B][V];
#pragma GCC unroll 8
  for (int b = 0; b < B; b++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[b][v] = set1(0.0f);
  for (int64_t r = 0; r < count; r++) {
    const T* p = w + position + r * k;
    const uint64_t word = bits_at(mask, position + r * k, left < V * L ? left : V * L);
    const bool near = uint64_t(r - ahead.begin) < uint64_t(ahead.count);
    F here[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      here[v] = left >= V * L ? weight<flip>(p + v * L, lanes(word, v * L)) : weight_tail<flip>(p, lanes(word, 0), left);
      if (near) __builtin_prefetch(p + ahead.far + v * L, 0, 2);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
      const F one = set1(plain(grad[b * n + r]));
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sums[b][v] = fma(here[v], one, sums[b][v]);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; b++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(dx + b * ld + v * L, load(dx + b * ld + v * L) + sums[b][v]);
}

#if defined(__AVX512BF16__)
// The same, two rows of W at once; V is 2 or 4. Interleaving two rows leaves the quarters of two vectors of columns in
// the order 0 2 4 6, 1 3 5 7.
template <bool flip, int B, int V>
inline void add_pairs(const uint16_t* w, const uint8_t* mask, int64_t position, int64_t k, int64_t count, int64_t left,
                      const uint16_t* grad, int64_t n, float* dx, int64_t ld, Ahead ahead) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  F sums[B][V];
#pragma GCC unroll 8
  for (int b = 0; b < B; b++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[b][v] = set1(0.0f);
  const int64_t columns = left < V * L ? left : V * L;
  for (int64_t r = 0; r < count; r += 2) {
    const uint16_t* p = w + position + r * k;
    const bool both = r + 1 < count, near = uint64_t(r - ahead.begin) < uint64_t(ahead.count);
    const uint64_t above = bits_at(mask, position + r * k, columns);
    const uint64_t below = both ? bits_at(mask, position + (r + 1) * k, columns) : 0;
    __m512i here[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v += 2) {
      const __m512i a = halves<flip>(p + v * L, uint32_t(above >> v * L), columns - v * L);
      const __m512i b = halves<flip>(p + k + v * L, uint32_t(below >> v * L), both ? columns - v * L : 0);
      here[v] = _mm512_unpacklo_epi16(a, b);
      here[v + 1] = _mm512_unpackhi_epi16(a, b);
      if (near) __builtin_prefetch(p + ahead.far + v * L, 0, 2);
      __builtin_prefetch(p + kNear * k + k + v * L, 0, 2);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
      uint32_t two = grad[b * n + r];
      if (both) memcpy(&two, grad + b * n + r, 4);
      const __m512i ones = _mm512_set1_epi32(int(two));
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sums[b][v] = _mm512_dpbf16_ps(sums[b][v], (__m512bh)here[v], (__m512bh)ones);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; b++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v += 2) {
      const __m512d first = _mm512_castps_pd(sums[b][v]), second = _mm512_castps_pd(sums[b][v + 1]);
      float* to = dx + b * ld + v * L;
      store(to, load(to) + _mm512_castpd_ps(_mm512_permutex2var_pd(first, low, second)));
      store(to + L, load(to + L) + _mm512_castpd_ps(_mm512_permutex2var_pd(first, high, second)));
    }
  }
}
#endif

// All columns of one piece, for `b` rows.
template <bool flip, class T, int B = 1>
inline void add_columns(int64_t b, const T* w, const uint8_t* mask, int64_t position, int64_t k, int64_t count,
                        int64_t columns, const T* grad, int64_t n, float* dx, int64_t ld, Ahead ahead) {
  if constexpr (B < kAddedB)
    if (b > B) return add_columns<flip, T, B + 1>(b, w, mask, position, k, count, columns, grad, n, dx, ld, ahead);
  // Pairs take an even number of vectors.
  constexpr int V = B <= kWideB ? kWide : sizeof(T) == 2 && kMany<T> ? 2 : kNarrow;
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2) {
    for (; i < columns; i += V * L)
      add_pairs<flip, B, V>(w, mask, position + i, k, count, columns - i, grad, n, dx + i, ld, ahead);
    return;
  }
#endif
  for (; i + V * L <= columns; i += V * L)
    add_rows<flip, B, V>(w, mask, position + i, k, count, columns - i, grad, n, dx + i, ld, ahead);
  for (; i < columns; i += L) add_rows<flip, B, 1>(w, mask, position + i, k, count, columns - i, grad, n, dx + i, ld, ahead);
}

template <bool flip, class T>
void multiples(const T* grad, const T* w, const uint8_t* bits, const Rows& rows, int64_t n, int64_t k, T* dx,
               int64_t threads) {
  // Room for whole vectors past the last column.
  constexpr int64_t ld = kColumns + 4 * L + 16;
  const int64_t bytes = packed_words(n * k) * 8;
  const int64_t parts = threads * ((k + threads * kColumns - 1) / (threads * kColumns));
  // Whole lines of W, and the same number of pieces for each thread; no sum depends on them.
  const int64_t columns = parts > 0 ? ((k + parts - 1) / parts + 31) / 32 * 32 : kColumns;
  pieces(k, columns, threads, [=](int64_t begin, int64_t end) {
    static thread_local Scratch kept;
    float* sums = kept.get<float>(2 * rows.rows * ld);
    float* total = sums + rows.rows * ld;
    memset(sums, 0, size_t(2 * rows.rows * ld) * sizeof(float));
    int64_t all = 0;
    for (int64_t s = 0; s < rows.samples; s++) all += (rows.count(s) + kAddedB - 1) / kAddedB;
    // Pairs of rows, shared out among all sets of sums.
    const int64_t share = all > 0 ? (kNear / 2 + all - 1) / all * 2 : 0;
    for (int64_t row = 0; row < n; row += kNear) {
      const int64_t count = n - row < kNear ? n - row : kNear;
      Ahead ahead{0, share, kNear * k};
      for (int64_t s = 0; s < rows.samples; s++) {
        const int64_t last = rows.end(s);
        for (int64_t b = rows.begin(s); b < last; b += kAddedB, ahead.begin += share)
          add_columns<flip>(last - b < kAddedB ? last - b : kAddedB, w, bits + s * bytes, row * k + begin, k, count,
                      end - begin, grad + b * n + row, n, sums + b * ld, ld, ahead);
      }
      // Sums of some rows are added up by themselves: one sum over 4096 rows errs seven times as much as a product.
      if ((row + count) % kSummed != 0 && row + count < n) continue;
      for (int64_t b = 0; b < rows.rows; b++)
        for (int64_t i = b * ld; i < b * ld + end - begin; i++) {
          total[i] += sums[i];
          sums[i] = 0.0f;
        }
    }
    for (int64_t s = 0; s < rows.samples; s++)
      for (int64_t b = rows.begin(s); b < rows.end(s); b++)
        for (int64_t i = begin; i < end; i++) put(dx + b * k + i, total[b * ld + i - begin] * rows.scale(s));
  });
}

template <bool flip, class T>
void forward(const void* x, const void* w, const uint8_t* bits, const Rows& rows, int64_t n, int64_t k,
             const void* bias, void* y, int64_t threads) {
  const T *from = static_cast<const T*>(x), *weights = static_cast<const T*>(w), *plus = static_cast<const T*>(bias);
  T* to = static_cast<T*>(y);
  if (rows.rows > kTileB && is_small<T>(rows, n, k))
    return small_layer<flip>(from, weights, bits, rows, n, k, plus, to, threads);
  if constexpr (kMany<T>)
    if (rows.rows > kFewRows<T> * rows.samples)
      return many_rows<false, flip>(from, weights, bits, rows, n, k, plus, to, threads);
  dots<flip>(from, weights, bits, rows, n, k, plus, to, threads);
}

template <bool flip, class T>
void transposed(const void* grad, const void* w, const uint8_t* bits, const Rows& rows, int64_t n, int64_t k, void* dx,
                int64_t threads) {
  const T *from = static_cast<const T*>(grad), *weights = static_cast<const T*>(w), *none = nullptr;
  T* to = static_cast<T*>(dx);
  if constexpr (kMany<T>)
    if (rows.rows > kFewRows<T> * rows.samples)
      return many_rows<true, flip>(from, weights, bits, rows, n, k, none, to, threads);
  multiples<flip>(from, weights, bits, rows, n, k, to, threads);
}

// The elements of a piece, 64 at most and then some that are not there.
template <bool flip, class T>
void effective(const T* w, const uint8_t* bits, int64_t n, float scale, T* out, int64_t threads) {
  pieces(n, 1 << 15, threads, [=](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; e += 64) {
      const uint64_t word = load_word(bits, e / 64);
      for (int64_t i = 0; i < 64 && e + i < end; i += L) {
        const M active = lanes(word, i), whole = end - e - i < L ? first(end - e - i) : first(L);
        const F v = load(w + e + i, whole);
        store(out + e + i, rounded<T>((flip ? negate(v, active) : keep(v, active)) * set1(scale)), whole);
      }
    }
  });
}

}  // namespace

void masked_linear(const void* x, const void* w, int64_t kind, const uint8_t* bits, const int64_t* starts,
                   int64_t samples, const float* scales, int64_t flip, int64_t b, int64_t n, int64_t k,
                   const void* bias, void* y, int64_t threads) {
  const auto compute = kind == 0 ? flip ? forward<true, float> : forward<false, float>
                                 : flip ? forward<true, uint16_t> : forward<false, uint16_t>;
  compute(x, w, bits, Rows{starts, b, samples, scales, flip ? -1.0f : 1.0f}, n, k, bias, y, threads);
}

void masked_linear_grad_input(const void* grad, const void* w, int64_t kind, const uint8_t* bits, const int64_t* starts,
                              int64_t samples, const float* scales, int64_t flip, int64_t b, int64_t n, int64_t k,
                              void* dx, int64_t threads) {
  const auto compute = kind == 0 ? flip ? transposed<true, float> : transposed<false, float>
                                 : flip ? transposed<true, uint16_t> : transposed<false, uint16_t>;
  compute(grad, w, bits, Rows{starts, b, samples, scales, flip ? -1.0f : 1.0f}, n, k, dx, threads);
}

void effective_weight(const void* w, int64_t kind, const uint8_t* bits, int64_t n, int64_t flip, double scale,
                      void* out, int64_t threads) {
  // A flipped weight is one whose active entries have changed their sign, and then all.
  const float times = flip ? -float(scale) : float(scale);
  const auto of = [&](auto* from) {
    using T = typename std::remove_const<typename std::remove_pointer<decltype(from)>::type>::type;
    flip ? effective<true>(from, bits, n, times, static_cast<T*>(out), threads)
         : effective<false>(from, bits, n, times, static_cast<T*>(out), threads);
  };
  kind == 0 ? of(static_cast<const float*>(w)) : of(static_cast<const uint16_t*>(w));
}

void add_selected(const float* dense, const uint8_t* bits, int64_t n, int64_t add, float* out, int64_t threads) {
  pieces(n, 1 << 15, threads, [=](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; e += 64) {
      const uint64_t word = load_word(bits, e / 64);
      for (int64_t i = 0; i < 64 && e + i < end; i += L) {
        const M whole = end - e - i < L ? first(end - e - i) : first(L);
        const F v = load(dense + e + i, both(lanes(word, i), whole));
        store(out + e + i, add ? load(out + e + i, whole) + v : v, whole);
      }
    }
  });
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
