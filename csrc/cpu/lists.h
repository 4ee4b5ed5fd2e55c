// Ops over many tensors in one call: a table with one row a tensor, dealt out in pieces of equal size. A row ends with
// the address of its mask or 0, the number of values its state holds, and its number of elements n. State of n values
// lies like the tensor; compact state is that of the free elements alone, in their order.
#pragma once

#include <stdio.h>

#include <stdexcept>

#include "elements.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

// Elements a piece, whole words of bits. Two threads that take a quarter of this by turns are 3 % slower at 16 x 1 M
// float32 with momentum (AMD EPYC, 2 cores).
constexpr int64_t kListPiece = 1 << 16;

template <class P>
inline P* pointer(int64_t address) {
  return reinterpret_cast<P*>(address);
}

// The elements of word w of a tensor that may change: up to `end`, where not frozen.
inline uint64_t free_bits(const uint8_t* frozen, int64_t w, int64_t end) {
  return low_ones(end - w) & ~(frozen != nullptr ? load_word(frozen, w / 64) : 0);
}

// Call body(row, begin, end, at) on pieces of every tensor of the table; the piece's state begins at its value `at`.
template <class Body>
inline void each_piece(const int64_t* table, int64_t columns, int64_t count, int64_t threads, Body body) {
  int64_t* before = new int64_t[size_t(count + 1)];
  bool compact = false;
  before[0] = 0;
  for (int64_t t = 0; t < count; t++) {
    const int64_t n = table[(t + 1) * columns - 1];
    before[t + 1] = before[t] + (n + kListPiece - 1) / kListPiece;
    compact |= table[(t + 1) * columns - 2] != n;
  }
  const auto each = [=](auto visit) {
    parallel(before[count], threads, [=](int64_t piece) {
      int64_t low = 0, high = count;  // before[low] <= piece < before[high]
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (before[middle] <= piece ? low : high) = middle;
      }
      const int64_t* row = table + low * columns;
      const int64_t n = row[columns - 1], begin = (piece - before[low]) * kListPiece;
      visit(piece, row, begin, begin + kListPiece < n ? begin + kListPiece : n);
    });
  };
  int64_t* at = compact ? new int64_t[size_t(before[count])] : nullptr;
  char wrong[160] = "";
  if (compact) {
    each([=](int64_t piece, const int64_t* row, int64_t begin, int64_t end) {
      int64_t ones = 0;
      for (int64_t w = begin; w < end; w += 64)
        ones += __builtin_popcountll(free_bits(pointer<const uint8_t>(row[columns - 3]), w, end));
      at[piece] = ones;
    });
    for (int64_t t = 0; t < count; t++) {
      const int64_t held = table[(t + 1) * columns - 2], n = table[(t + 1) * columns - 1];
      int64_t next = 0;
      for (int64_t piece = before[t]; piece < before[t + 1]; piece++) {
        const int64_t ones = at[piece];
        at[piece] = held == n ? (piece - before[t]) * kListPiece : next;
        next += ones;
      }
      if (held != n && held != next && wrong[0] == 0)
        snprintf(wrong, sizeof wrong, "state of params[%lld]: expected its %lld free entries, got %lld", (long long)t,
                 (long long)next, (long long)held);
    }
  }
  if (wrong[0] == 0) {
    each([=](int64_t piece, const int64_t* row, int64_t begin, int64_t end) {
      body(row, begin, end, at != nullptr ? at[piece] : begin);
    });
  }
  delete[] before;
  delete[] at;
  if (wrong[0] != 0) throw std::invalid_argument(wrong);
}

