// The bit layout, shared by host and device code: bit e % 64 of word e / 64 belongs to element e, little-endian,
// padded with zeros to whole 64-bit words.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FASTMASK_HD __host__ __device__ __forceinline__
#else
#define FASTMASK_HD static inline
#endif

namespace fastmask {

FASTMASK_HD int64_t packed_words(int64_t numel) { return (numel + 63) / 64; }

// A word by its index, wherever the bits lie: files may be mapped at any address.
FASTMASK_HD uint64_t load_word(const uint8_t* bits, int64_t word) {
  uint64_t value;
  memcpy(&value, bits + 8 * word, 8);
  return value;
}

FASTMASK_HD void store_word(uint8_t* bits, int64_t word, uint64_t value) {
  memcpy(bits + 8 * word, &value, 8);
}

// Ones in the lowest `count` bits, count in [0, 64].
FASTMASK_HD uint64_t low_ones(int64_t count) {
  return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

// Up to 64 bits from any position; bits past `count` are 0 and nothing past the last word needed is read.
FASTMASK_HD uint64_t bits_at(const uint8_t* bits, int64_t position, int64_t count) {
  const int64_t word = position / 64, shift = position % 64;
  uint64_t value = load_word(bits, word) >> shift;
  if (shift + count > 64) value |= load_word(bits, word + 1) << (64 - shift);
  return value & low_ones(count);
}

// 16 bits to every fourth of 64: bit i goes to bit 4 i.
FASTMASK_HD uint64_t spread_by_four(uint64_t x) {
  x = (x | x << 24) & 0x000000FF000000FFull;
  x = (x | x << 12) & 0x000F000F000F000Full;
  x = (x | x << 6) & 0x0303030303030303ull;
  return (x | x << 3) & 0x1111111111111111ull;
}

}  // namespace fastmask
