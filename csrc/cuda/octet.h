// Eight consecutive elements: what one byte of a mask speaks of.
#pragma once

#include "ptx.h"

namespace fastmask {

constexpr int kThreads = 256;

template <class T>
union Octet {
  T at[8];
  uint4 sixteen[sizeof(T) < 2 ? 1 : sizeof(T) / 2];  // 16 bytes each
  uint2 eight;                                       // of elements of one byte
};

__device__ inline bool on16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Elements e to e + 7, of which `count` are there; `whole`: all are, and their address is a multiple of 16, or of 8
// for elements of one byte.
template <class T>
__device__ inline void load8(const T* p, int64_t e, int count, bool whole, Octet<T>& v) {
  if (whole) {
    if constexpr (sizeof(T) == 1) {
      v.eight = *reinterpret_cast<const uint2*>(p + e);
    } else {
#pragma unroll
      for (int i = 0; i < int(sizeof(T) / 2); i++) v.sixteen[i] = reinterpret_cast<const uint4*>(p + e)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < count) v.at[i] = p[e + i];
  }
}

template <class T>
__device__ inline void store8(T* p, int64_t e, int count, bool whole, const Octet<T>& v) {
  if (whole) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); i++) reinterpret_cast<uint4*>(p + e)[i] = v.sixteen[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < count) p[e + i] = v.at[i];
  }
}

// Ones for the `count` elements of an octet that are there.
__device__ inline unsigned there(int count) { return (1u << count) - 1; }

}  // namespace fastmask
