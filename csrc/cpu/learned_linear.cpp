// learned_linear: the straight-through rule, fused into the product it scales, with no noise stored.
//
//     out = sum over samples of (scale * G * W - shift) * slope      G = dY^T X of a sample's rows
//     slope = 1 or s(1 - s) / tau; scale and shift are 1 and 0 where a mask's weights are not rescaled
//     s = sigmoid(z)      z = (logit + log(above / below)) / tau      above = 2^25 - 1 - 2k      below = 2k + 1
//
// k are the 24 bits that decided the sample. With tau = 1 neither log nor exp is taken for each sample: with
// t = exp(-|logit|), once for all of them, s(1 - s) is t above below / (above + t below)^2, or with above and below
// exchanged where the logit is negative. Otherwise s(1 - s) = t / (1 + t)^2 with t = exp(-|z|).
//
// 6 rows of G by 64 columns, 16 counters of Philox each, are summed in registers, and used before the next are: they
// are stored, or step the scores where these lie, each of which one task reads before it writes it.
#include "kernels.h"
#include "linear.h"
#include "philox_block.h"
#include "sgd.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kHigh = 6, kWide = 4;  // 24 sums
#elif defined(__AVX2__)
constexpr int kHigh = 3, kWide = 4;
#else
constexpr int kHigh = 2, kWide = 2;
#endif
constexpr int64_t kPanel = 64, kPanelsAtOnce = 4;
constexpr int64_t kRowsATask = 48;  // a multiple of every kHigh
constexpr int64_t kSumsAtOnce = 256;
constexpr int64_t kFewNumbers = 1 << 16;  // of x: laid out sooner than another thread is there
// Up to here products of exp(-|logit|) with above, below and a sum of them squared are normal numbers.
constexpr float kModerate = 60.0f;

// log of a positive normal number: log m = 2 atanh((m - 1) / (m + 1)) for m in [sqrt(1/2), sqrt(2)); the series
// ends where its next term is below 2e-9.
inline float logarithm(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const int32_t exponent = int32_t(bits - 0x3F3504F3u) >> 23;
  const uint32_t mantissa = bits - (uint32_t(exponent) << 23);
  float m;
  memcpy(&m, &mantissa, 4);
  const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
  const float series = 2.0f * s * (1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9)))));
  const float e = float(exponent);
  return e * 0.693359375f + (series + e * -2.12194442e-4f);
}

inline float above_of(uint32_t k) { return float(int32_t(0x1FFFFFF - 2 * k)); }
inline float below_of(uint32_t k) { return float(int32_t(2 * k + 1)); }

inline float slope(float logit, uint32_t k, float inverse_tau) {
  const float z = (logit + logarithm(above_of(k) / below_of(k))) * inverse_tau;
  const float magnitude = z < 0.0f ? -z : z;
  // Each choice a statement of its own: as a branch it keeps the loop from becoming vectors, 15.6 ns an element
  // instead of 2.1 (Zen 4, one thread).
  const float held = magnitude < 87.0f ? magnitude : 87.0f;
  const float t = exp_minus(held);
  const float inside = t / ((1.0f + t) * (1.0f + t)) * inverse_tau;
  const float factor = magnitude > 87.0f ? 0.0f : 1.0f;
  const float poison = z == z ? 0.0f : z;
  return inside * factor + poison;
}

// What a mask's weights are scaled by, and what goes through the scale: 1 and 0 where there is none.
struct Scaling {
  const float *scales, *shifts;
  float scale(int64_t sample) const { return scales != nullptr ? scales[sample] : 1.0f; }
  float shift(int64_t sample) const { return shifts != nullptr ? shifts[sample] : 0.0f; }
};

// 64 elements of a row, or what is left of it and zeros.
struct Strip {
  float logits[kPanel], weights[kPanel], first[kPanel], second[kPanel], sums[kPanel];
  bool moderate;
};

