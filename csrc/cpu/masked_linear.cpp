// masked_linear: rows of x through where(active, W, 0), and back.
//
// Few rows of x a mask (decoding, heads): dot products along k. W streams from memory once, selected as it is loaded
// (AVX-512: a zeroing load under 16 of the mask's bits, which costs nothing), and is used for all rows and masks
// while it is in cache. Memory sets the pace.
//
// More rows: a block of W is selected into scratch that stays in L2, and its entries are broadcast against panels of
// x laid out transposed; FMA sets the pace. The same product, with the block read the other way, is dY W.
//
// An output is the sum of its products in an order that depends on K alone: neither on threads nor on blocks of rows.
#include <new>

#include "kernels.h"
#include "vec.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

// Rows of W in the registers of one tile of dot products, and of one pass of multiples; a block of the product.
#if defined(__AVX512F__)
constexpr int kTileN = 4, kAddedAtOnce = 8;
constexpr int MR = 12, NV = 2;  // 24 sums, 2 vectors of x, 1 broadcast weight: 27 of 32 registers
#elif defined(__AVX2__)
constexpr int kTileN = 2, kAddedAtOnce = 4;
constexpr int MR = 6, NV = 2;  // 15 of 16 registers
#else
constexpr int kTileN = 1, kAddedAtOnce = 2;
constexpr int MR = 4, NV = 1;
#endif
constexpr int64_t kTileB = 4;       // rows of x in the registers of one tile
constexpr int64_t kPanel = NV * L;  // columns of x^T side by side
constexpr int64_t kDepth = 256;     // products summed before they are added to the rest
constexpr int64_t kRowsAtOnce = 512;
constexpr int64_t kBlock = 96;  // outputs a task; a multiple of every MR; with kDepth 96 KB of L2
constexpr int64_t kTaskWeights = 1 << 14;

inline F weight(const float* p, M m) { return load(p, m); }
inline F weight(const uint16_t* p, M m) { return keep(widen(p), m); }
inline F weight_tail(const float* p, M m, int64_t count) { return load(p, both(m, first(count))); }
inline F weight_tail(const uint16_t* p, M m, int64_t count) {
  uint16_t whole[L] = {};
  memcpy(whole, p, 2 * size_t(count));
  return keep(widen(whole), m);
}
inline float plain(float v) { return v; }
inline float plain(uint16_t v) { return widen_one(v); }

// Equal consecutive groups of rows, or those that `starts` (samples + 1) names.
struct Rows {
  const int64_t* starts;
  int64_t rows, samples;
  int64_t begin(int64_t s) const { return starts != nullptr ? starts[s] : s * (rows / samples); }
  int64_t end(int64_t s) const { return begin(s + 1); }
};

// BT rows of x, vector after vector: (k / L, BT, L), zeros past the end. Rows a power of two apart would share one set
// of the cache.
void interleave(const float* x, int64_t count, int64_t k, float* out) {
  for (int64_t b = 0; b < count; b++) {
    float* at = out + b * L;
    for (int64_t i = 0; i < k; i += L, at += count * L)
      store(at, i + L <= k ? load(x + b * k + i) : load(x + b * k + i, first(k - i)));
  }
}

