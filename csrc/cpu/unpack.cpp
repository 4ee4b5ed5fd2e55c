// unpack: one word makes 64 bools.
#include "kernels.h"
#include "pages.h"
#include "vec.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

constexpr int64_t kWordsAPiece = 2048;

inline void write(uint64_t word, uint8_t* mask) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(mask, _mm512_maskz_set1_epi8(word, 1));
#elif defined(__AVX2__)
  // Each byte of the word to 8 places, then the place's own bit.
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3,
                                          3, 3, 3, 3, 3, 3, 3);
  const __m256i own = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
  for (int i = 0; i < 2; i++) {
    const __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32(int(uint32_t(word >> (32 * i)))), spread);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(v, own), own);
    _mm256_storeu_si256((__m256i*)(mask + 32 * i), _mm256_and_si256(set, _mm256_set1_epi8(1)));
  }
#else
  // Bit i of a byte to byte i of 8, as 0 or 1.
  for (int i = 0; i < 8; i++) {
    const uint64_t set = ((word >> (8 * i) & 0xFF) * 0x0101010101010101ull) & 0x8040201008040201ull;
    const uint64_t bools = ((set + 0x7F7F7F7F7F7F7F7Full) >> 7) & 0x0101010101010101ull;
    memcpy(mask + 8 * i, &bools, 8);
  }
#endif
}

}  // namespace

void unpack(const uint8_t* bits, int64_t samples, int64_t n, uint8_t* mask, int64_t threads) {
  const int64_t words = packed_words(n);
  in_large_pages(mask, samples * n);
  pieces(samples * words, kWordsAPiece, threads, [=](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; w++) {
      const int64_t sample = w / words, at = 64 * (w % words);
      uint8_t* out = mask + sample * n + at;
      const uint64_t word = load_word(bits, w);
      if (at + 64 <= n) {
        write(word, out);
      } else {
        for (int64_t i = 0; at + i < n; i++) out[i] = uint8_t(word >> i & 1);
      }
    }
  });
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