// Take weights and logits; with tau = 1 what the slopes of all samples have in common: 1 and exp(-|logit|), exchanged
// where the logit is negative.
template <class T>
inline void prepare(const T* w, const float* logits, int64_t count, bool plain_tau, float factor, Strip& out) {
  for (int64_t i = 0; i < kPanel; i++) out.sums[i] = 0.0f;
  if (count == kPanel) {
    for (int64_t i = 0; i < kPanel; i++) out.weights[i] = plain(w[i]) * factor;
    if (logits != nullptr) memcpy(out.logits, logits, sizeof out.logits);
  } else {
    for (int64_t i = 0; i < kPanel; i++) out.weights[i] = i < count ? plain(w[i]) * factor : 0.0f;
    if (logits != nullptr)
      for (int64_t i = 0; i < kPanel; i++) out.logits[i] = i < count ? logits[i] : 0.0f;
  }
  if (logits == nullptr || !plain_tau) return;
  int32_t extreme = 0;
  for (int64_t i = 0; i < kPanel; i++) {
    const float l = out.logits[i], magnitude = l < 0.0f ? -l : l;
    extreme |= magnitude <= kModerate ? 0 : 1;
    const float held = magnitude < kModerate ? magnitude : kModerate;
    const float t = exp_minus(held);
    out.first[i] = l < 0.0f ? t : 1.0f;
    out.second[i] = l < 0.0f ? 1.0f : t;
  }
  out.moderate = extreme == 0;
}

// Where a gradient of scores goes: into memory of its own, or into the scores and their momentum by a step.
struct Stored {
  float* out;
  void operator()(int64_t e, int64_t count, const float* g) const { memcpy(out + e, g, size_t(count) * sizeof(float)); }
};
struct Stepped {
  float *scores, *momenta;
  Sgd sgd;
  void operator()(int64_t e, int64_t count, const float* g) const {
    if (count == kPanel) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kPanel; i += L) vector(e + i, g + i, Whole{});
    } else {
      for (int64_t i = 0; i < count; i += L) vector(e + i, g + i, lanes(low_ones(count), i));
    }
  }
  template <class Lanes>
  void vector(int64_t e, const float* g, Lanes there) const {
    F buf = sgd.moves && !sgd.first ? load(momenta + e, there) : set1(0.0f);
    const F moved = sgd(load(scores + e, there), load(g), buf);
    if (sgd.moves) store(momenta + e, buf, there);
    store(scores + e, moved, there);
  }
};

// The 24-bit numbers of 64 elements from `e` on.
inline const uint32_t* draw(int64_t e, uint32_t sample, const Keys& keys, uint32_t* k) {
  Block random;
  // 16 counters share the high half of the first: where they would not, they begin at a multiple of 16.
  const int64_t counter = e / 4, begin = uint32_t(counter) > 0xFFFFFFFFu - 32 ? counter / 16 * 16 : counter;
  const int64_t shift = e - 4 * begin;
  for (int64_t half = 0; half < (shift == 0 ? 1 : 2); half++) {
    philox16(begin + 16 * half, sample, 0, keys, random);
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 4; j++) k[64 * half + 4 * i + j] = random.lane[j][i] >> 8;
  }
  return k + shift;
}

// sums += (scale * g * W - shift) * slope
inline void teach(const float* g, const uint32_t* k, float inverse_tau, float scale, float shift, Strip& strip) {
  if (k == nullptr) {
    for (int64_t i = 0; i < kPanel; i++) strip.sums[i] += g[i] * strip.weights[i] * scale - shift;
  } else if (inverse_tau == 1.0f && strip.moderate) {
    for (int64_t i = 0; i < kPanel; i++) {
      const float a = strip.first[i] * above_of(k[i]), b = strip.second[i] * below_of(k[i]), sum = a + b;
      strip.sums[i] += (g[i] * strip.weights[i] * scale - shift) * (a * b / (sum * sum));
    }
  } else {
    for (int64_t i = 0; i < kPanel; i++)
      strip.sums[i] += (g[i] * strip.weights[i] * scale - shift) * slope(strip.logits[i], k[i], inverse_tau);
  }
}