// y[b, r] for R rows of W and BT interleaved rows of x. Every sum has lanes of its own, whatever R and BT are.
template <int R, int BT, class T>
inline void tile(const T* w, const uint8_t* const* bits, int64_t k, const float* x, float* y, int64_t n,
                 const float* bias) {
  F sums[R][BT];
  for (int r = 0; r < R; r++)
    for (int b = 0; b < BT; b++) sums[r][b] = set1(0.0f);
  int64_t i = 0;
  for (; i + L <= k; i += L) {
    F v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      v[r] = weight(w + r * k + i, lanes(bits[r] + i / 8));
      // The rows that come next, so that memory does not wait for the sums.
      __builtin_prefetch(w + (R + r) * k + i, 0, 2);
    }
#pragma GCC unroll 8
    for (int b = 0; b < BT; b++) {
      const F rows = load(x + i * BT + b * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r][b] = fma(v[r], rows, sums[r][b]);
    }
  }
  if (i < k) {
    for (int r = 0; r < R; r++) {
      const F v = weight_tail(w + r * k + i, lanes(bits[r] + i / 8), k - i);
      for (int b = 0; b < BT; b++) sums[r][b] = fma(v, load(x + i * BT + b * L), sums[r][b]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int b = 0; b < BT; b++) y[b * n + r] = sum(sums[r][b]) + (bias != nullptr ? bias[r] : 0.0f);
}

template <int R, class T>
inline void tiles(int64_t count, const T* w, const uint8_t* const* bits, int64_t k, const float* x, float* y,
                  int64_t n, const float* bias) {
  switch (count) {
    case 1: return tile<R, 1>(w, bits, k, x, y, n, bias);
    case 2: return tile<R, 2>(w, bits, k, x, y, n, bias);
    case 3: return tile<R, 3>(w, bits, k, x, y, n, bias);
    default: return tile<R, kTileB>(w, bits, k, x, y, n, bias);
  }
}

// The bits of R rows from element `position` on, byte-aligned: where they lie, or shifted into `scratch`, which has
// zeros past the end of a row.
template <int R>
inline void row_bits(const uint8_t* mask, int64_t position, int64_t k, uint8_t* scratch, const uint8_t** rows) {
  const int64_t stride = packed_words(k) * 8;
  for (int r = 0; r < R; r++) {
    const int64_t begin = position + r * k;
    if (k % 16 == 0) {
      rows[r] = mask + begin / 8;
      continue;
    }
    for (int64_t i = 0; i < k; i += 64)
      store_word(scratch + r * stride, i / 64, bits_at(mask, begin + i, k - i < 64 ? k - i : 64));
    rows[r] = scratch + r * stride;
  }
}

// R rows of W against all rows of x, mask after mask.
template <int R, class T>
inline void rows_of_w(const T* w, const uint8_t* bits, int64_t row, int64_t n, int64_t k, const Rows& rows,
                      const float* x, const float* bias, float* y, uint8_t* scratch) {
  const int64_t bytes = packed_words(n * k) * 8, depth = (k + L - 1) / L * L;
  const uint8_t* here[R];
  for (int64_t s = 0; s < rows.samples; s++) {
    const int64_t end = rows.end(s);
    int64_t b = rows.begin(s);
    if (b == end) continue;
    row_bits<R>(bits + s * bytes, row * k, k, scratch, here);
    for (; b < end; b += kTileB) {
      const int64_t count = end - b < kTileB ? end - b : kTileB;
      tiles<R>(count, w + row * k, here, k, x + b * depth, y + b * n + row, n, bias != nullptr ? bias + row : nullptr);
    }
  }
}

template <class T>
void dots(const float* x, const T* w, const uint8_t* bits, const Rows& rows, int64_t n, int64_t k,
          const float* bias, float* y, int64_t threads) {
  const int64_t grain = (kTaskWeights / (k > 0 ? k : 1) / kTileN + 1) * kTileN;
  const int64_t depth = (k + L - 1) / L * L;
  float* interleaved = new (std::align_val_t(64)) float[size_t(rows.rows * depth)];
  for (int64_t s = 0; s < rows.samples; s++) {
    for (int64_t b = rows.begin(s); b < rows.end(s); b += kTileB) {
      const int64_t count = rows.end(s) - b < kTileB ? rows.end(s) - b : kTileB;
      interleave(x + b * k, count, k, interleaved + b * depth);
    }
  }
  pieces(n, grain, threads, [=](int64_t begin, int64_t end) {
    uint8_t* scratch = new uint8_t[size_t(packed_words(k) * 8 * kTileN + 8)];
    int64_t row = begin;
    for (; row + kTileN <= end; row += kTileN)
      rows_of_w<kTileN>(w, bits, row, n, k, rows, interleaved, bias, y, scratch);
    for (; row < end; row++) rows_of_w<1>(w, bits, row, n, k, rows, interleaved, bias, y, scratch);
    delete[] scratch;
  });
  operator delete[](interleaved, std::align_val_t(64));
}

// dx (count, ld) += the products of R rows of W, columns [column, column + columns), with grad (count, n).
template <int R, class T>
inline void add_rows(const T* w, const uint8_t* mask, int64_t row, int64_t n, int64_t k, int64_t column,
                     int64_t columns, const float* grad, int64_t count, float* dx, int64_t ld) {
  for (int64_t i = 0; i < columns; i += 64) {
    const int64_t left = columns - i < 64 ? columns - i : 64;
    uint64_t words[R];
    for (int r = 0; r < R; r++) words[r] = bits_at(mask, (row + r) * k + column + i, left);
    for (int64_t j = 0; j < left; j += L) {
      const bool whole = j + L <= left;
      F v[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const T* p = w + (row + r) * k + column + i + j;
        v[r] = whole ? weight(p, lanes(words[r], j)) : weight_tail(p, lanes(words[r], j), left - j);
        __builtin_prefetch(p + R * k, 0, 2);
      }
      // dx has room for whole vectors.
      for (int64_t b = 0; b < count; b++) {
        F sum = load(dx + b * ld + i + j);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sum = fma(v[r], set1(grad[b * n + row + r]), sum);
        store(dx + b * ld + i + j, sum);
      }
    }
  }
}

// The transposed product for few rows a mask: W is read once, row by row, and its multiples are added up.
template <class T>
void multiples(const float* grad, const T* w, const uint8_t* bits, const Rows& rows, int64_t n, int64_t k, float* dx,
               int64_t threads) {
  constexpr int64_t kColumns = 512, ld = kColumns + 16;
  const int64_t bytes = packed_words(n * k) * 8;
  pieces(k, kColumns, threads, [=](int64_t begin, int64_t end) {
    float* sums = new (std::align_val_t(64)) float[size_t(rows.rows * ld)]();
    for (int64_t row = 0; row < n;) {
      const bool many = row + kAddedAtOnce <= n;
      for (int64_t s = 0; s < rows.samples; s++) {
        const int64_t first_row = rows.begin(s), count = rows.end(s) - first_row;
        if (count == 0) continue;
        const uint8_t* mask = bits + s * bytes;
        if (many) {
          add_rows<kAddedAtOnce>(w, mask, row, n, k, begin, end - begin, grad + first_row * n, count,
                                 sums + first_row * ld, ld);
        } else {
          add_rows<1>(w, mask, row, n, k, begin, end - begin, grad + first_row * n, count, sums + first_row * ld, ld);
        }
      }
      row += many ? kAddedAtOnce : 1;
    }
    for (int64_t b = 0; b < rows.rows; b++) memcpy(dx + b * k + begin, sums + b * ld, size_t(end - begin) * 4);
    operator delete[](sums, std::align_val_t(64));
  });
}

// out (rows, ld) = where(active, W, 0)[row : row + rows, column : column + columns]
template <class T>
void select_block(const T* w, const uint8_t* bits, int64_t k, int64_t row, int64_t rows, int64_t column,
                  int64_t columns, float* out, int64_t ld) {
  for (int64_t r = 0; r < rows; r++) {
    const int64_t begin = (row + r) * k + column;
    for (int64_t i = 0; i < columns; i += 64) {
      const int64_t count = columns - i < 64 ? columns - i : 64;
      const uint64_t word = bits_at(bits, begin + i, count);
      int64_t j = 0;
      for (; j + L <= count; j += L) store(out + r * ld + i + j, weight(w + begin + i + j, lanes(word, j)));
      for (; j < count; j++) out[r * ld + i + j] = word >> j & 1 ? plain(w[begin + i + j]) : 0.0f;
    }
  }
}

// Panels of the transpose of x (rows, k): panel p holds its columns as (k, kPanel), past the last row zeros.
void transpose(const float* x, int64_t rows, int64_t k, float* panels, int64_t threads) {
  parallel((rows + kPanel - 1) / kPanel, threads, [=](int64_t p) {
    for (int64_t begin = 0; begin < k; begin += 64) {
      const int64_t end = begin + 64 < k ? begin + 64 : k;
      for (int64_t j = 0; j < kPanel; j++) {
        const int64_t b = p * kPanel + j;
        float* out = panels + p * kPanel * k + j;
        for (int64_t i = begin; i < end; i++) out[i * kPanel] = b < rows ? x[b * k + i] : 0.0f;
      }
    }
  });
}

// sums (MR, ld) += A (MR, depth) panel (depth, V vectors); A(r, c) lies at r * down + c * right. Meanwhile the
// weights of the next block, whose part for these MR outputs begins at `next`, are brought near.
template <int V, bool across, class T>
inline void micro(const float* a, int64_t width, int64_t depth, const float* panel, float* sums, int64_t ld,
                  const T* next, int64_t k) {
  const int64_t down = across ? 1 : width, right = across ? width : 1;
  F part[MR][V];
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < V; v++) part[r][v] = set1(0.0f);
  for (int64_t c = 0; c < depth; c++) {
    F columns[V];
    for (int v = 0; v < V; v++) columns[v] = load(panel + c * kPanel + v * L);
    if (across) {
      if (next != nullptr) __builtin_prefetch(next + c * k, 0, 2);
    } else if (next != nullptr && c % 16 == 0) {
      for (int r = 0; r < MR; r++) __builtin_prefetch(next + r * k + c, 0, 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
      const F one = set1(a[r * down + c * right]);
      for (int v = 0; v < V; v++) part[r][v] = fma(one, columns[v], part[r][v]);
    }
  }
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < V; v++) store(sums + r * ld + v * L, load(sums + r * ld + v * L) + part[r][v]);
}

