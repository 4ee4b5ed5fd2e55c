// topk_mask: the k-th largest score by its digits, then one comparison an element.
//
// A float becomes an unsigned key of the same order. Three passes count the digits (11, 11 and 10 bits) of the keys
// that still agree with the k-th; from the second on few do, and the others cost a comparison. Of many scores, a sample
// says first between which two the k-th must lie, so that two passes over memory do where the sample is right.
// Scores equal to the k-th are taken from the lowest index on: where not all are, their number in each piece is counted
// first, so that all pieces can be written at once.
#include "kernels.h"
#include "vec.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

constexpr int64_t kPiece = 1 << 16;
constexpr int kDigits = 2048;
constexpr int64_t kSampled = 1 << 20;  // elements from which a sample saves more than it costs

inline float score_at(const float* p, int64_t i) { return p[i]; }
inline float score_at(const uint16_t* p, int64_t i) { return widen_one(p[i]); }
inline F scores_at(const float* p) { return load(p); }
inline F scores_at(const uint16_t* p) { return widen(p); }

// NaN ranks with -inf and -0.0 with 0.0.
inline uint32_t key_of(float score) {
  const float plain = score == score ? score + 0.0f : -__builtin_inff();
  uint32_t bits;
  memcpy(&bits, &plain, 4);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

inline float score_of(uint32_t key) {
  const uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu);
  float score;
  memcpy(&score, &bits, 4);
  return score;
}

// Counts of the digit of `width` bits from bit `shift` on, among keys that are `prefix` from bit `above` on.
template <class T>
void count_digits(const T* scores, int64_t n, int above, uint32_t prefix, int shift, int width,
                  int64_t* counts, int64_t threads) {
  const uint32_t digit = (1u << width) - 1;
  memset(counts, 0, kDigits * sizeof(int64_t));
  const uint32_t lowest = above == 32 ? 0 : prefix << above;
  const F low = set1(score_of(lowest)), high = set1(score_of(above == 32 ? ~0u : lowest | ((1u << above) - 1)));
  pieces(n, kPiece, threads, [=](int64_t begin, int64_t end) {
    // Two counters a digit, 16 KB: equal digits in a row wait less for each other.
    uint32_t own[2][kDigits] = {};
    int64_t e = begin;
    for (; e + 64 <= end; e += 64) {
      if (above == 32) {
        uint32_t keys[64];
        for (int i = 0; i < 64; i++) keys[i] = key_of(score_at(scores + e, i));
        for (int i = 0; i < 64; i++) own[i % 2][keys[i] >> shift]++;
        continue;
      }
      // Those not outside the range of keys that agree; NaN is never outside and is looked at.
      uint64_t inside = 0;
      for (int64_t i = 0; i < 64; i += L) {
        const F v = scores_at(scores + e + i);
        inside |= uint64_t(low_ones(L) & ~(greater(low, v) | greater(v, high))) << i;
      }
      for (; inside != 0; inside &= inside - 1) {
        const uint32_t key = key_of(score_at(scores + e, __builtin_ctzll(inside)));
        if (key >> above == prefix) own[0][key >> shift & digit]++;
      }
    }
    for (; e < end; e++) {
      const uint32_t key = key_of(score_at(scores, e));
      if (above == 32 || key >> above == prefix) own[0][key >> shift & digit]++;
    }
    for (int d = 0; d < kDigits; d++) {
      const int64_t sum = int64_t(own[0][d]) + own[1][d];
      if (sum != 0) __atomic_fetch_add(counts + d, sum, __ATOMIC_RELAXED);
    }
  });
}

// The elements of a word that are above and those that equal the k-th score.
struct Word {
  uint64_t above, equal;
};

template <class T>
inline Word compare(const T* scores, int64_t count, float kth) {
  const F level = set1(kth);
  Word word{0, 0};
  uint64_t below = 0, number = 0;
  if (count == 64) {
    for (int64_t i = 0; i < 64; i += L) {
      const F v = scores_at(scores + i);
      word.above |= uint64_t(greater(v, level)) << i;
      below |= uint64_t(greater(level, v)) << i;
      number |= uint64_t(greater(v, set1(-__builtin_inff()))) << i;
    }
  } else {
    for (int64_t i = 0; i < count; i++) {
      const float v = score_at(scores, i);
      word.above |= uint64_t(v > kth) << i;
      below |= uint64_t(v < kth) << i;
      number |= uint64_t(v > -__builtin_inff()) << i;
    }
  }
  // Neither above nor below; NaN, which is neither either, only where -inf is the k-th.
  const uint64_t rest = low_ones(count) & ~word.above & ~below;
  word.equal = kth == -__builtin_inff() ? rest : rest & number;
  return word;
}

// The k-th largest score, how many of the elements that equal it are among the k, and how many there are.
struct Kth {
  uint32_t key;
  int64_t wanted, equal;
};

template <class T>
Kth kth_by_digits(const T* scores, int64_t n, int64_t k, int64_t threads) {
  int64_t counts[kDigits];
  Kth kth{0, k, 0};
  const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
  for (int pass = 0; pass < 3; pass++) {
    count_digits(scores, n, pass == 0 ? 32 : shifts[pass - 1], kth.key, shifts[pass], widths[pass], counts, threads);
    int digit = (1 << widths[pass]) - 1;
    while (counts[digit] < kth.wanted) kth.wanted -= counts[digit--];
    kth.key = kth.key << widths[pass] | uint32_t(digit);
    kth.equal = counts[digit];
  }
  return kth;
}

