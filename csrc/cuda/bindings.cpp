// fastmask._cuda: every launcher of kernels.h under its own name, with addresses as whole numbers.
#include <pybind11/pybind11.h>

#include <string>

#include "kernels.h"

namespace py = pybind11;

namespace fastmask {
namespace {

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

[[noreturn]] void fail(const char* op, int code) {
  const std::string sentence = std::string(op) + ": " + said(code) + " (CUDA error " + std::to_string(code) + ")";
  if (!unavailable(code)) throw std::runtime_error(sentence);
  const py::object kind = py::module_::import("fastmask.errors").attr("BackendUnavailable");
  py::set_error(kind, sentence.c_str());
  throw py::error_already_set();
}

template <class... A>
void def(py::module_& m, const char* name, int (*kernel)(A...)) {
  m.def(name, [name, kernel](typename Argument<A>::type... values) {
    int code;
    {
      py::gil_scoped_release others_run;
      code = kernel(Argument<A>::from(values)...);
    }
    if (code != 0) fail(name, code);
  });
}

}  // namespace
}  // namespace fastmask

PYBIND11_MODULE(_cuda, m) {
  m.def(
      "missing",
      []() -> py::object {
        const char* reason = fastmask::missing();
        return reason == nullptr ? py::object(py::none()) : py::object(py::str(reason));
      },
      "Why no kernel can run in this process, or None.");
#define X(kernel, arguments) fastmask::def(m, #kernel, &fastmask::kernel);
  FASTMASK_CUDA_KERNELS(X)
#undef X
}