// g (kHigh, kPanel) = grads (count, kRowsATask)[:, :kHigh]^T panel (count, kPanel)
inline void products(const float* grads, const float* panel, int64_t count, float* g) {
  for (int64_t at = 0; at < kPanel; at += kWide * L) {
    for (int64_t begin = 0; begin < count || begin == 0; begin += kSumsAtOnce) {
      const int64_t end = begin + kSumsAtOnce < count ? begin + kSumsAtOnce : count;
      F part[kHigh][kWide];
#pragma GCC unroll 8
      for (int r = 0; r < kHigh; r++)
#pragma GCC unroll 8
        for (int v = 0; v < kWide; v++) part[r][v] = set1(0.0f);
      for (int64_t b = begin; b < end; b++) {
        F columns[kWide];
#pragma GCC unroll 8
        for (int v = 0; v < kWide; v++) columns[v] = load(panel + b * kPanel + at + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < kHigh; r++) {
          const F one = set1(grads[b * kRowsATask + r]);
#pragma GCC unroll 8
          for (int v = 0; v < kWide; v++) part[r][v] = fma(one, columns[v], part[r][v]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kHigh; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < kWide; v++) {
          float* to = g + r * kPanel + at + v * L;
          store(to, begin > 0 ? load(to) + part[r][v] : part[r][v]);
        }
      }
    }
  }
}

template <class T, class To>
void through(const T* grad, const T* x, const T* w, const float* logits, uint64_t seed, const Rows& rows, int64_t n,
             int64_t k, float inverse_tau, float factor, Scaling scaling, const To& to_scores, int64_t threads) {
  const Keys keys(seed);
  static thread_local Scratch kept;
  const int64_t B = rows.rows, panels = (k + kPanel - 1) / kPanel;
  float* x_panels = kept.get<float>(panels * B * kPanel);
  parallel(panels, B * k < kFewNumbers ? 1 : threads, [=](int64_t p) {
    const int64_t left = k - p * kPanel, count = left < kPanel ? left : kPanel;
    for (int64_t b = 0; b < B; b++) {
      float* to = x_panels + (p * B + b) * kPanel;
      const T* from = x + b * k + p * kPanel;
      for (int64_t i = 0; i < count; i++) to[i] = plain(from[i]);
      for (int64_t i = count; i < kPanel; i++) to[i] = 0.0f;
    }
  });
  // A layer of few rows is dealt in parts of them.
  const int64_t blocks = (n + kRowsATask - 1) / kRowsATask, wanted = blocks > 0 ? 2 * threads / blocks : 1;
  const int64_t most = (panels + kPanelsAtOnce - 1) / kPanelsAtOnce;
  const int64_t parts = wanted < 1 ? 1 : wanted < most ? wanted : most;
  parallel(blocks * parts, threads, [=](int64_t task) {
    const int64_t begin = task / parts * kRowsATask, end = begin + kRowsATask < n ? begin + kRowsATask : n;
    const int64_t part = task % parts, first_panel = part * panels / parts, end_panel = (part + 1) * panels / parts;
    static thread_local Scratch kept_grads, kept_strips;
    float* grads = kept_grads.get<float>(B * kRowsATask);
    for (int64_t b = 0; b < B; b++)
      for (int64_t r = 0; r < kRowsATask; r++)
        grads[b * kRowsATask + r] = begin + r < end ? plain(grad[b * n + begin + r]) : 0.0f;
    Strip* strips = kept_strips.get<Strip>(kHigh);
    alignas(64) float g[kHigh * kPanel];
    uint32_t drawn[2 * kPanel];
    // Some panels of a few rows before the next rows: a kilobyte of each row at a time.
    for (int64_t p0 = first_panel; p0 < end_panel; p0 += kPanelsAtOnce) {
      const int64_t last = p0 + kPanelsAtOnce < end_panel ? p0 + kPanelsAtOnce : end_panel;
      for (int64_t row = begin; row < end; row += kHigh) {
        const int high = int(end - row < kHigh ? end - row : kHigh);
        const int64_t ahead = row + kHigh < end ? kHigh * k : (begin - row) * k + kPanelsAtOnce * kPanel;
        for (int64_t p = p0; p < last; p++) {
          const int64_t column = p * kPanel, count = k - column < kPanel ? k - column : kPanel;
          for (int r = 0; r < high; r++) {
            const int64_t e = (row + r) * k + column;
            prepare(w + e, logits != nullptr ? logits + e : nullptr, count, inverse_tau == 1.0f, factor, strips[r]);
            for (int64_t i = 0; i < kPanel; i += 16) {
              __builtin_prefetch(w + e + ahead + i, 0, 2);
              if (logits != nullptr) __builtin_prefetch(logits + e + ahead + i, 0, 2);
            }
          }
          for (int64_t s = 0; s < rows.samples; s++) {
            const int64_t b = rows.begin(s);
            products(grads + b * kRowsATask + row - begin, x_panels + (p * B + b) * kPanel, rows.count(s), g);
            for (int r = 0; r < high; r++) {
              const uint32_t* random =
                  logits != nullptr ? draw((row + r) * k + column, uint32_t(s), keys, drawn) : nullptr;
              teach(g + r * kPanel, random, inverse_tau, scaling.scale(s), scaling.shift(s), strips[r]);
            }
          }
          for (int r = 0; r < high; r++) to_scores((row + r) * k + column, count, strips[r].sums);
        }
      }
    }
  });
}

template <class T>
void rule(const float* g, const T* w, const float* logits, uint64_t seed, int64_t samples, int64_t n,
          float inverse_tau, float factor, Scaling scaling, float* out, int64_t threads) {
  const Keys keys(seed);
  in_large_pages(out, n * 4);
  pieces(n, 256 * kPanel, threads, [=](int64_t begin, int64_t end) {
    Strip strip;
    alignas(64) float last[kPanel] = {};
    uint32_t drawn[2 * kPanel];
    for (int64_t e = begin; e < end; e += kPanel) {
      const int64_t count = end - e < kPanel ? end - e : kPanel;
      prepare(w + e, logits != nullptr ? logits + e : nullptr, count, inverse_tau == 1.0f, factor, strip);
      for (int64_t s = 0; s < samples; s++) {
        const uint32_t* random = logits != nullptr ? draw(e, uint32_t(s), keys, drawn) : nullptr;
        const float* from = g + s * n + e;
        if (count < kPanel) from = static_cast<const float*>(memcpy(last, from, size_t(count) * sizeof(float)));
        teach(from, random, inverse_tau, scaling.scale(s), scaling.shift(s), strip);
      }
      memcpy(out + e, strip.sums, size_t(count) * sizeof(float));
    }
  });
}

template <class To>
void of_kind(const void* grad, const void* x, const void* w, int64_t kind, const float* logits, uint64_t seed,
             const Rows& rows, int64_t n, int64_t k, double tau, double factor, Scaling scaling, const To& to_scores,
             int64_t threads) {
  const float inverse = float(1.0 / tau), times = float(factor);
  if (kind == 0)
    return through(static_cast<const float*>(grad), static_cast<const float*>(x), static_cast<const float*>(w), logits,
                   seed, rows, n, k, inverse, times, scaling, to_scores, threads);
  through(static_cast<const uint16_t*>(grad), static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(w), logits,
          seed, rows, n, k, inverse, times, scaling, to_scores, threads);
}

}  // namespace

