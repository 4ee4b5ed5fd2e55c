// Elements of a tensor as floats: float32 as they lie, bfloat16 (uint16_t) widened, and rounded to nearest even on
// the way back. `rounded` and `store` are apart so that what is selected in between keeps all its bits, NaN's too.
#pragma once

#include "vec.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

// All lanes of a vector: loads and stores need no mask.
struct Whole {};
inline F load(const float* p, Whole) { return load(p); }
inline void store(float* p, F v, Whole) { store(p, v); }
inline F load(const uint16_t* p, Whole) { return widen(p); }

// The value an element of type T would hold.
template <class T>
inline F rounded(F v);
template <>
inline F rounded<float>(F v) {
  return v;
}

#if defined(__AVX512F__)

template <>
inline F rounded<uint16_t>(F v) {
  const I bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const M number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
  const I chosen = _mm512_mask_blend_epi32(number, _mm512_set1_epi32(0x7FC00000), up);
  return _mm512_castsi512_ps(_mm512_and_si512(chosen, _mm512_set1_epi32(int(0xFFFF0000))));
}
inline F load(const uint16_t* p, M m) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
inline __m256i upper(F v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)); }
inline void store(uint16_t* p, F v, Whole) { _mm256_storeu_si256((__m256i*)p, upper(v)); }
inline void store(uint16_t* p, F v, M m) { _mm256_mask_storeu_epi16(p, m, upper(v)); }
inline F root(F v) { return _mm512_sqrt_ps(v); }
// The larger, or NaN where one is.
inline F larger(F a, F b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}

#else

#if defined(__AVX2__)

template <>
inline F rounded<uint16_t>(F v) {
  const I bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const I up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const F chosen = _mm256_blendv_ps(_mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), _mm256_castsi256_ps(up),
                                    _mm256_cmp_ps(v, v, _CMP_ORD_Q));
  return _mm256_and_ps(chosen, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xFFFF0000))));
}
inline void store(uint16_t* p, F v, Whole) {
  const I upper = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  _mm_storeu_si128((__m128i*)p, packed);
}
inline F root(F v) { return _mm256_sqrt_ps(v); }
inline F larger(F a, F b) { return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }

#else

template <>
inline F rounded<uint16_t>(F v) {
  typedef uint32_t U __attribute__((vector_size(32)));
  const U bits = (U)v;
  const I up = (I)(bits + 0x7FFF + (bits >> 16 & 1)), number = v == v;
  return (F)(((up & number) | (0x7FC00000 & ~number)) & int(0xFFFF0000));
}
inline void store(uint16_t* p, F v, Whole) {
  for (int i = 0; i < L; i++) p[i] = uint16_t(uint32_t(((I)v)[i]) >> 16);
}
inline F root(F v) {
  for (int i = 0; i < L; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
inline F larger(F a, F b) { return blend((I)(a > b) | (I)(a != a), a, b); }

#endif

// The ends of tensors alone come here.
inline F load(const uint16_t* p, M m) {
  int32_t there[L];
  uint32_t found[L];
  memcpy(there, &m, sizeof there);
  for (int i = 0; i < L; i++) found[i] = there[i] ? uint32_t(p[i]) << 16 : 0;
  F v;
  memcpy(&v, found, sizeof v);
  return v;
}
inline void store(uint16_t* p, F v, M m) {
  int32_t there[L];
  uint32_t bits[L];
  memcpy(there, &m, sizeof there);
  memcpy(bits, &v, sizeof bits);
  for (int i = 0; i < L; i++)
    if (there[i]) p[i] = uint16_t(bits[i] >> 16);
}

#endif

}  // namespace
}  // namespace FASTMASK_ISA
}  // namespace fastmask
