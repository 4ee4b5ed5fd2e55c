// compressed_linear: products with weights that lie as a bitmap and the kept values.
//
// A word of bits says which of the next popcount(word) values go to which of 64 places, a byte of it which of up to 8
// values go to which lanes. How far each byte's values lie from the word's first is counted from the word itself, so
// that only the word's own count carries over: its loads do not wait for each other. The lanes come from a table of
// 2 KB: on Zen 4 a permutation of 8 lanes by it takes 1.31 ns for 16 weights, products and all, where `vexpandps` of
// 16 takes 1.65, from memory as from a register. Values are loaded whole, which reads up to 7 past the last one
// needed: near the end of all values the rest is loaded by count.
#include "elements.h"
#include "kernels.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

struct Places {
  uint8_t from[256][8];
  constexpr Places() : from() {
    for (int byte = 0; byte < 256; byte++)
      for (int i = 0, next = 0; i < 8; i++) {
        from[byte][i] = uint8_t(next & 7);
        next += byte >> i & 1;
      }
  }
};
constexpr Places kPlaces;

// H is 8 floats. spread(v, byte): lane i takes the next lane of v where bit i is 1, else it is 0.
#if defined(__AVX2__)
using H = __m256;
inline H zeros() { return _mm256_setzero_ps(); }
inline H eight(const float* p) { return _mm256_loadu_ps(p); }
inline H eight(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline H fused(H a, H b, H c) { return _mm256_fmadd_ps(a, b, c); }
inline H spread(H v, uint32_t byte) {
  const __m256i from = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kPlaces.from[byte]));
#if defined(__AVX512F__)
  return _mm256_maskz_permutexvar_ps(__mmask8(byte), from, v);
#else
  return keep(_mm256_permutevar8x32_ps(v, from), expand(byte));
#endif
}
inline float added(H v) {
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
#else
using H = F;
inline H zeros() { return set1(0.0f); }
inline H eight(const float* p) { return load(p); }
inline H eight(const uint16_t* p) { return widen(p); }
inline H fused(H a, H b, H c) { return fma(a, b, c); }
inline H spread(H v, uint32_t byte) {
  H out = zeros();
  for (int i = 0; i < 8; i++)
    if (byte >> i & 1) out[i] = v[kPlaces.from[byte][i]];
  return out;
}
inline float added(H v) { return sum(v); }
#endif

inline void put(H v, float* p) { memcpy(p, &v, sizeof v); }
// What eight() read: the upper halves.
inline void put(H v, uint16_t* p) {
#if defined(__AVX2__)
  const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
#else
  store(p, v, Whole{});
#endif
}

// The first `count` of 8, then zeros.
template <class T>
inline H some(const T* p, int64_t count) {
  if (count >= 8) return eight(p);
  T all[8] = {};
  for (int64_t i = 0; i < count; i++) all[i] = p[i];
  return eight(all);
}

int64_t ones_between(const uint8_t* bits, int64_t begin, int64_t end) {
  int64_t count = 0, e = begin;
  for (; e < end && e % 64 != 0; e += 64 - e % 64) {
    const int64_t rest = 64 - e % 64;
    count += __builtin_popcountll(bits_at(bits, e, end - e < rest ? end - e : rest));
  }
  for (; e + 64 <= end; e += 64) count += __builtin_popcountll(load_word(bits, e / 64));
  if (e < end) count += __builtin_popcountll(bits_at(bits, e, end - e));
  return count;
}

// y[b, n] for two rows of W from row n on, and B rows of x; returns where the values of the next row begin. Two, because
// x is read once for both and neither waits for the other's counts: one at a time takes 1.2 to 1.9 times as long
// (90 % zeros, B 1 to 8, AMD EPYC). What is loaded may pass the last value needed.
template <int B, class T>
const T* two_rows(const float* x, int64_t k, const T* values, const uint8_t* bits, int64_t n, const float* bias, float* y,
                  int64_t ld) {
  const T* at[2] = {values, values + ones_between(bits, n * k, (n + 1) * k)};
  const T* next = at[1] + ones_between(bits, (n + 1) * k, (n + 2) * k);
  const bool aligned = k % 64 == 0;
  // The last columns of x, where they are fewer than 64, with zeros behind them.
  float ends[B][64];
  if (!aligned) {
    memset(ends, 0, sizeof ends);
    for (int b = 0; b < B; b++) memcpy(ends[b], x + b * k + k / 64 * 64, size_t(k % 64) * sizeof(float));
  }
  H sums[2][B];
  for (int r = 0; r < 2; r++)
    for (int b = 0; b < B; b++) sums[r][b] = zeros();
  for (int64_t c = 0; c < k; c += 64) {
    const int64_t count = k - c < 64 ? k - c : 64, stride = count == 64 ? k : 64;
    const float* columns = count == 64 ? x + c : ends[0];
    uint64_t words[2];
    for (int r = 0; r < 2; r++) {
      // Two lines, as many as a word at half density takes.
      __builtin_prefetch(at[r] + 1024 / sizeof(T));
      __builtin_prefetch(at[r] + 1088 / sizeof(T));
      const int64_t bit = (n + r) * k + c;
      words[r] = aligned ? load_word(bits, bit / 64) : bits_at(bits, bit, count);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < 64; i += 8) {
      H eights[B];
      for (int b = 0; b < B; b++) eights[b] = eight(columns + b * stride + i);
      for (int r = 0; r < 2; r++) {
        const T* p = at[r] + __builtin_popcountll(words[r] & low_ones(i));
        const H w = spread(eight(p), uint32_t(words[r] >> i & 0xFF));
        for (int b = 0; b < B; b++) sums[r][b] = fused(w, eights[b], sums[r][b]);
      }
    }
    for (int r = 0; r < 2; r++) at[r] += __builtin_popcountll(words[r]);
  }
  for (int r = 0; r < 2; r++)
    for (int b = 0; b < B; b++) y[b * ld + n + r] = added(sums[r][b]) + (bias != nullptr ? bias[n + r] : 0.0f);
  return next;
}

// The same for one row of W, and with no load past `end`: for the last rows.
template <class T>
const T* last_row(const float* x, int64_t b, int64_t k, const T* values, const T* end, const uint8_t* bits, int64_t n,
                  const float* bias, float* y, int64_t ld) {
  const T* next = values + ones_between(bits, n * k, (n + 1) * k);
  for (int64_t row = 0; row < b; row++) {
    const T* p = values;
    H sums = zeros();
    for (int64_t c = 0; c < k; c += 8) {
      const uint32_t byte = uint32_t(bits_at(bits, n * k + c, k - c < 8 ? k - c : 8));
      sums = fused(spread(some(p, end - p), byte), some(x + row * k + c, k - c), sums);
      p += __builtin_popcount(byte);
    }
    y[row * ld + n] = added(sums) + (bias != nullptr ? bias[n] : 0.0f);
  }
  return next;
}

template <class T>
void product(const float* x, const T* values, const uint8_t* bits, const int64_t* starts, int64_t piece, int64_t b,
             int64_t n, int64_t k, const float* bias, float* y, int64_t threads) {
  const T* end = values + starts[(n + piece - 1) / piece];
  pieces(n, piece, threads, [=](int64_t begin, int64_t stop) {
    for (int64_t row = 0; row < b;) {
      const int64_t count = b - row >= 8 ? 8 : b - row >= 4 ? 4 : b - row >= 2 ? 2 : 1;
      const T* at = values + starts[begin / piece];
      const float* from = x + row * k;
      float* to = y + row * n;
      int64_t r = begin;
      for (; r + 2 <= stop && end - at >= 2 * k + 8; r += 2) {
        if (count == 8) at = two_rows<8>(from, k, at, bits, r, bias, to, n);
        if (count == 4) at = two_rows<4>(from, k, at, bits, r, bias, to, n);
        if (count == 2) at = two_rows<2>(from, k, at, bits, r, bias, to, n);
        if (count == 1) at = two_rows<1>(from, k, at, bits, r, bias, to, n);
      }
      for (; r < stop; r++) at = last_row(from, count, k, at, end, bits, r, bias, to, n);
      row += count;
    }
  });
}

template <class T>
void scatter(const T* values, const T* end, const uint8_t* bits, int64_t begin, int64_t stop, T* out) {
  for (int64_t e = begin; e < stop; e += 64, out += 64) {
    const uint64_t word = bits_at(bits, e, stop - e < 64 ? stop - e : 64);
    if (e + 64 <= stop && end - values >= 64 + 8) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < 64; i += 8) {
        const T* p = values + __builtin_popcountll(word & low_ones(i));
        put(spread(eight(p), uint32_t(word >> i & 0xFF)), out + i);
      }
    } else {
      const T* p = values;
      for (int64_t i = 0; e + i < stop && i < 64; i++) out[i] = word >> i & 1 ? *p++ : T(0);
    }
    values += __builtin_popcountll(word);
  }
}

}  // namespace