void score_grad(const float* g, const void* w, int64_t kind, const float* logits, uint64_t seed, int64_t samples,
                int64_t n, double tau, double factor, const float* scales, const float* shifts, float* out,
                int64_t threads) {
  const float inverse = float(1.0 / tau), times = float(factor);
  const Scaling scaling{scales, shifts};
  if (kind == 0)
    return rule(g, static_cast<const float*>(w), logits, seed, samples, n, inverse, times, scaling, out, threads);
  rule(g, static_cast<const uint16_t*>(w), logits, seed, samples, n, inverse, times, scaling, out, threads);
}

void straight_through(const void* grad, const void* x, const void* w, int64_t kind, const float* logits, uint64_t seed,
                      const int64_t* starts, int64_t samples, int64_t b, int64_t n, int64_t k, double tau,
                      double factor, const float* scales, const float* shifts, float* out, int64_t threads) {
  const Rows rows{starts, b, samples, nullptr, 1.0f};
  in_large_pages(out, n * k * 4);
  of_kind(grad, x, w, kind, logits, seed, rows, n, k, tau, factor, Scaling{scales, shifts}, Stored{out}, threads);
}

void straight_through_step(const void* grad, const void* x, const void* w, int64_t kind, int64_t sampled, uint64_t seed,
                           const int64_t* starts, int64_t samples, int64_t b, int64_t n, int64_t k, double tau,
                           double factor, const float* scales, const float* shifts, float* scores, float* momenta,
                           double rate, double momentum, double weight_decay, double dampening, int64_t nesterov,
                           int64_t maximize, int64_t first_step, int64_t threads) {
  const Rows rows{starts, b, samples, nullptr, 1.0f};
  const Sgd sgd(rate, momentum, weight_decay, dampening, nesterov, maximize, first_step);
  of_kind(grad, x, w, kind, sampled != 0 ? scores : nullptr, seed, rows, n, k, tau, factor, Scaling{scales, shifts},
          Stepped{scores, momenta, sgd}, threads);
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
