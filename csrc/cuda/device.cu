// What the runtime says of this machine.
#include "kernels.h"
#include "launch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace fastmask {
namespace {

// The compute capabilities compiled for, such as "80 90 120+": of a "+" there is code that newer ones translate.
constexpr char kCapabilities[] = FASTMASK_CUDA_CAPABILITIES;

// Code runs on its own major capability from its minor one on.
bool covered(int major, int minor) {
  for (const char* at = kCapabilities; *at != 0;) {
    char* end;
    const long each = strtol(at, &end, 10);
    const bool here = each / 10 == major && each % 10 <= minor, later = *end == '+' && each <= 10 * major + minor;
    if (here || later) return true;
    at = end + strspn(end, "+ ");
  }
  return false;
}

}  // namespace

const char* said(int code) { return cudaGetErrorString(cudaError_t(code)); }

bool unavailable(int code) {
  return code == cudaErrorNoDevice || code == cudaErrorInsufficientDriver || code == cudaErrorNoKernelImageForDevice ||
         code == cudaErrorUnsupportedPtxVersion || code == cudaErrorInvalidDevice;
}

const char* missing() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (code != cudaSuccess) return cudaGetErrorString(code);
  static char sentence[160];
  for (int i = 0; i < count; i++) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
    if (!covered(major, minor)) {
      snprintf(sentence, sizeof sentence, "device %d has compute capability %d.%d and it was compiled for %s", i, major,
               minor, kCapabilities);
      return sentence;
    }
  }
  return count == 0 ? "there is no CUDA device" : nullptr;
}

}  // namespace fastmask
