// sample_mask: 16 counters at a time give 64 words, which are compared with 64 integer thresholds.
//
// Word j of counter i belongs to element 4 i + j. Words stay where Philox leaves them, [j][i]; the thresholds are laid
// out likewise, once for all samples, and the four 16-bit results are interleaved as bits.
#include "../philox.h"
#include "kernels.h"
#include "vec.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

constexpr int64_t kWordsAPiece = 128;  // 8 K elements, some 4 us a sample

struct Block {
  uint32_t lane[4][16];
};

#if defined(__AVX512F__)
using D = __m512i;
inline D each(uint32_t v) { return _mm512_set1_epi64(v); }
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
inline D each(uint32_t v) { return _mm256_set1_epi64x(v); }
inline D evens() { return _mm256_setr_epi64x(0, 2, 4, 6); }
inline D add(D a, D b) { return _mm256_add_epi64(a, b); }
inline D times(D a, D b) { return _mm256_mul_epu32(a, b); }
inline D high(D a) { return _mm256_srli_epi64(a, 32); }
inline D xor3(D a, D b, D c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void store_pair(uint32_t* out, D even, D odd) {
  _mm256_storeu_si256((__m256i*)out, _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
}
#endif

// Counters lie in 64-bit lanes, even ones in one vector and odd ones in another: a product of 32-bit numbers is one
// instruction there, and what is left in the upper halves is never read.
inline void philox16(int64_t counter, uint32_t sample, uint32_t stream, uint64_t seed, Block& out) {
#if defined(__AVX512F__) || defined(__AVX2__)
  const D m0 = each(0xD2511F53u), m1 = each(0xCD9E8D57u);
  for (int64_t at = 0; at < 16; at += L) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    // 16 divides 2^32, so that the high half is one number for all lanes.
    const D base = add(each(uint32_t(counter + at)), evens());
    D a0 = base, a1 = each(uint32_t(counter >> 32)), a2 = each(sample), a3 = each(stream);
    D b0 = add(base, each(1)), b1 = a1, b2 = a2, b3 = a3;
    for (int round = 0; round < 10; round++) {
      const D key0 = each(k0), key1 = each(k1);
      const D p0 = times(a0, m0), p1 = times(a2, m1), q0 = times(b0, m0), q1 = times(b2, m1);
      a0 = xor3(high(p1), a1, key0), a1 = p1, a2 = xor3(high(p0), a3, key1), a3 = p0;
      b0 = xor3(high(q1), b1, key0), b1 = q1, b2 = xor3(high(q0), b3, key1), b3 = q0;
      philox_advance_key(k0, k1);
    }
    store_pair(out.lane[0] + at, a0, b0);
    store_pair(out.lane[1] + at, a1, b1);
    store_pair(out.lane[2] + at, a2, b2);
    store_pair(out.lane[3] + at, a3, b3);
  }
#else
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int i = 0; i < 16; i++) {
    out.lane[0][i] = uint32_t(counter) + uint32_t(i);
    out.lane[1][i] = uint32_t(counter >> 32);
    out.lane[2][i] = sample;
    out.lane[3][i] = stream;
  }
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < 16; i++)
      philox_round(out.lane[0][i], out.lane[1][i], out.lane[2][i], out.lane[3][i], k0, k1);
    philox_advance_key(k0, k1);
  }
#endif
}

// Bit i is 1 where word i >> 8 is below threshold i; both are below 2^25.
inline uint32_t below(const uint32_t* words, const uint32_t* thresholds) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epu32_mask(_mm512_srli_epi32(_mm512_loadu_si512(words), 8), _mm512_loadu_si512(thresholds));
#elif defined(__AVX2__)
  uint32_t bits = 0;
  for (int i = 0; i < 16; i += 8) {
    const __m256i k = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i*)(words + i)), 8);
    const __m256i t = _mm256_loadu_si256((const __m256i*)(thresholds + i));
    bits |= uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(t, k)))) << i;
  }
  return bits;
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits |= uint32_t((words[i] >> 8) < thresholds[i]) << i;
  return bits;
#endif
}

// Element 4 i + j to lane [j][i].
inline void deal(const uint32_t* level, Block& out) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
  const __m512i a = _mm512_loadu_si512(level), b = _mm512_loadu_si512(level + 16);
  const __m512i c = _mm512_loadu_si512(level + 32), d = _mm512_loadu_si512(level + 48);
  const __m512i ab01 = _mm512_permutex2var_epi32(a, first, b), cd01 = _mm512_permutex2var_epi32(c, first, d);
  const __m512i ab23 = _mm512_permutex2var_epi32(a, second, b), cd23 = _mm512_permutex2var_epi32(c, second, d);
  _mm512_storeu_si512(out.lane[0], _mm512_shuffle_i32x4(ab01, cd01, 0x44));
  _mm512_storeu_si512(out.lane[1], _mm512_shuffle_i32x4(ab01, cd01, 0xEE));
  _mm512_storeu_si512(out.lane[2], _mm512_shuffle_i32x4(ab23, cd23, 0x44));
  _mm512_storeu_si512(out.lane[3], _mm512_shuffle_i32x4(ab23, cd23, 0xEE));
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) out.lane[j][i] = level[4 * i + j];
#endif
}

inline float logit_at(const float* p, int64_t i) { return p[i]; }
inline float logit_at(const uint16_t* p, int64_t i) { return widen_one(p[i]); }

template <class T>
void sample(const T* logits, int64_t n, uint64_t seed, int64_t samples, uint32_t stream, uint8_t* bits,
            int64_t threads) {
  const int64_t words = packed_words(n);
  pieces(words, kWordsAPiece, threads, [=](int64_t begin, int64_t end) {
    Block thresholds, random;
    float values[64];
    uint32_t level[64];
    for (int64_t w = begin; w < end; w++) {
      const int64_t count = 64 * w + 64 <= n ? 64 : n - 64 * w;
      // Past the end the threshold is 0 and so is the padding bit.
      if (count == 64) {
        for (int64_t i = 0; i < 64; i++) values[i] = logit_at(logits, 64 * w + i);
      } else {
        for (int64_t i = 0; i < 64; i++) values[i] = i < count ? logit_at(logits, 64 * w + i) : -40.0f;
      }
      for (int i = 0; i < 64; i++) level[i] = threshold(values[i]);
      deal(level, thresholds);
      for (int64_t s = 0; s < samples; s++) {
        philox16(16 * w, uint32_t(s), stream, seed, random);
        uint64_t word = 0;
        for (int j = 0; j < 4; j++) word |= spread_by_four(below(random.lane[j], thresholds.lane[j])) << j;
        store_word(bits + s * words * 8, w, word);
      }
    }
  });
}

}  // namespace

void sample_mask(const void* logits, int64_t kind, int64_t n, uint64_t seed, int64_t samples, uint32_t stream,
                 uint8_t* bits, int64_t threads) {
  if (kind == 0) return sample(static_cast<const float*>(logits), n, seed, samples, stream, bits, threads);
  sample(static_cast<const uint16_t*>(logits), n, seed, samples, stream, bits, threads);
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
