// restore_frozen_: whole octets of integers; where all eight are free nothing is read, where all are frozen the
// parameter is not.
#include "kernels.h"
#include "lists.h"

namespace fastmask {
namespace {

struct Nothing {};
using Rows = Table<4>;  // param, saved, frozen, n

template <class T>
__global__ void __launch_bounds__(kThreads) restore(const __grid_constant__ Rows table, Nothing) {
  int64_t begin;
  const int64_t* row = piece(table, begin);
  T* param = pointer<T>(row[0]);
  const T* saved = pointer<const T>(row[1]);
  const uint8_t* frozen = pointer<const uint8_t>(row[2]);
  const bool aligned = on16(param) && on16(saved);
  each_octet(begin, row[3], [&](int64_t e, int count) {
    const unsigned byte = frozen[e / 8];  // padding bits are 0
    if (byte == 0) return;
    const bool whole = aligned && count == 8;
    Octet<T> now, old;
    load8(saved, e, count, whole, old);
    if (byte != 0xff) {
      load8(param, e, count, whole, now);
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (!(byte >> i & 1)) old.at[i] = now.at[i];
    }
    store8(param, e, count, whole, old);
  });
}

}  // namespace

int restore_frozen_(const int64_t* table, int64_t count, int64_t size, int64_t device, void* stream) {
  if (size == 2) return launch_list(device, stream, restore<uint16_t>, table, count, Nothing{});
  if (size == 4) return launch_list(device, stream, restore<uint32_t>, table, count, Nothing{});
  return launch_list(device, stream, restore<uint64_t>, table, count, Nothing{});
}

}  // namespace fastmask
