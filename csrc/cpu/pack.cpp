// pack: 64 elements make one word.
#include "kernels.h"
#include "vec.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

constexpr int64_t kWordsAPiece = 2048;  // 128 K elements: far more work than waking a thread

inline uint64_t word_of(const uint8_t* mask) {
#if defined(__AVX512F__)
  const __m512i v = _mm512_loadu_si512(mask);
  return _mm512_test_epi8_mask(v, v);
#elif defined(__AVX2__)
  uint64_t word = 0;
  for (int i = 0; i < 2; i++) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)(mask + 32 * i));
    const __m256i zero = _mm256_cmpeq_epi8(v, _mm256_setzero_si256());
    word |= uint64_t(uint32_t(~_mm256_movemask_epi8(zero))) << (32 * i);
  }
  return word;
#else
  uint64_t word = 0;
  for (int i = 0; i < 64; i++) word |= uint64_t(mask[i] != 0) << i;
  return word;
#endif
}

inline F scores_at(const float* p) { return load(p); }
inline F scores_at(const uint16_t* p) { return widen(p); }
inline float score_at(const float* p) { return *p; }
inline float score_at(const uint16_t* p) { return widen_one(*p); }

template <class T>
void above(const T* scores, float mu, int64_t n, uint8_t* bits, int64_t threads) {
  pieces(packed_words(n), kWordsAPiece, threads, [=](int64_t begin, int64_t end) {
    const F level = set1(mu);
    for (int64_t w = begin; w < end; w++) {
      uint64_t word = 0;
      if (64 * w + 64 <= n) {
        for (int64_t i = 0; i < 64; i += L) word |= uint64_t(greater(scores_at(scores + 64 * w + i), level)) << i;
      } else {
        for (int64_t i = 0; 64 * w + i < n; i++) word |= uint64_t(score_at(scores + 64 * w + i) > mu) << i;
      }
      store_word(bits, w, word);
    }
  });
}

}  // namespace

void pack_bools(const uint8_t* mask, int64_t n, uint8_t* bits, int64_t threads) {
  pieces(packed_words(n), kWordsAPiece, threads, [=](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; w++) {
      uint64_t word = 0;
      if (64 * w + 64 <= n) {
        word = word_of(mask + 64 * w);
      } else {
        for (int64_t i = 0; 64 * w + i < n; i++) word |= uint64_t(mask[64 * w + i] != 0) << i;
      }
      store_word(bits, w, word);
    }
  });
}

void pack_scores(const void* scores, int64_t kind, double mu, int64_t n, uint8_t* bits, int64_t threads) {
  if (kind == 0) return above(static_cast<const float*>(scores), float(mu), n, bits, threads);
  above(static_cast<const uint16_t*>(scores), float(mu), n, bits, threads);
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
