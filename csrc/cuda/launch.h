// How kernels are started: on the tensor's device and stream, each launch checked.
#pragma once

#include <stdint.h>

#include "ptx.h"

namespace fastmask {

// Makes a device current, and the one before again at the end.
struct OnDevice {
  explicit OnDevice(int64_t device) {
    status = cudaGetDevice(&before);
    if (status == cudaSuccess && before != device) {
      status = cudaSetDevice(int(device));
      moved = status == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (moved) cudaSetDevice(before);
  }
  OnDevice(const OnDevice&) = delete;
  cudaError_t status;
  int before = 0;
  bool moved = false;
};

inline dim3 grid(int64_t x, int64_t y = 1) { return dim3(unsigned(x), unsigned(y)); }

inline int64_t blocks(int64_t count, int64_t each) { return (count + each - 1) / each; }

// The code of a launch, or 0 where there is nothing to do.
template <class... P, class... A>
int launch(int64_t device, void* stream, void (*kernel)(P...), dim3 blocks, int threads, const A&... arguments) {
  if (blocks.x == 0 || blocks.y == 0) return 0;
  OnDevice here(device);
  if (here.status != cudaSuccess) return int(here.status);
  start(kernel, blocks, threads, static_cast<cudaStream_t>(stream), static_cast<const P&>(arguments)...);
  return int(cudaGetLastError());
}

}  // namespace fastmask
