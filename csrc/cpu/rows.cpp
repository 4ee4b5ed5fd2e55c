// Tables of lists.h straight from lists of torch's tensors, which are described by the functions that DLPack's exchange
// table holds: torch.Tensor carries one, so that no torch is linked. A tensor takes 60 ns, as long as one of
// its attributes asked for by Python (AMD EPYC).
#include "rows.h"

#include <stdint.h>

#include <vector>

#include "../bits.h"

namespace fastmask {
namespace {

// DLPack 1: what describes a tensor, and the functions that a framework offers.
struct Described {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Exchange {
  uint32_t major, minor;
  void* older;
  void *allocate, *to_managed, *from_managed;
  int (*describe)(void* tensor, Described* out);
  void* stream;
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kUnsigned = 1, kFloat = 2, kBfloat = 4;

const Exchange* exchange = nullptr;
std::vector<PyTypeObject*> plain_types;

struct Plain {
  Described is;
  int64_t numel;

  // False for what the tables cannot hold as it lies: no torch.Tensor, or memory that is elsewhere or has gaps.
  bool of(PyObject* value) {
    bool known = false;
    for (PyTypeObject* type : plain_types) known |= Py_TYPE(value) == type;
    if (!known) return false;
    if (exchange->describe(value, &is) != 0) {
      PyErr_Clear();
      return false;
    }
    numel = 1;
    for (int32_t d = 0; d < is.ndim; d++) numel *= is.shape[d];
    if (is.device_type != kCpu || (is.data == nullptr && numel > 0)) return false;
    int64_t stride = 1;
    for (int32_t d = is.ndim - 1; d >= 0 && numel > 0; d--) {
      if (is.shape[d] != 1 && is.strides[d] != stride) return false;
      stride *= is.shape[d];
    }
    // A lazy negation is not described. torch makes one where it takes the imaginary part of a conjugate: with gaps,
    // unless it is a single number.
    return numel != 1 || !py::handle(value).attr("is_neg")().cast<bool>();
  }
  int64_t address() const { return int64_t(reinterpret_cast<uintptr_t>(is.data)) + int64_t(is.byte_offset); }
  bool is_floating() const { return is.code == kFloat || is.code == kBfloat; }
  bool same_type(const Plain& other) const { return is.code == other.is.code && is.bits == other.is.bits; }
  bool same_shape(const Plain& other) const {
    if (is.ndim != other.is.ndim) return false;
    for (int32_t d = 0; d < is.ndim; d++)
      if (is.shape[d] != other.is.shape[d]) return false;
    return true;
  }
  bool is_mask_of(const Plain& other) const {
    return is.code == kUnsigned && is.bits == 8 && is.ndim == 1 && numel == 8 * packed_words(other.numel);
  }
};

}  // namespace

void know(py::capsule table, py::tuple types) {
  const auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
  if (found == nullptr) throw py::error_already_set();
  if (found->major != 1 || found->describe == nullptr) return;
  exchange = found;
  for (py::handle type : types) plain_types.push_back(reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()));
}

py::object rows(const py::object& params, const py::tuple& columns, const py::object& frozen) {
  std::vector<PyObject*> lists{params.ptr()};
  for (py::handle column : columns) lists.push_back(column.ptr());
  lists.push_back(frozen.ptr());
  const auto listed = [](PyObject* list) { return PyList_CheckExact(list) || PyTuple_CheckExact(list); };
  if (exchange == nullptr || !listed(params.ptr())) return py::none();
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(params.ptr());
  for (PyObject* list : lists)
    if (list != Py_None && (!listed(list) || PySequence_Fast_GET_SIZE(list) != count)) return py::none();
  const size_t last = lists.size() - 1, width = lists.size() + 2;
  std::vector<int64_t> table(size_t(count) * width, 0);
  Plain head{}, param{}, value{};
  for (Py_ssize_t t = 0; t < count; t++) {
    int64_t* row = table.data() + size_t(t) * width;
    if (!param.of(PySequence_Fast_GET_ITEM(lists[0], t))) return py::none();
    if (t == 0) head = param;
    if (!param.is_floating() || !param.same_type(head)) return py::none();
    row[0] = param.address();
    PyObject* bits = lists[last] == Py_None ? Py_None : PySequence_Fast_GET_ITEM(lists[last], t);
    if (bits != Py_None) {
      if (!value.of(bits) || !value.is_mask_of(param)) return py::none();
      row[last] = value.address();
    }
    int64_t held = -1;
    for (size_t c = 1; c < last; c++) {
      if (lists[c] == Py_None) continue;
      if (!value.of(PySequence_Fast_GET_ITEM(lists[c], t)) || !value.same_type(head)) return py::none();
      if (c == 1 && !value.same_shape(param)) return py::none();
      if (c > 1) {
        const bool compact = bits != Py_None && value.is.ndim == 1 && value.numel < param.numel;
        if (!(compact || value.same_shape(param)) || (held >= 0 && held != value.numel)) return py::none();
        held = value.numel;
      }
      row[c] = value.address();
    }
    row[last + 1] = held < 0 ? param.numel : held;
    row[last + 2] = param.numel;
  }
  return py::bytes(reinterpret_cast<const char*>(table.data()), table.size() * sizeof(int64_t));
}

py::object advance(const py::list& counts) {
  std::vector<float*> where;
  Plain count{};
  for (py::handle item : counts) {
    if (exchange == nullptr || !count.of(item.ptr())) return py::none();
    if (count.is.code != kFloat || count.is.bits != 32 || count.numel != 1) return py::none();
    where.push_back(reinterpret_cast<float*>(count.address()));
  }
  std::vector<double> now;
  for (float* at : where) now.push_back(*at += 1.0f);
  return py::bytes(reinterpret_cast<const char*>(now.data()), now.size() * sizeof(double));
}

}  // namespace fastmask
