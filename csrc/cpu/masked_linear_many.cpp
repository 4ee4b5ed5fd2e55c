// masked_linear for more rows than memory can keep up with: FMA sets the pace.
//
// A block of W is selected into scratch that stays in L2, and its entries are broadcast against panels of x laid out
// transposed, MR by NV * L sums in registers. The same product, with the block read the other way, is dY W.
//
//     x (B, C) -> panels (C / P, kPanel)   P numbers a lane: 1 float32, or 2 bfloat16 for vdpbf16ps
//     block of W (kBlock, depth)          sums (kBlock, B)   -> out (B, R)
#include "linear.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int MR = 12, NV = 2;  // 24 sums, 2 vectors of x, 1 broadcast weight: 27 of 32 registers
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;  // 15 of 16 registers
#else
constexpr int MR = 4, NV = 1;
#endif
constexpr int64_t kPanel = NV * L;  // columns of x^T side by side
constexpr int64_t kRowsAtOnce = 512;
constexpr int64_t kBlock = 96;  // outputs a task; a multiple of every MR; with `depth` 48 KB of L2

// What a lane holds.
template <class T>
struct Lane;

template <>
struct Lane<float> {
  // Lanes of products summed before they are added to the rest: twice as many leave the error budget of dense masks.
  static constexpr int64_t numbers = 1, depth = 128;
  static F add(F sum, const float* one, F x) { return fma(set1(*one), x, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Lane<uint16_t> {
  static constexpr int64_t numbers = 2, depth = 128;
  static F add(F sum, const float* one, F x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(set1(*one)), (__m512bh)_mm512_castps_si512(x));
  }
};
#endif

#if defined(__AVX2__)
// to (8, down) = from (8, across) transposed, of 32-bit numbers.
inline void transpose8(const void* from, int64_t across, float* to, int64_t down) {
  const char* rows = static_cast<const char*>(from);
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows + i * across));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * down, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * down, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#else
inline void transpose8(const void* from, int64_t across, float* to, int64_t down) {
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) memcpy(to + j * down + i, static_cast<const char*>(from) + i * across + 4 * j, 4);
}
#endif

// Panels of the transpose of x (rows, C): panel p holds its rows as (lanes, kPanel), past the last row and number zeros.
template <class T>
void transpose(const T* x, int64_t rows, int64_t C, float* panels, int64_t threads) {
  constexpr int64_t P = Lane<T>::numbers;
  const int64_t lanes = (C + P - 1) / P, whole = C / P / 8 * 8;
  parallel((rows + kPanel - 1) / kPanel, threads, [=](int64_t p) {
    for (int64_t j = 0; j < kPanel; j += 8) {
      const int64_t b = p * kPanel + j;
      float* out = panels + p * kPanel * lanes + j;
      int64_t i = 0;
      if (b + 8 <= rows)
        for (; i < whole; i += 8) transpose8(x + b * C + i * P, C * sizeof(T), out + i * kPanel, kPanel);
      for (; i < lanes; i++) {
        for (int64_t r = 0; r < 8; r++) {
          const int64_t left = C - i * P;
          float one = 0.0f;
          if (b + r < rows) memcpy(&one, x + (b + r) * C + i * P, size_t(left < P ? left : P) * sizeof(T));
          out[i * kPanel + r] = one;
        }
      }
    }
  });
}

// out (rows, ld) = where(active, W, 0)[row : row + rows, column : column + columns], lanes of it.
template <bool flip, class T>
void select_rows(const T* w, const uint8_t* bits, int64_t k, int64_t row, int64_t rows, int64_t column,
                 int64_t columns, float* out, int64_t ld) {
  for (int64_t r = 0; r < rows; r++) {
    const int64_t begin = (row + r) * k + column;
    for (int64_t i = 0; i < columns; i += 64) {
      const int64_t count = columns - i < 64 ? columns - i : 64;
      const uint64_t word = bits_at(bits, begin + i, count);
      const T* from = w + begin + i;
      float* to = out + r * ld + i / Lane<T>::numbers;
#if defined(__AVX512F__)
      // `out` has room for whole vectors.
      if constexpr (sizeof(T) == 2) {
        for (int64_t j = 0; j < count; j += 2 * L)
          _mm512_storeu_si512(to + j / 2, halves<flip>(from + j, uint32_t(word >> j), count - j));
      } else {
        for (int64_t j = 0; j < count; j += L) store(to + j, weight_tail<flip>(from + j, lanes(word, j), count - j));
      }
#else
      int64_t j = 0;
      for (; j + L <= count; j += L) store(to + j, weight<flip>(from + j, lanes(word, j)));
      for (; j < count; j++) to[j] = word >> j & 1 ? (flip ? -plain(from[j]) : plain(from[j])) : flip ? plain(from[j]) : 0.0f;
#endif
    }
  }
}