// Call body(e, all, free) on vectors of elements that are not all frozen: `all` are the lanes that are there, `free`
// those that may change. Where `everywhere`, on all vectors.
template <class Body>
inline void free_vectors(const uint8_t* frozen, int64_t begin, int64_t end, bool everywhere, Body body) {
  for (int64_t w = begin; w < end; w += 64) {
    const uint64_t moving = free_bits(frozen, w, end);
    if (moving == 0 && !everywhere) continue;
    if (w + 64 <= end) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < 64; i += L) body(w + i, Whole{}, lanes(moving, i));
    } else {
      for (int64_t i = 0; w + i < end; i += L) body(w + i, lanes(low_ones(end - w), i), lanes(moving, i));
    }
  }
}

// gathered(v, bits): the lanes of v whose bits are 1, side by side; what follows them means nothing.
// scattered(v, bits, rest): where bits are 1 the next lane of v, elsewhere that of rest.
#if defined(__AVX512F__)

inline F gathered(F v, uint32_t bits) { return _mm512_maskz_compress_ps(M(bits), v); }
inline F scattered(F v, uint32_t bits, F rest) { return _mm512_mask_expand_ps(rest, M(bits), v); }

#else

// For each byte the lanes of its ones, and for each lane how many ones come before it.
struct Orders {
  alignas(8) uint8_t ones[256][8], places[256][8];
  constexpr Orders() : ones(), places() {
    for (int byte = 0; byte < 256; byte++)
      for (int i = 0, next = 0; i < 8; i++) {
        places[byte][i] = uint8_t(next & 7);
        if (byte >> i & 1) ones[byte][next++] = uint8_t(i);
      }
  }
};
constexpr Orders kOrders;

#if defined(__AVX2__)
inline F permuted(F v, const uint8_t* order) {
  return _mm256_permutevar8x32_ps(v, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)order)));
}
#else
inline F permuted(F v, const uint8_t* order) {
  F out;
  for (int i = 0; i < L; i++) out[i] = v[order[i]];
  return out;
}
#endif
inline F gathered(F v, uint32_t bits) { return permuted(v, kOrders.ones[bits]); }
inline F scattered(F v, uint32_t bits, F rest) {
  return blend(expand(bits), permuted(v, kOrders.places[bits]), rest);
}

#endif

// Compact state: the free elements of some words and their gradients lie side by side in L1 while
// body(param, grad, first, i, lanes there, lanes that change) updates them, vector by vector; the state of element i of
// these is the piece's value first + i. Arithmetic and state are those of free elements alone.
template <class T, class Body>
inline void gathered_vectors(T* param, const T* grad, const uint8_t* frozen, int64_t begin, int64_t end, Body body) {
  constexpr int64_t kTogether = 1024;
  float p[kTogether + L], g[kTogether + L];
  int64_t first_state = 0;
  for (int64_t start = begin; start < end; start += kTogether) {
    const int64_t stop = start + kTogether < end ? start + kTogether : end;
    const auto each_vector = [=](auto visit) {
      for (int64_t w = start; w < stop; w += 64) {
        const uint64_t moving = free_bits(frozen, w, stop);
        if (moving == 0) continue;
        for (int64_t i = 0; i < 64 && w + i < stop; i += L) {
          const uint32_t bits = uint32_t((moving >> i) & low_ones(L));
          if (w + i + L <= stop)
            visit(w + i, Whole{}, bits);
          else
            visit(w + i, first(stop - w - i), bits);
        }
      }
    };
    int64_t k = 0;
    each_vector([&](int64_t e, auto all, uint32_t bits) {
      store(p + k, gathered(load(param + e, all), bits));
      store(g + k, gathered(load(grad + e, all), bits));
      k += __builtin_popcount(bits);
    });
    int64_t i = 0;
    for (; i + L <= k; i += L) body(p, g, first_state, i, Whole{}, first(L));
    if (i < k) body(p, g, first_state, i, first(k - i), first(k - i));
    first_state += k;
    k = 0;
    each_vector([&](int64_t e, auto all, uint32_t bits) {
      store(param + e, scattered(load(p + k), bits, load(param + e, all)), all);
      k += __builtin_popcount(bits);
    });
  }
}

}  // namespace
}  // namespace FASTMASK_ISA
}  // namespace fastmask
