// compressed_linear: products with weights that lie as a bitmap and the kept values.
//
// A word of bits says which of the next popcount(word) values go to which of 64 places. How far the values of a part
// of a word lie from the word's first is counted from the word itself, so that only the word's own count carries over,
// and rows of W are multiplied four at a time: loads do not wait for each other. Values are loaded whole, which reads
// up to a vector past the last one needed: where fewer are left, the last rows' are copied to where there is room.
//
// AVX-512 expands them (`vexpandps`, and `vpexpandw`, whose products are pairs: see masked_linear.cpp), AVX2 permutes
// them by a table of 2 KB.
#include "elements.h"
#include "kernels.h"
#include "linear.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

constexpr int kMostB = 8;  // rows of x that are multiplied at once
// Sums that stay in registers, and weights a task: half a megabyte of values, so that streams are long; less where
// threads would idle, never less than pays for one.
constexpr int kSums = L == 16 ? 16 : 8;
constexpr int64_t kMostWeights = 1 << 18, kLeastWeights = 1 << 15;

// spread(v, bits): lane i takes the next lane of v where bit i is 1, else it is 0.
#if defined(__AVX512F__)
inline F spread(F v, uint64_t bits) { return _mm512_maskz_expand_ps(M(bits), v); }
#else
struct Places {
  uint8_t from[256][8];
  constexpr Places() : from() {
    for (int byte = 0; byte < 256; byte++)
      for (int i = 0, next = 0; i < 8; i++) {
        from[byte][i] = uint8_t(next & 7);
        next += byte >> i & 1;
      }
  }
};
constexpr Places kPlaces;

inline F spread(F v, uint64_t bits) {
  const uint8_t* from = kPlaces.from[bits & 0xFF];
#if defined(__AVX2__)
  const __m256i lanes_of_v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
  return keep(_mm256_permutevar8x32_ps(v, lanes_of_v), lanes(bits, 0));
#else
  F out = set1(0.0f);
  for (int i = 0; i < 8; i++)
    if (bits >> i & 1) out[i] = v[from[i]];
  return out;
#endif
}
#endif

