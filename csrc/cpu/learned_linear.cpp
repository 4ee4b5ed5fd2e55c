// learned_linear: the straight-through rule in one pass over the weight, with no noise stored.
//
//     z = (logit + log((2^25 - 1 - 2k) / (2k + 1))) / tau        k: the 24 bits that decided the sample
//     out = g * w * s(1 - s) / tau,  s = sigmoid(z)              s(1 - s) = t / (1 + t)^2 with t = exp(-|z|)
#include "kernels.h"
#include "philox_block.h"

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

constexpr int64_t kElementsAPiece = 1 << 13;

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

inline float slope(float logit, uint32_t k, float inverse_tau) {
  const float above = float(int32_t(0x1FFFFFF - 2 * k)), below = float(int32_t(2 * k + 1));
  const float z = (logit + logarithm(above / below)) * inverse_tau;
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

inline float weight_at(const float* w, int64_t e) { return w[e]; }
inline float weight_at(const uint16_t* w, int64_t e) { return widen_one(w[e]); }

template <class T>
void through(const float* g, const T* w, const float* logits, uint64_t seed, uint32_t sample, float inverse_tau,
             int64_t n, bool add, float* out, int64_t threads) {
  pieces(n, kElementsAPiece, threads, [=](int64_t begin, int64_t end) {
    Block random;
    uint32_t k[64];
    float slopes[64] = {};
    for (int64_t e = begin; e < end; e += 64) {
      philox16(e / 4, sample, 0, seed, random);
      for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++) k[4 * i + j] = random.lane[j][i] >> 8;
      const int64_t count = e + 64 <= end ? 64 : end - e;
      if (count == 64) {
        for (int i = 0; i < 64; i++) slopes[i] = slope(logits[e + i], k[i], inverse_tau);
      } else {
        for (int64_t i = 0; i < count; i++) slopes[i] = slope(logits[e + i], k[i], inverse_tau);
      }
      for (int64_t i = 0; i < count; i++) {
        const float found = g[e + i] * weight_at(w, e + i) * slopes[i];
        out[e + i] = add ? out[e + i] + found : found;
      }
    }
  });
}

}  // namespace

void straight_through(const float* g, const void* w, int64_t kind, const float* logits, uint64_t seed,
                      uint32_t sample, double tau, int64_t n, int64_t add, float* out, int64_t threads) {
  const float inverse = float(1.0 / tau);
  if (kind == 0)
    return through(g, static_cast<const float*>(w), logits, seed, sample, inverse, n, add != 0, out, threads);
  through(g, static_cast<const uint16_t*>(w), logits, seed, sample, inverse, n, add != 0, out, threads);
}

}  // namespace FASTMASK_ISA
}  // namespace fastmask
