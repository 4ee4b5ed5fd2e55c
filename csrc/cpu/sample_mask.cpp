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

inline void philox16(int64_t counter, uint32_t sample, uint32_t stream, uint64_t seed, Block& out) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#if defined(__AVX512F__)
  const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // 16 divides 2^32, so that the high half is one number for all lanes.
  __m512i c0 = _mm512_add_epi32(_mm512_set1_epi32(int(uint32_t(counter))), step);
  __m512i c1 = _mm512_set1_epi32(int(uint32_t(counter >> 32)));
  __m512i c2 = _mm512_set1_epi32(int(sample)), c3 = _mm512_set1_epi32(int(stream));
  const __m512i m0 = _mm512_set1_epi32(int(0xD2511F53u)), m1 = _mm512_set1_epi32(int(0xCD9E8D57u));
  const __mmask16 odd = 0xAAAA;
  for (int round = 0; round < 10; round++) {
    const __m512i even0 = _mm512_mul_epu32(c0, m0), odd0 = _mm512_mul_epu32(_mm512_srli_epi64(c0, 32), m0);
    const __m512i even1 = _mm512_mul_epu32(c2, m1), odd1 = _mm512_mul_epu32(_mm512_srli_epi64(c2, 32), m1);
    const __m512i high0 = _mm512_mask_mov_epi32(_mm512_srli_epi64(even0, 32), odd, odd0);
    const __m512i high1 = _mm512_mask_mov_epi32(_mm512_srli_epi64(even1, 32), odd, odd1);
    const __m512i low0 = _mm512_mask_mov_epi32(even0, odd, _mm512_slli_epi64(odd0, 32));
    const __m512i low1 = _mm512_mask_mov_epi32(even1, odd, _mm512_slli_epi64(odd1, 32));
    // 0x96 is the exclusive or of three.
    c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(int(k0)), 0x96);
    c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(int(k1)), 0x96);
    c1 = low1;
    c3 = low0;
    philox_advance_key(k0, k1);
  }
  _mm512_storeu_si512(out.lane[0], c0);
  _mm512_storeu_si512(out.lane[1], c1);
  _mm512_storeu_si512(out.lane[2], c2);
  _mm512_storeu_si512(out.lane[3], c3);
#else
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
      for (int64_t i = 0; i < count; i++) values[i] = logit_at(logits, 64 * w + i);
      for (int64_t i = count; i < 64; i++) values[i] = -40.0f;
      for (int i = 0; i < 64; i++) level[i] = threshold(values[i]);
      for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++) thresholds.lane[j][i] = level[4 * i + j];
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
