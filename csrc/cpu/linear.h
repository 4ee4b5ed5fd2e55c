// What the products of masked_linear share: rows of x by mask, weights selected as they are loaded, scratch.
#pragma once

#include <stdlib.h>
#include <new>

#include "pages.h"
#include "vec.h"

namespace fastmask {
namespace FASTMASK_ISA {

// Equal consecutive groups of rows, or those that `starts` (samples + 1) names; and what each mask's sums are times.
struct Rows {
  const int64_t* starts;
  int64_t rows, samples;
  const float* scales;
  float sign;
  float scale(int64_t s) const { return scales != nullptr ? scales[s] : sign; }
  int64_t begin(int64_t s) const { return starts != nullptr ? starts[s] : s * (rows / samples); }
  int64_t end(int64_t s) const { return begin(s + 1); }
  int64_t count(int64_t s) const { return end(s) - begin(s); }
};

// Whether there are kernels for many rows of a dtype.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool kMany = true;
#else
template <class T>
constexpr bool kMany = sizeof(T) == 4;
#endif

// out (rows of x, R) = scale of the mask * sum over c in [0, C) of A(r, c) x[b, c] + bias, A the weights under the mask
// or, across, their transpose.
template <bool across, bool flip, class T>
void many_rows(const T* x, const T* w, const uint8_t* bits, const Rows& rows, int64_t n, int64_t k, const T* bias,
               T* out, int64_t threads);

namespace {

// How a weight is read under its mask's bits: inactive ones as 0, or all of them with the sign of active ones changed,
// which is -where(active, W, -W): the sums are scaled by -1.
template <bool flip>
inline F weight(const float* p, M m) {
  if constexpr (flip) return negate(load(p), m);
#if defined(__AVX512F__)
  return load(p, m);
#else
  return keep(load(p), m);
#endif
}
template <bool flip>
inline F weight(const uint16_t* p, M m) {
  return flip ? negate(widen(p), m) : keep(widen(p), m);
}
template <bool flip>
inline F weight_tail(const float* p, M m, int64_t count) {
  return flip ? negate(load(p, first(count)), m) : load(p, both(m, first(count)));
}
template <bool flip>
inline F weight_tail(const uint16_t* p, M m, int64_t count) {
  uint16_t whole[L] = {};
  memcpy(whole, p, 2 * size_t(count));
  return weight<flip>(whole, m);
}
#if defined(__AVX512BW__)
// 32 halves, or the first `count` of them, which may be none or less.
template <bool flip>
inline __m512i halves(const uint16_t* p, uint32_t bits) {
  if constexpr (!flip) return _mm512_maskz_loadu_epi16(bits, p);
  const __m512i v = _mm512_loadu_si512(p);
  return _mm512_mask_add_epi16(v, bits, v, _mm512_set1_epi16(int16_t(0x8000)));
}
template <bool flip>
inline __m512i halves(const uint16_t* p, uint32_t bits, int64_t count) {
  if constexpr (!flip) return _mm512_maskz_loadu_epi16(bits, p);
  const __m512i v = _mm512_maskz_loadu_epi16(count > 0 ? __mmask32(low_ones(count)) : 0, p);
  return _mm512_mask_add_epi16(v, bits, v, _mm512_set1_epi16(int16_t(0x8000)));
}
#endif
inline float plain(float v) { return v; }
inline float plain(uint16_t v) { return widen_one(v); }
inline void put(float* p, float v) { *p = v; }
// To nearest, ties to even; a NaN stays one.
inline void put(uint16_t* p, float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  *p = uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? bits >> 16 | 0x40u : rounded);
}

// Memory of a thread that lives from call to call, aligned to 64 bytes: what is fresh costs a page fault each 4 KB,
// 1 MB as long as a product of 8 rows with a million weights. Blocks of more than 16 MB are given back at the next call.
class Scratch {
 public:
  ~Scratch() { free(memory); }
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > size || size > kKept) {
      free(memory);
      size = 0;
      memory = aligned_alloc(64, bytes > 0 ? bytes : 64);
      if (memory == nullptr) throw std::bad_alloc();
      size = bytes;
    }
    return static_cast<T*>(memory);
  }

 private:
  static constexpr size_t kKept = 16 << 20;
  void* memory = nullptr;
  size_t size = 0;
};

}  // namespace
}  // namespace FASTMASK_ISA
}  // namespace fastmask