// Weights that are put in their places at once, the numbers of x they meet, and their products.
template <class T>
struct Kept {
  static constexpr int64_t width = L;
  using X = float;
  using V = F;
  static V placed(const T* p, uint64_t bits) { return spread(load(p, Whole{}), bits); }
  static void put(T* p, V v) { store(p, v, Whole{}); }
  static V rows(const X* p) { return load(p); }
  static F add(F sum, V w, V x) { return fma(w, x, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Kept<uint16_t> {
  static constexpr int64_t width = 2 * L;
  using X = uint16_t;
  using V = __m512i;
  static V placed(const uint16_t* p, uint64_t bits) {
    V v = _mm512_loadu_si512(p);
    uint32_t places = uint32_t(bits);
    // From registers: 32 weights take 3.3 cycles, products and all, from memory 5.0, with bits shifted as masks 3.5 (Zen 4).
    asm("" : "+v"(v), "+r"(places));
    return _mm512_maskz_expand_epi16(places, v);
  }
  static void put(uint16_t* p, V v) { _mm512_storeu_si512(p, v); }
  static V rows(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static F add(F sum, V w, V x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
};
#endif

int64_t ones_between(const uint8_t* bits, int64_t begin, int64_t end) {
  int64_t count = 0;
  if (begin % 64 != 0 && begin < end) {
    const int64_t rest = 64 - begin % 64 < end - begin ? 64 - begin % 64 : end - begin;
    count = __builtin_popcountll(bits_at(bits, begin, rest));
    begin += rest;
  }
  // Counted many at a time where there is vpopcntq: the compiler sees to it.
  const int64_t first = begin / 64, last = end / 64;
  for (int64_t w = first; w < last; w++) count += __builtin_popcountll(load_word(bits, w));
  const int64_t done = last > first ? last * 64 : begin;
  return done < end ? count + __builtin_popcountll(bits_at(bits, done, end - done)) : count;
}

// Rows of k bits a task: a multiple of what is multiplied side by side.
int64_t rows_a_task(int64_t n, int64_t k, int64_t threads) {
  const int64_t fair = n * k / (8 * threads);
  const int64_t weights = fair > kMostWeights ? kMostWeights : fair > kLeastWeights ? fair : kLeastWeights;
  return (weights / (4 * k + 1) + 1) * 4;
}

template <class T>
struct Layer {
  const typename Kept<T>::X* x;  // (k / 64, B, 64), with zeros past the last column
  const T* values;
  const uint8_t* bits;
  const int64_t* starts;  // of the values of each row
  int64_t n, k;
  const T* bias;
  T* y;
};

// y[b, row + r] for R rows of W, whose values lie at `values` and whose bits in whole words at `bits`, and B of x. Every
// sum has lanes of its own, whatever R and B. The values of the next R rows are brought near meanwhile.
template <int R, int B, class T>
__attribute__((noinline)) void tile(const Layer<T>& f, int64_t row, const T* values, const uint8_t* bits) {
  using S = Kept<T>;
  const int64_t *starts = f.starts + row, count = packed_words(f.k);
  const T* at[R];
  for (int r = 0; r < R; r++) at[r] = values + (starts[r] - starts[0]);
  const int64_t next = starts[R] - starts[0];
  // Every loop over it is unrolled: one that is not keeps it in memory.
  F sums[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) sums[r][b] = set1(0.0f);
  const typename S::X* x = f.x;
  for (int64_t c = 0; c < count; c++, bits += 8, x += 64 * B) {
    uint64_t words[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      words[r] = load_word(bits, r * count);
      // As many lines as a word at half density takes.
      for (int line = 0; line < int(sizeof(T)) / 2; line++) __builtin_prefetch(at[r] + next + line * 16, 0, 2);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < 64; i += S::width) {
      typename S::V w[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        w[r] = S::placed(at[r] + __builtin_popcountll(words[r] & low_ones(i)), words[r] >> i);
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) {
        const typename S::V rows = S::rows(x + b * 64 + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sums[r][b] = S::add(sums[r][b], w[r], rows);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) at[r] += __builtin_popcountll(words[r]);
  }
  T* y = f.y + row;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const float plus = f.bias != nullptr ? plain(f.bias[row + r]) : 0.0f;
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) put(y + b * f.n + r, sum(sums[r][b]) + plus);
  }
}

// The same for rows as they lie: values are copied where too few follow them, bits where a row begins within a word.
template <int R, int B, class T>
void some_rows(const Layer<T>& f, int64_t row) {
  static thread_local Scratch kept_values, kept_bits;
  const int64_t begin = f.starts[row], end = f.starts[row + R], words = packed_words(f.k);
  const T* values = f.values + begin;
  if (f.starts[f.n] - end < Kept<T>::width) {
    T* copy = kept_values.get<T>(end - begin + Kept<T>::width);
    memset(copy + (end - begin), 0, Kept<T>::width * sizeof(T));
    if (end > begin) memcpy(copy, values, size_t(end - begin) * sizeof(T));
    values = copy;
  }
  const uint8_t* bits = f.bits + row * words * 8;
  if (f.k % 64 != 0) {
    uint8_t* shifted = kept_bits.get<uint8_t>(R * words * 8);
    for (int64_t i = 0; i < R * words; i++) {
      const int64_t column = i % words * 64, left = f.k - column;
      store_word(shifted, i, bits_at(f.bits, (row + i / words) * f.k + column, left < 64 ? left : 64));
    }
    bits = shifted;
  }
  tile<R, B>(f, row, values, bits);
}

template <class T, int B = 1>
void rows_of_w(int64_t b, const Layer<T>& f, int64_t begin, int64_t end) {
  if constexpr (B < kMostB)
    if (b > B) return rows_of_w<T, B + 1>(b, f, begin, end);
  constexpr int R = 4 * B <= kSums ? 4 : 2 * B <= kSums ? 2 : 1;
  int64_t row = begin;
  for (; row + R <= end; row += R) some_rows<R, B>(f, row);
  for (; row < end; row++) some_rows<1, B>(f, row);
}

template <class T>
void product(const T* x, const T* values, const uint8_t* bits, const int64_t* starts, int64_t b, int64_t n, int64_t k,
             const T* bias, T* y, int64_t threads) {
  using X = typename Kept<T>::X;
  static thread_local Scratch kept;
  const int64_t depth = (k + 63) / 64 * 64;
  X* interleaved = kept.get<X>(b * depth);
  for (int64_t row = 0; row < b; row++) {
    const int64_t first = row / kMostB * kMostB, count = b - first < kMostB ? b - first : kMostB;
    X* to = interleaved + first * depth + (row - first) * 64;
    for (int64_t i = 0; i < depth; i++) {
      X& place = to[i / 64 * 64 * count + i % 64];
      if constexpr (sizeof(X) == sizeof(T)) place = i < k ? x[row * k + i] : X(0);
      else place = i < k ? plain(x[row * k + i]) : X(0);
    }
  }
  pieces(n, rows_a_task(n, k, threads), threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < b; row += kMostB) {
      const Layer<T> f{interleaved + row * depth, values, bits, starts, n, k, bias, y + row * n};
      rows_of_w(b - row < kMostB ? b - row : kMostB, f, begin, end);
    }
  });
}

// The weights [begin, end), whose values begin at `values`, to `out`; no value is read from `last` on.
template <class T>
void scatter(const T* values, const T* last, const uint8_t* bits, int64_t begin, int64_t end, T* out) {
  using S = Kept<T>;
  for (int64_t e = begin; e < end; e += 64, out += 64) {
    const uint64_t word = bits_at(bits, e, end - e < 64 ? end - e : 64);
    if (e + 64 <= end && last - values >= 64 + S::width) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < 64; i += S::width)
        S::put(out + i, S::placed(values + __builtin_popcountll(word & low_ones(i)), word >> i));
    } else {
      const T* p = values;
      for (int64_t i = 0; e + i < end && i < 64; i++) out[i] = word >> i & 1 ? *p++ : T(0);
    }
    values += __builtin_popcountll(word);
  }
}

template <class T>
void expand(const T* values, const uint8_t* bits, const int64_t* starts, int64_t n, int64_t k, int64_t first,
            int64_t count, T* out, int64_t threads) {
  pieces(count, rows_a_task(count, k, threads), threads, [=](int64_t begin, int64_t end) {
    scatter(values + starts[first + begin], values + starts[n], bits, (first + begin) * k, (first + end) * k,
            out + begin * k);
  });
}

}  // namespace

