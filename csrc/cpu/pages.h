// Large pages for what is about to be written for the first time.
#pragma once

#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastmask {
namespace FASTMASK_ISA {
namespace {

// Ask for pages of 2 MB where that many are about to be written for the first time: 64 MB of gradients are 16,384
// faults in pages of 4 KB, a third of what computing them takes; 64 MB of unpacked bools half. The allocator hands out
// blocks of some megabytes again and again: packed bits gain nothing from it.
inline void in_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) / kLarge * kLarge;
  // Advice: where it is not taken, pages are small.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace
}  // namespace FASTMASK_ISA
}  // namespace fastmask
