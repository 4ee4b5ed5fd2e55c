// restore_frozen_: frozen elements are copied as integers of their size, whatever they hold.
#include "kernels.h"
#include "lists.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

template <class T>
inline void put_back(T* param, const T* saved, uint64_t frozen) {
  for (; frozen != 0; frozen &= frozen - 1) {
    const int i = __builtin_ctzll(frozen);
    param[i] = saved[i];
  }
}

inline void put_back_words(uint32_t* param, const uint32_t* saved, uint64_t frozen) {
  const float* from = reinterpret_cast<const float*>(saved);
  float* to = reinterpret_cast<float*>(param);
  for (int64_t i = 0; i < 64; i += L) store(to + i, load(from + i, lanes(frozen, i)), lanes(frozen, i));
}

template <class T>
void restore(const int64_t* row, int64_t begin, int64_t end) {
  T* param = pointer<T>(row[0]);
  const T* saved = pointer<const T>(row[1]);
  const uint8_t* frozen = pointer<const uint8_t>(row[2]);
  for (int64_t e = begin; e < end; e += 64) {
    const uint64_t word = load_word(frozen, e / 64) & low_ones(end - e);
    if (word == 0) continue;
    if constexpr (sizeof(T) == 4) {
      put_back_words(param + e, saved + e, word);
    } else if (word == ~uint64_t(0)) {
      memcpy(param + e, saved + e, 64 * sizeof(T));
    } else {
      put_back(param + e, saved + e, word);
    }
  }
}

}  // namespace

void restore_frozen_(const int64_t* table, int64_t count, int64_t size, int64_t threads) {
  each_piece(table, 5, count, threads, [=](const int64_t* row, int64_t begin, int64_t end, int64_t) {
    if (row[2] == 0) return;
    if (size == 2) return restore<uint16_t>(row, begin, end);
    if (size == 4) return restore<uint32_t>(row, begin, end);
    restore<uint64_t>(row, begin, end);
  });
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