// out (rows of x, R) = sum over c in [0, C) of A(r, c) x[b, c] + bias, A = where(active, W, 0) or, `across`, its
// transpose. `panels` is scratch for the transposes of the rows of each mask, each padded to kPanel.
template <bool across, class T>
void product(const float* x, const T* w, const uint8_t* bits, const Rows& rows, int64_t n, int64_t k,
             const float* bias, float* out, float* panels, int64_t threads) {
  const int64_t R = across ? k : n, C = across ? n : k;
  const int64_t bytes = packed_words(n * k) * 8;
  float* at = panels;
  for (int64_t s = 0; s < rows.samples; s++) {
    const int64_t count = rows.end(s) - rows.begin(s);
    transpose(x + rows.begin(s) * C, count, C, at, threads);
    at += (count + kPanel - 1) / kPanel * kPanel * C;
  }
  // Smaller blocks where there would be too few for the threads; no sum depends on it.
  const int64_t fair = (R + 2 * threads - 1) / (2 * threads);
  const int64_t block = fair < kBlock ? (fair + MR - 1) / MR * MR : kBlock / MR * MR;
  pieces(R, block, threads, [=](int64_t begin, int64_t end) {
    const int64_t height = (end - begin + MR - 1) / MR * MR;
    // 16 floats more than a power of two: lines of one column must not share one set of the cache.
    const int64_t width = across ? height + 16 : kDepth + 16, ld = kRowsAtOnce + 16;
    float* a = new (std::align_val_t(64)) float[size_t((across ? kDepth : height) * width)]();
    float* sums = new (std::align_val_t(64)) float[size_t(height * ld)];
    const float* base = panels;
    for (int64_t s = 0; s < rows.samples; s++) {
      const int64_t last = rows.end(s);
      const float* panel = base;
      for (int64_t b0 = rows.begin(s); b0 < last; b0 += kRowsAtOnce) {
        const int64_t count = last - b0 < kRowsAtOnce ? last - b0 : kRowsAtOnce;
        memset(sums, 0, size_t(height * ld) * sizeof(float));
        for (int64_t c = 0; c < C; c += kDepth) {
          const int64_t depth = C - c < kDepth ? C - c : kDepth;
          if (across) {
            select_block(w, bits + s * bytes, k, c, depth, begin, end - begin, a, width);
          } else {
            select_block(w, bits + s * bytes, k, begin, end - begin, c, depth, a, width);
          }
          for (int64_t b = 0; b < count; b += kPanel) {
            const float* columns = panel + b * C + c * kPanel;
            const bool half = NV > 1 && count - b <= L;
            for (int64_t r = 0; r < height; r += MR) {
              const float* rows_of_a = a + (across ? r : r * width);
              float* into = sums + r * ld + b;
              const T* next = nullptr;
              if (b == 0 && c + kDepth < C) {
                next = w + (across ? (c + kDepth) * k + begin + r : (begin + r) * k + c + kDepth);
              }
              if (half) {
                micro<1, across>(rows_of_a, width, depth, columns, into, ld, next, k);
              } else {
                micro<NV, across>(rows_of_a, width, depth, columns, into, ld, next, k);
              }
            }
          }
        }
        for (int64_t b = 0; b < count; b++)
          for (int64_t r = begin; r < end; r++)
            out[(b0 + b) * R + r] = sums[(r - begin) * ld + b] + (bias != nullptr ? bias[r] : 0.0f);
        panel += kRowsAtOnce * C;
      }
      base += (last - rows.begin(s) + kPanel - 1) / kPanel * kPanel * C;
    }
    operator delete[](a, std::align_val_t(64));
    operator delete[](sums, std::align_val_t(64));
  });
}

}  // namespace