// out (rows / 2, ld) of the same block read downwards: each lane a number and the one below it.
template <bool flip>
inline void select_pairs(const uint16_t* w, const uint8_t* bits, int64_t k, int64_t row, int64_t rows, int64_t column,
                         int64_t columns, float* out, int64_t ld);
#if defined(__AVX512BF16__)
template <bool flip>
inline void select_pairs(const uint16_t* w, const uint8_t* bits, int64_t k, int64_t row, int64_t rows, int64_t column,
                         int64_t columns, float* out, int64_t ld) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t r = 0; r < rows; r += 2) {
    const int64_t begin = (row + r) * k + column;
    for (int64_t i = 0; i < columns; i += 32) {
      const int64_t count = columns - i < 32 ? columns - i : 32;
      const __m512i a = halves<flip>(w + begin + i, uint32_t(bits_at(bits, begin + i, count)), count);
      const __m512i b =
          r + 1 < rows ? halves<flip>(w + begin + k + i, uint32_t(bits_at(bits, begin + k + i, count)), count)
                       : _mm512_setzero_si512();
      const __m512i first = _mm512_unpacklo_epi16(a, b), second = _mm512_unpackhi_epi16(a, b);
      float* to = out + r / 2 * ld + i;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi64(first, low, second));
      if (count > 16) _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(first, high, second));
    }
  }
}
#endif

// sums (MR, ld) of A (MR, depth) panel (depth, V vectors), added to what is there unless it is the `first` part;
// A(r, c) lies at r * down + c * right. Meanwhile the weights of the next block, whose part for these MR outputs begins
// at `next` and whose bits at `next_bits`, are brought near.
template <int V, bool across, class T>
inline void micro(const float* a, int64_t width, int64_t depth, const float* panel, float* sums, int64_t ld, bool first,
                  const T* next, const uint8_t* next_bits, int64_t k) {
  constexpr int64_t P = Lane<T>::numbers;
  const int64_t down = across ? 1 : width, right = across ? width : 1;
  // Every loop over it is unrolled: one that is not keeps it in memory.
  F part[MR][V];
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) part[r][v] = set1(0.0f);
  for (int64_t c = 0; c < depth; c++) {
    F columns[V];
    for (int v = 0; v < V; v++) columns[v] = load(panel + c * kPanel + v * L);
    if (across) {
      if (next != nullptr)
        for (int p = 0; p < P; p++) {
          __builtin_prefetch(next + (c * P + p) * k, 0, 2);
          __builtin_prefetch(next_bits + (c * P + p) * k / 8, 0, 2);
        }
    } else if (next != nullptr && c % 16 == 0) {
      for (int r = 0; r < MR; r++) {
        __builtin_prefetch(next + r * k + c * P, 0, 2);
        if (c == 0) __builtin_prefetch(next_bits + r * k / 8, 0, 2);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) part[r][v] = Lane<T>::add(part[r][v], a + r * down + c * right, columns[v]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++) {
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      float* to = sums + r * ld + v * L;
      store(to, first ? part[r][v] : load(to) + part[r][v]);
    }
  }
}

// out (count, R)[:, begin : begin + outputs] = sums (outputs, ld) transposed, scaled, plus bias.
template <class T>
void give(const float* sums, int64_t ld, int64_t count, int64_t outputs, float scale, const T* bias, T* out, int64_t R) {
  alignas(32) float eight[8 * kBlock];
  for (int64_t b = 0; b < count; b += 8) {
    for (int64_t r = 0; r < outputs; r += 8) transpose8(sums + r * ld + b, ld * 4, eight + r, kBlock);
    for (int64_t j = 0; j < 8 && b + j < count; j++) {
      T* row = out + (b + j) * R;
      const float* from = eight + j * kBlock;
      if (bias != nullptr) {
        for (int64_t r = 0; r < outputs; r++) put(row + r, from[r] * scale + plain(bias[r]));
      } else {
        for (int64_t r = 0; r < outputs; r++) put(row + r, from[r] * scale);
      }
    }
  }
}