void count_ones(const uint8_t* bits, int64_t n, int64_t piece, int64_t* starts, int64_t threads) {
  starts[0] = 0;
  pieces(n, piece, threads,
         [=](int64_t begin, int64_t end) { starts[begin / piece + 1] = ones_between(bits, begin, end); });
  for (int64_t i = 0; i < (n + piece - 1) / piece; i++) starts[i + 1] += starts[i];
}

void compressed_linear(const float* x, const void* values, int64_t kind, const uint8_t* bits, const int64_t* starts,
                       int64_t piece, int64_t b, int64_t n, int64_t k, const float* bias, float* y, int64_t threads) {
  const float* v32 = static_cast<const float*>(values);
  const uint16_t* v16 = static_cast<const uint16_t*>(values);
  if (kind == 0) return product(x, v32, bits, starts, piece, b, n, k, bias, y, threads);
  product(x, v16, bits, starts, piece, b, n, k, bias, y, threads);
}

void expand_values(const void* values, int64_t kind, const uint8_t* bits, const int64_t* starts, int64_t piece, int64_t n,
                   int64_t first_piece, int64_t count, void* out, int64_t threads) {
  const int64_t total = starts[(n + piece - 1) / piece];
  parallel(count, threads, [=](int64_t i) {
    const int64_t begin = (first_piece + i) * piece, stop = begin + piece < n ? begin + piece : n;
    const int64_t from = starts[first_piece + i], to = i * piece;
    if (kind == 0) {
      const float* v = static_cast<const float*>(values);
      scatter(v + from, v + total, bits, begin, stop, static_cast<float*>(out) + to);
    } else {
      const uint16_t* v = static_cast<const uint16_t*>(values);
      scatter(v + from, v + total, bits, begin, stop, static_cast<uint16_t*>(out) + to);
    }
  });
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