void all_ones(const uint8_t* bits, int64_t samples, int64_t n, int64_t* result) {
  const int64_t words = packed_words(n);
  *result = 0;
  for (int64_t s = 0; s < samples; s++)
    for (int64_t i = 0; i < words; i++)
      if (load_word(bits, s * words + i) != low_ones(n - 64 * i)) return;
  *result = 1;
}

void masked_linear(const float* x, const void* w, int64_t kind, const uint8_t* bits, const int64_t* starts,
                   int64_t samples, int64_t b, int64_t n, int64_t k, const float* bias, float* y, float* panels,
                   int64_t threads) {
  const Rows rows{starts, b, samples};
  const float* w32 = static_cast<const float*>(w);
  const uint16_t* w16 = static_cast<const uint16_t*>(w);
  if (panels == nullptr) {
    if (kind == 0) return dots(x, w32, bits, rows, n, k, bias, y, threads);
    return dots(x, w16, bits, rows, n, k, bias, y, threads);
  }
  if (kind == 0) return product<false>(x, w32, bits, rows, n, k, bias, y, panels, threads);
  product<false>(x, w16, bits, rows, n, k, bias, y, panels, threads);
}

void masked_linear_grad_input(const float* grad, const void* w, int64_t kind, const uint8_t* bits,
                              const int64_t* starts, int64_t samples, int64_t b, int64_t n, int64_t k, float* dx,
                              float* panels, int64_t threads) {
  const Rows rows{starts, b, samples};
  const float* w32 = static_cast<const float*>(w);
  const uint16_t* w16 = static_cast<const uint16_t*>(w);
  if (panels == nullptr) {
    if (kind == 0) return multiples(grad, w32, bits, rows, n, k, dx, threads);
    return multiples(grad, w16, bits, rows, n, k, dx, threads);
  }
  if (kind == 0) return product<true>(grad, w32, bits, rows, n, k, nullptr, dx, panels, threads);
  product<true>(grad, w16, bits, rows, n, k, nullptr, dx, panels, threads);
}

void select_halves(const uint16_t* w, const uint8_t* bits, int64_t n, uint16_t* out, int64_t threads) {
  pieces(n, 1 << 16, threads, [=](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; e += 64) {
      const uint64_t word = load_word(bits, e / 64);
      const int64_t count = end - e < 64 ? end - e : 64;
      if (count == 64) {
#if defined(__AVX512F__)
        for (int i = 0; i < 64; i += 32)
          _mm512_storeu_si512(out + e + i, _mm512_maskz_loadu_epi16(__mmask32(word >> i), w + e + i));
        continue;
#endif
        for (int i = 0; i < 64; i++) out[e + i] = uint16_t(w[e + i] & -uint16_t(word >> i & 1));
      } else {
        for (int i = 0; i < count; i++) out[e + i] = uint16_t(w[e + i] & -uint16_t(word >> i & 1));
      }
    }
  });
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