template <bool across, bool flip, class T>
void product(const T* x, const T* w, const uint8_t* bits, const Rows& rows, int64_t n, int64_t k, const T* bias, T* out,
             int64_t threads) {
  constexpr int64_t P = Lane<T>::numbers, kDepth = Lane<T>::depth;
  static thread_local Scratch kept;
  const int64_t R = across ? k : n, C = across ? n : k, lanes = (C + P - 1) / P;
  const int64_t bytes = packed_words(n * k) * 8;
  int64_t padded = 0;
  for (int64_t s = 0; s < rows.samples; s++) padded += (rows.count(s) + kPanel - 1) / kPanel * kPanel;
  float* panels = kept.get<float>(padded * lanes);
  float* at = panels;
  for (int64_t s = 0; s < rows.samples; s++) {
    transpose(x + rows.begin(s) * C, rows.count(s), C, at, threads);
    at += (rows.count(s) + kPanel - 1) / kPanel * kPanel * lanes;
  }
  // Smaller blocks where there would be too few for the threads; no sum depends on it.
  const int64_t fair = (R + 2 * threads - 1) / (2 * threads);
  const int64_t block = fair < kBlock ? (fair + MR - 1) / MR * MR : kBlock / MR * MR;
  pieces(R, block, threads, [=](int64_t begin, int64_t end) {
    static thread_local Scratch kept_a, kept_sums;
    const int64_t height = (end - begin + MR - 1) / MR * MR;
    // 16 floats more than a power of two: lines of one column must not share one set of the cache. Blocks have room for
    // whole vectors; rows of W past the last are 0.
    const int64_t width = across ? (height + 31) / 32 * 32 + 16 : kDepth + 16;
    const int64_t most = kRowsAtOnce, ld = most + 16;
    float* a = kept_a.get<float>((across ? kDepth : height) * width);
    float* sums = kept_sums.get<float>((height + 8) * ld);
    memset(a, 0, size_t((across ? kDepth : height) * width) * sizeof(float));
    const float* base = panels;
    for (int64_t s = 0; s < rows.samples; s++) {
      const int64_t last = rows.end(s);
      const float* panel = base;
      for (int64_t b0 = rows.begin(s); b0 < last; b0 += most) {
        const int64_t count = last - b0 < most ? last - b0 : most;
        for (int64_t c = 0; c < lanes; c += kDepth) {
          const int64_t depth = lanes - c < kDepth ? lanes - c : kDepth;
          const int64_t numbers = C - c * P < depth * P ? C - c * P : depth * P;
          if constexpr (!across) {
            select_rows<flip>(w, bits + s * bytes, k, begin, end - begin, c * P, numbers, a, width);
          } else if constexpr (P == 1) {
            select_rows<flip>(w, bits + s * bytes, k, c, numbers, begin, end - begin, a, width);
          } else {
            select_pairs<flip>(w, bits + s * bytes, k, c * P, numbers, begin, end - begin, a, width);
          }
          const T* following = c + kDepth < lanes ? (across ? w + (c + kDepth) * P * k + begin : w + begin * k + (c + kDepth) * P) : nullptr;
          const uint8_t* following_bits = bits + s * bytes + (following != nullptr ? following - w : 0) / 8;
          for (int64_t b = 0; b < count; b += kPanel) {
            const float* columns = panel + b * lanes + c * kPanel;
            const bool half = NV > 1 && count - b <= L;
            for (int64_t r = 0; r < height; r += MR) {
              const float* rows_of_a = a + (across ? r : r * width);
              const T* next = b == 0 && following != nullptr ? following + (across ? r : r * k) : nullptr;
              const auto compute = half ? micro<1, across, T> : micro<NV, across, T>;
              compute(rows_of_a, width, depth, columns, sums + r * ld + b, ld, c == 0, next,
                      following_bits + (across ? r : r * k) / 8, k);
            }
          }
        }
        give(sums, ld, count, end - begin, rows.scale(s), bias != nullptr ? bias + begin : nullptr, out + b0 * R + begin, R);
        panel += most * lanes;
      }
      base += (last - rows.begin(s) + kPanel - 1) / kPanel * kPanel * lanes;
    }
  });
}

}  // namespace

template <bool across, bool flip, class T>
void many_rows(const T* x, const T* w, const uint8_t* bits, const Rows& rows, int64_t n, int64_t k, const T* bias,
               T* out, int64_t threads) {
  product<across, flip>(x, w, bits, rows, n, k, bias, out, threads);
}

#define FASTMASK_MANY(across, flip, T)                                                                             \
  template void many_rows<across, flip, T>(const T*, const T*, const uint8_t*, const Rows&, int64_t, int64_t, const T*, \
                                           T*, int64_t);
#define FASTMASK_MANY_OF(T)     \
  FASTMASK_MANY(false, false, T) \
  FASTMASK_MANY(true, false, T)  \
  FASTMASK_MANY(false, true, T)  \
  FASTMASK_MANY(true, true, T)
FASTMASK_MANY_OF(float)
#if defined(__AVX512BF16__)
FASTMASK_MANY_OF(uint16_t)
#endif

}  // namespace FASTMASK_ISA
}  // namespace fastmask
