// sample_mask: 16 counters at a time give 64 words, which are compared with 64 integer thresholds.
//
// Word j of counter i belongs to element 4 i + j. Words stay where Philox leaves them, [j][i]; the thresholds are laid
// out likewise, once for all samples, and the four 16-bit results are interleaved as bits.
#include "kernels.h"
#include "philox_block.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

constexpr int64_t kWordsAPiece = 128;  // 8 K elements, some 4 us a sample

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

// T(l) of 64 logits: the operations of threshold() in philox.h, in fewer instructions. All 2^32 logits agree.
inline void levels_of(const float* logits, uint32_t* out) {
#if defined(__AVX512F__)
  constexpr float kExp[] = {-0.00831876509f, 0.0419019051f, -0.166671857f, 0.499990255f, -0.999999821f, 1.0f};
  for (int i = 0; i < 64; i += 16) {
    const F l = load(logits + i), one = set1(1.0f);
    // Of a NaN the minimum is 40 and the comparison below is false: it counts as -40.
    const F a = _mm512_min_ps(_mm512_abs_ps(l), set1(40.0f));
    // -n, all signs being turned.
    const F n = _mm512_roundscale_ps(a * set1(-1.44269502162933349609375f) - set1(0.5f), 3);  // cut off
    const F r = a + n * set1(0.693359375f) + n * set1(-2.12194442e-4f);
    F z = set1(kExp[0]);
    for (int c = 1; c < 6; c++) z = z * r + set1(kExp[c]);
    z = _mm512_scalef_ps(z, n);
    const F s = _mm512_mask_mov_ps(z, _mm512_cmp_ps_mask(l, set1(0.0f), _CMP_GE_OQ), one) / (one + z);
    _mm512_storeu_si512(out + i, _mm512_cvttps_epi32(s * set1(16777216.0f)));
  }
#else
  for (int i = 0; i < 64; i++) out[i] = threshold(logits[i]);
#endif
}

inline float logit_at(const float* p, int64_t i) { return p[i]; }
inline float logit_at(const uint16_t* p, int64_t i) { return widen_one(p[i]); }

template <class T>
void sample(const T* logits, int64_t n, uint64_t seed, int64_t samples, uint32_t stream, uint8_t* bits,
            int64_t threads) {
  const int64_t words = packed_words(n);
  const Keys keys(seed);
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
      levels_of(values, level);
      deal(level, thresholds);
      for (int64_t s = 0; s < samples; s++) {
        philox16(16 * w, uint32_t(s), stream, keys, random);
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
