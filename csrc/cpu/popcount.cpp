// popcount: the words of each mask, in pieces whose counts are added.
#include "kernels.h"
#include "vec.h"

namespace fastmask {
namespace FASTMASK_ISA {

void popcount(const uint8_t* bits, int64_t samples, int64_t bytes, int64_t* ones, int64_t threads) {
  constexpr int64_t kBytesAPiece = 1 << 18;
  for (int64_t s = 0; s < samples; s++) {
    const uint8_t* mask = bits + s * bytes;
    int64_t total = 0;
    pieces(bytes, kBytesAPiece, threads, [mask, &total](int64_t begin, int64_t end) {
      int64_t count = 0, b = begin;
      for (; b + 8 <= end; b += 8) count += __builtin_popcountll(load_word(mask + b, 0));
      for (; b < end; b++) count += __builtin_popcount(mask[b]);
      __atomic_fetch_add(&total, count, __ATOMIC_RELAXED);
    });
    ones[s] = total;
  }
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
