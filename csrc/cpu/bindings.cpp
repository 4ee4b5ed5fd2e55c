// fastmask._cpu: every kernel of kernels.h under its own name, with addresses as whole numbers.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "rows.h"

namespace py = pybind11;

namespace fastmask {

#define FASTMASK_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels kernels; \
  }
FASTMASK_DECLARE(portable)
#ifdef FASTMASK_X86
FASTMASK_DECLARE(avx2)
FASTMASK_DECLARE(avx512)
FASTMASK_DECLARE(avx512bf16)
#endif

namespace {

// The tables this processor can run, fastest first.
std::vector<const Kernels*> present() {
  std::vector<const Kernels*> found;
#ifdef FASTMASK_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("popcnt")) {
    // All that have BF16 have the others too, but for Cooper Lake.
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2") &&
        __builtin_cpu_supports("avx512vpopcntdq"))
      found.push_back(&avx512bf16::kernels);
    found.push_back(&avx512::kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt"))
    found.push_back(&avx2::kernels);
#endif
  found.push_back(&portable::kernels);
  return found;
}

const Kernels* active = nullptr;

void use(const std::string& isa) {
  std::string names;
  for (const Kernels* kernels : present()) {
    if (isa == kernels->name) {
      active = kernels;
      return;
    }
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  throw py::value_error("FASTMASK_CPU_ISA: expected one of " + names + " (those of this processor), got '" + isa +
                        "'");
}

template <class T>
struct Argument {
  using type = T;
  static T from(T value) { return value; }
};
template <class T>
struct Argument<T*> {
  using type = uintptr_t;
  static T* from(uintptr_t address) { return reinterpret_cast<T*>(address); }
};

template <class... A>
void def(py::module_& m, const char* name, void (*Kernels::*kernel)(A...)) {
  m.def(
      name, [kernel](typename Argument<A>::type... values) { (active->*kernel)(Argument<A>::from(values)...); },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace
}  // namespace fastmask

PYBIND11_MODULE(_cpu, m) {
  using namespace fastmask;
  active = present().front();
  m.def("isa", [] { return std::string(active->name); }, "Name of the instruction set in use.");
  m.def(
      "isas",
      [] {
        py::list names;
        for (const Kernels* kernels : present()) names.append(kernels->name);
        return names;
      },
      "Names of the instruction sets this processor has kernels for, fastest first.");
  m.def("borrow", &borrow,
        "Run on the threads of an OpenMP runtime from now on: the addresses of its GOMP_parallel\n"
        "and omp_get_thread_num.");
  m.def("use", &use, "Take the kernels of another instruction set from now on.");
  m.def(
      "all_ones",
      [](uintptr_t bits, int64_t samples, int64_t n) {
        return all_ones(reinterpret_cast<const uint8_t*>(bits), samples, n);
      },
      "Whether all n bits of all masks are 1.");
  m.def("know", &know, "Understand torch's tensors: its table of DLPack's exchange functions, and their types.");
  m.def("rows", &rows, "One row of addresses and sizes a tensor, as bytes; None where one is not plain.");
  m.def("advance", &advance, "Add 1 to counts, tensors of one float32, and return them as bytes of doubles, or None.");
#define X(kernel, arguments) def(m, #kernel, &Kernels::kernel);
  FASTMASK_KERNELS(X)
#undef X
}