// A sample brackets the k-th score; one pass then counts what is above the bracket and keeps what is inside, about one
// element of 60, among which the digits are counted. False where the k-th is not inside after all, or too many are.
template <class T>
bool kth_by_sample(const T* scores, int64_t n, int64_t k, int64_t threads, Kth* kth) {
  // 512 is four standard deviations of the sample's rank of the median, more of any other.
  constexpr int64_t kSample = 1 << 16, kMargin = 512, kRoom = kPiece / 8;
  const int64_t blocks = (n + kPiece - 1) / kPiece;
  T* kept = new T[size_t(kSample > blocks * kRoom ? kSample : blocks * kRoom)];
  for (int64_t i = 0; i < kSample; i++) kept[i] = scores[int64_t(double(n) / kSample * double(i))];
  const int64_t rank = int64_t(double(k) / double(n) * kSample);
  const uint32_t highest = rank > kMargin ? kth_by_digits(kept, kSample, rank - kMargin, threads).key : ~0u;
  const uint32_t lowest = rank + kMargin < kSample ? kth_by_digits(kept, kSample, rank + kMargin, threads).key : 0;
  const float top = score_of(highest), bottom = score_of(lowest);
  int64_t* counts = new int64_t[size_t(2 * blocks)];  // above the bracket, inside it
  pieces(n, kPiece, threads, [=](int64_t begin, int64_t end) {
    T* room = kept + begin / kPiece * kRoom;
    int64_t above = 0, inside = 0;
    for (int64_t e = begin; e < end; e += 64) {
      const int64_t count = end - e < 64 ? end - e : 64;
      uint64_t over = 0, under = 0;
      if (count == 64) {
        for (int64_t i = 0; i < 64; i += L) {
          const F v = scores_at(scores + e + i);
          over |= uint64_t(greater(v, set1(top))) << i;
          under |= uint64_t(greater(set1(bottom), v)) << i;
        }
      } else {
        for (int64_t i = 0; i < count; i++) {
          over |= uint64_t(score_at(scores + e, i) > top) << i;
          under |= uint64_t(bottom > score_at(scores + e, i)) << i;
        }
      }
      above += __builtin_popcountll(over);
      // NaN, which is neither, is kept: it ranks last among what is.
      for (uint64_t in = low_ones(count) & ~over & ~under; in != 0; in &= in - 1, inside++)
        if (inside < kRoom) room[inside] = scores[e + __builtin_ctzll(in)];
    }
    counts[begin / kPiece] = above;
    counts[blocks + begin / kPiece] = inside;
  });
  int64_t above = 0, inside = 0;
  bool whole = true;
  for (int64_t b = 0; b < blocks; b++) {
    above += counts[b];
    const int64_t here = counts[blocks + b];
    whole = whole && here <= kRoom;
    if (whole) memmove(kept + inside, kept + b * kRoom, size_t(here) * sizeof(T));
    inside += here;
  }
  bool found = whole && above < k && k <= above + inside;
  if (found) {
    *kth = kth_by_digits(kept, inside, k - above, threads);
    found = lowest <= kth->key && kth->key <= highest;
  }
  delete[] counts;
  delete[] kept;
  return found;
}

template <class T>
void topk(const T* scores, int64_t n, int64_t k, uint8_t* bits, int64_t threads) {
  if (k <= 0 || k >= n) {
    for (int64_t w = 0; w < packed_words(n); w++) store_word(bits, w, k <= 0 ? 0 : low_ones(n - 64 * w));
    return;
  }
  Kth found;
  if (n < kSampled || !kth_by_sample(scores, n, k, threads, &found)) found = kth_by_digits(scores, n, k, threads);
  const float kth = score_of(found.key);
  const int64_t blocks = (n + kPiece - 1) / kPiece;
  // How many of the elements that equal the k-th each piece takes; all of them, mostly.
  int64_t* ties = new int64_t[size_t(blocks)];
  for (int64_t b = 0; b < blocks; b++) ties[b] = kPiece;
  if (found.wanted < found.equal) {
    pieces(n, kPiece, threads, [=](int64_t begin, int64_t end) {
      int64_t equal = 0;
      for (int64_t e = begin; e < end; e += 64)
        equal += __builtin_popcountll(compare(scores + e, end - e < 64 ? end - e : 64, kth).equal);
      ties[begin / kPiece] = equal;
    });
    for (int64_t b = 0, left = found.wanted; b < blocks; b++) {
      const int64_t equal = ties[b];
      ties[b] = left;
      left = left > equal ? left - equal : 0;
    }
  }
  pieces(n, kPiece, threads, [=](int64_t begin, int64_t end) {
    int64_t left = ties[begin / kPiece];
    for (int64_t e = begin; e < end; e += 64) {
      const Word word = compare(scores + e, end - e < 64 ? end - e : 64, kth);
      uint64_t taken = 0;
      for (uint64_t equal = word.equal; equal != 0 && left > 0; equal &= equal - 1, left--) taken |= equal & -equal;
      store_word(bits, e / 64, word.above | taken);
    }
  });
  delete[] ties;
}

}  // namespace

void topk_mask(const void* scores, int64_t kind, int64_t n, int64_t k, uint8_t* bits, int64_t threads) {
  if (kind == 0) return topk(static_cast<const float*>(scores), n, k, bits, threads);
  topk(static_cast<const uint16_t*>(scores), n, k, bits, threads);
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
