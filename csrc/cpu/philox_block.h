// 16 counters of Philox at a time, 64 words: word j of counter i lies in lane [j][i] and belongs to element 4 i + j.
#pragma once

#include "../philox.h"
#include "vec.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

struct Block {
  uint32_t lane[4][16];
};

#if defined(__AVX512F__)
using D = __m512i;
inline D each(uint64_t v) { return _mm512_set1_epi64(int64_t(v)); }
inline D evens() { return _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14); }
inline D add(D a, D b) { return _mm512_add_epi64(a, b); }
inline D times(D a, D b) { return _mm512_mul_epu32(a, b); }
inline D high(D a) { return _mm512_srli_epi64(a, 32); }
inline D xor3(D a, D b, D c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline void store_pair(uint32_t* out, D even, D odd) {
  _mm512_storeu_si512(out, _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32)));
}
#elif defined(__AVX2__)
using D = __m256i;
inline D each(uint64_t v) { return _mm256_set1_epi64x(int64_t(v)); }
inline D evens() { return _mm256_setr_epi64x(0, 2, 4, 6); }
inline D add(D a, D b) { return _mm256_add_epi64(a, b); }
inline D times(D a, D b) { return _mm256_mul_epu32(a, b); }
inline D high(D a) { return _mm256_srli_epi64(a, 32); }
inline D xor3(D a, D b, D c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void store_pair(uint32_t* out, D even, D odd) {
  _mm256_storeu_si256((__m256i*)out, _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
}
#endif

// The keys of the ten rounds, once for all counters: an instruction reads its key from memory for nothing, where to
// advance it and to put it into all lanes takes a sixth of the time (AVX-512, Zen 4).
struct Keys {
  uint64_t k0[10], k1[10];
  explicit Keys(uint64_t seed) {
    uint32_t a = uint32_t(seed), b = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
      k0[round] = a;
      k1[round] = b;
      philox_advance_key(a, b);
    }
  }
};

// Counters lie in 64-bit lanes, even ones in one vector and odd ones in another: a product of 32-bit numbers is one
// instruction there, and what is left in the upper halves is never read.
inline void philox16(int64_t counter, uint32_t sample, uint32_t stream, const Keys& keys, Block& out) {
#if defined(__AVX512F__) || defined(__AVX2__)
  const D m0 = each(0xD2511F53u), m1 = each(0xCD9E8D57u);
  for (int64_t at = 0; at < 16; at += L) {
    // 16 divides 2^32, so that the high half is one number for all lanes.
    const D base = add(each(uint32_t(counter + at)), evens());
    D a0 = base, a1 = each(uint32_t(counter >> 32)), a2 = each(sample), a3 = each(stream);
    D b0 = add(base, each(1)), b1 = a1, b2 = a2, b3 = a3;
    for (int round = 0; round < 10; round++) {
      const D key0 = each(keys.k0[round]), key1 = each(keys.k1[round]);
      const D p0 = times(a0, m0), p1 = times(a2, m1), q0 = times(b0, m0), q1 = times(b2, m1);
      a0 = xor3(high(p1), a1, key0), a1 = p1, a2 = xor3(high(p0), a3, key1), a3 = p0;
      b0 = xor3(high(q1), b1, key0), b1 = q1, b2 = xor3(high(q0), b3, key1), b3 = q0;
    }
    store_pair(out.lane[0] + at, a0, b0);
    store_pair(out.lane[1] + at, a1, b1);
    store_pair(out.lane[2] + at, a2, b2);
    store_pair(out.lane[3] + at, a3, b3);
  }
#else
  for (int i = 0; i < 16; i++) {
    out.lane[0][i] = uint32_t(counter) + uint32_t(i);
    out.lane[1][i] = uint32_t(counter >> 32);
    out.lane[2][i] = sample;
    out.lane[3][i] = stream;
  }
  for (int round = 0; round < 10; round++)
    for (int i = 0; i < 16; i++)
      philox_round(out.lane[0][i], out.lane[1][i], out.lane[2][i], out.lane[3][i], uint32_t(keys.k0[round]),
                   uint32_t(keys.k1[round]));
#endif
}

}  // namespace
}  // namespace FASTMASK_ISA
}  // namespace fastmask
