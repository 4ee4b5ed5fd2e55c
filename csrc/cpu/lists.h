// Ops over many tensors in one call: a table with one row a tensor, dealt out in pieces of equal size.
#pragma once

#include "elements.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

// Elements a piece, whole words of bits. Two threads that take a quarter of this by turns are 3 % slower at 16 x 1 M
// float32 with momentum (AMD EPYC, 2 cores).
constexpr int64_t kListPiece = 1 << 16;

// Call body(row, begin, end) on pieces of every tensor of the table, whose last column is the number of elements.
template <class Body>
inline void each_piece(const int64_t* table, int64_t columns, int64_t count, int64_t threads, Body body) {
  int64_t* before = new int64_t[size_t(count + 1)];
  before[0] = 0;
  for (int64_t t = 0; t < count; t++) {
    const int64_t n = table[t * columns + columns - 1];
    before[t + 1] = before[t] + (n + kListPiece - 1) / kListPiece;
  }
  parallel(before[count], threads, [=](int64_t piece) {
    int64_t low = 0, high = count;  // before[low] <= piece < before[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (before[middle] <= piece ? low : high) = middle;
    }
    const int64_t* row = table + low * columns;
    const int64_t n = row[columns - 1], begin = (piece - before[low]) * kListPiece;
    body(row, begin, begin + kListPiece < n ? begin + kListPiece : n);
  });
  delete[] before;
}

// Call body(e, all, free) on vectors of elements that are not all frozen: `all` are the lanes that are there, `free`
// those that may change. Where `everywhere`, on all vectors.
template <class Body>
inline void free_vectors(const uint8_t* frozen, int64_t begin, int64_t end, bool everywhere, Body body) {
  for (int64_t w = begin; w < end; w += 64) {
    const uint64_t there = low_ones(end - w);
    const uint64_t moving = there & ~(frozen != nullptr ? load_word(frozen, w / 64) : 0);
    if (moving == 0 && !everywhere) continue;
    if (w + 64 <= end) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < 64; i += L) body(w + i, Whole{}, lanes(moving, i));
    } else {
      for (int64_t i = 0; w + i < end; i += L) body(w + i, lanes(there, i), lanes(moving, i));
    }
  }
}

template <class P>
inline P* pointer(int64_t address) {
  return reinterpret_cast<P*>(address);
}

}  // namespace
}  // namespace FASTMASK_ISA
}  // namespace fastmask
