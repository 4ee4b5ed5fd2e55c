// One vector of floats of the instruction set a file is compiled for, and masks of its lanes.
//
// F has the operators + - * / of the compiler's vector types, which are never contracted here: fma() is written where
// it is meant. Everything is static: two instruction sets must never share a function through the linker.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../bits.h"
#include "pool.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

#if defined(__AVX512F__)

constexpr int64_t L = 16;  // lanes
using F = __m512;
using I = __m512i;
using M = __mmask16;

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F set1(float v) { return _mm512_set1_ps(v); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// Lanes of a mask: L bits at `bits`; those of a word from bit `at`; the first `count`.
inline M lanes(const uint8_t* bits) {
  uint16_t value;
  memcpy(&value, bits, 2);
  return value;
}
inline M lanes(uint64_t word, int64_t at) { return M(word >> at); }
inline M first(int64_t count) { return M(low_ones(count)); }
inline M both(M a, M b) { return a & b; }
// Inactive lanes are 0, and where they lie in memory is not touched; negate() changes the sign of active ones.
inline F load(const float* p, M m) { return _mm512_maskz_loadu_ps(m, p); }
inline void store(float* p, F v, M m) { _mm512_mask_storeu_ps(p, m, v); }
inline F keep(F v, M m) { return _mm512_maskz_mov_ps(m, v); }
inline F negate(F v, M m) { return _mm512_mask_xor_ps(v, m, v, _mm512_set1_ps(-0.0f)); }
inline F blend(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
inline uint32_t greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline F widen(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline float sum(F v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

#elif defined(__AVX2__)

constexpr int64_t L = 8;
using F = __m256;
using I = __m256i;
using M = __m256i;

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F set1(float v) { return _mm256_set1_ps(v); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// The masks of all bytes, 8 KB: one load, where to spread and compare a byte takes three instructions.
struct Expanded {
  alignas(32) int32_t lanes[256][8];
  constexpr Expanded() : lanes() {
    for (int byte = 0; byte < 256; byte++)
      for (int i = 0; i < 8; i++) lanes[byte][i] = -(byte >> i & 1);
  }
};
constexpr Expanded kExpanded;
inline M expand(uint32_t byte) { return _mm256_load_si256((const __m256i*)kExpanded.lanes[byte]); }
inline M lanes(const uint8_t* bits) { return expand(*bits); }
inline M lanes(uint64_t word, int64_t at) { return expand(uint32_t(word >> at & 0xFF)); }
inline M first(int64_t count) { return expand(uint32_t(low_ones(count)) & 0xFF); }
inline M both(M a, M b) { return _mm256_and_si256(a, b); }
inline F load(const float* p, M m) { return _mm256_maskload_ps(p, m); }
inline void store(float* p, F v, M m) { _mm256_maskstore_ps(p, m, v); }
inline F keep(F v, M m) { return _mm256_and_ps(v, _mm256_castsi256_ps(m)); }
inline F negate(F v, M m) { return _mm256_xor_ps(v, keep(_mm256_set1_ps(-0.0f), m)); }
inline F blend(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m)); }
inline uint32_t greater(F a, F b) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ))); }
inline F widen(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline float sum(F v) {
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

#else

constexpr int64_t L = 8;
typedef float F __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));
using M = I;

inline F load(const float* p) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { memcpy(p, &v, sizeof v); }
inline F set1(float v) { return F{v, v, v, v, v, v, v, v}; }
// Rounded once, as the other instruction sets do: the bits of the optimizers depend on it.
inline F fma_once(F a, F b, F c) {
  for (int i = 0; i < L; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
inline F fma(F a, F b, F c) { return a * b + c; }
inline M expand(uint32_t byte) {
  const I one = {1, 2, 4, 8, 16, 32, 64, 128};
  const int b = int(byte);
  return (I{b, b, b, b, b, b, b, b} & one) == one;
}
inline M lanes(const uint8_t* bits) { return expand(*bits); }
inline M lanes(uint64_t word, int64_t at) { return expand(uint32_t(word >> at & 0xFF)); }
inline M first(int64_t count) { return expand(uint32_t(low_ones(count)) & 0xFF); }
inline M both(M a, M b) { return a & b; }
inline F load(const float* p, M m) {
  F v = set1(0.0f);
  for (int i = 0; i < L; i++)
    if (m[i]) v[i] = p[i];
  return v;
}
inline void store(float* p, F v, M m) {
  for (int i = 0; i < L; i++)
    if (m[i]) p[i] = v[i];
}
inline F keep(F v, M m) { return (F)((I)v & m); }
inline F negate(F v, M m) { return (F)((I)v ^ ((I)set1(-0.0f) & m)); }
inline F blend(M m, F yes, F no) { return (F)(((I)yes & m) | ((I)no & ~m)); }
inline uint32_t greater(F a, F b) {
  const I m = a > b;
  uint32_t bits = 0;
  for (int i = 0; i < L; i++) bits |= uint32_t(m[i] & 1) << i;
  return bits;
}
inline F widen(const uint16_t* p) {
  I v;
  for (int i = 0; i < L; i++) v[i] = int32_t(uint32_t(p[i]) << 16);
  return (F)v;
}
inline float sum(F v) {
  const float a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
  return (a + c) + (b + d);
}

#endif

#if defined(__AVX2__) || defined(__AVX512F__)
inline F fma_once(F a, F b, F c) { return fma(a, b, c); }
#endif

inline float widen_one(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Call body(i) for each i in [0, tasks).
template <class Body>
inline void parallel(int64_t tasks, int64_t threads, Body body) {
  run(tasks, threads, [](void* context, int64_t i) { (*static_cast<Body*>(context))(i); }, &body);
}

// Call body(begin, end) on equal pieces of [0, n) of `grain` each: the pieces do not depend on the threads.
template <class Body>
inline void pieces(int64_t n, int64_t grain, int64_t threads, Body body) {
  parallel((n + grain - 1) / grain, threads, [&](int64_t i) {
    const int64_t begin = i * grain;
    body(begin, begin + grain < n ? begin + grain : n);
  });
}

}  // namespace
}  // namespace FASTMASK_ISA
}  // namespace fastmask
