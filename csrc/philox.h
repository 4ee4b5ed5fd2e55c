// The generator and the threshold of sample_mask, shared by host and device code.
//
//     key = seed      counter = (e / 4 low, e / 4 high, sample, stream)      element e takes word e % 4
//     k = word >> 8   the bit is 1 where k < T(l) = floor(sigmoid(l) * 2^24)
//
// Every float operation is one rounded IEEE operation. The host is compiled with -ffp-contract=off; device code
// names the rounding, which also keeps nvcc from contracting.
#pragma once

#include "bits.h"

#ifdef __CUDA_ARCH__
#define FASTMASK_MUL(a, b) __fmul_rn(a, b)
#define FASTMASK_ADD(a, b) __fadd_rn(a, b)
#define FASTMASK_DIV(a, b) __fdiv_rn(a, b)
#else
#define FASTMASK_MUL(a, b) ((a) * (b))
#define FASTMASK_ADD(a, b) ((a) + (b))
#define FASTMASK_DIV(a, b) ((a) / (b))
#endif

namespace fastmask {

// One round of Philox4x32; call it ten times, advancing the key in between.
FASTMASK_HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
  c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
  c1 = uint32_t(p1);
  c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
  c3 = uint32_t(p0);
}

FASTMASK_HD void philox_advance_key(uint32_t& k0, uint32_t& k1) {
  k0 += 0x9E3779B9u;
  k1 += 0xBB67AE85u;
}

// exp(-a) for a in [0, 87], one operation after the other.
FASTMASK_HD float exp_minus(float a) {
  // a >= 0, so that cutting off is floor.
  const int32_t n = int32_t(FASTMASK_ADD(FASTMASK_MUL(a, 1.44269502162933349609375f), 0.5f));
  const float nf = float(n);
  float r = FASTMASK_ADD(a, -FASTMASK_MUL(nf, 0.693359375f));
  r = FASTMASK_ADD(r, -FASTMASK_MUL(nf, -2.12194442e-4f));
  float z = -0.00831876509f;
  z = FASTMASK_ADD(FASTMASK_MUL(z, r), 0.0419019051f);
  z = FASTMASK_ADD(FASTMASK_MUL(z, r), -0.166671857f);
  z = FASTMASK_ADD(FASTMASK_MUL(z, r), 0.499990255f);
  z = FASTMASK_ADD(FASTMASK_MUL(z, r), -0.999999821f);
  z = FASTMASK_ADD(FASTMASK_MUL(z, r), 1.0f);
  const uint32_t exponent = uint32_t(127 - n) << 23;  // 2^-n by its bits
  float power;
  memcpy(&power, &exponent, 4);
  return FASTMASK_MUL(z, power);
}

// T(l): the contract's sigmoid, one operation after the other, as a 24-bit integer. NaN gives 0.
FASTMASK_HD uint32_t threshold(float logit) {
  const float l = logit == logit ? logit : -40.0f;
  const float magnitude = l < 0.0f ? -l : l;
  const float a = magnitude > 40.0f ? 40.0f : magnitude;
  const float z = exp_minus(a);
  const float s = FASTMASK_DIV(l >= 0.0f ? 1.0f : z, FASTMASK_ADD(1.0f, z));
  return uint32_t(int32_t(FASTMASK_MUL(s, 16777216.0f)));
}

}  // namespace fastmask