void count_ones(const uint8_t* bits, int64_t n, int64_t k, int64_t* starts, int64_t threads) {
  starts[0] = 0;
  pieces(n, rows_a_task(n, k, threads), threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) starts[row + 1] = ones_between(bits, row * k, row * k + k);
  });
  for (int64_t row = 0; row < n; row++) starts[row + 1] += starts[row];
}

void compressed_linear(const void* x, const void* values, int64_t kind, const uint8_t* bits, const int64_t* starts,
                       int64_t b, int64_t n, int64_t k, const void* bias, void* y, int64_t threads) {
  const auto of = [=](auto zero) {
    using T = decltype(zero);
    product(static_cast<const T*>(x), static_cast<const T*>(values), bits, starts, b, n, k, static_cast<const T*>(bias),
            static_cast<T*>(y), threads);
  };
  kind == 0 ? of(0.0f) : of(uint16_t(0));
}

void expand_values(const void* values, int64_t kind, const uint8_t* bits, const int64_t* starts, int64_t n, int64_t k,
                   int64_t first, int64_t count, void* out, int64_t threads) {
  const auto of = [=](auto zero) {
    using T = decltype(zero);
    expand(static_cast<const T*>(values), bits, starts, n, k, first, count, static_cast<T*>(out), threads);
  };
  kind == 0 ? of(0.0f) : of(uint16_t(0));
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
