// What Python's lists of tensors become: a table of addresses, with one row a tensor.
#pragma once

#include <pybind11/pybind11.h>

namespace fastmask {

namespace py = pybind11;

// Understand tensors of these types from now on, by the table of DLPack's exchange functions.
void know(py::capsule table, py::tuple types);

// A row for each parameter: its address, those of its companions in `columns` (gradients or saved values, then state;
// None = 0) and of its mask or 0, the number of elements of its state, and its own. None where anything is not plain:
// contiguous tensors of those types on the CPU, of one floating type, companions like their parameter (state may be
// shorter, 1-D), masks its packed bits.
py::object rows(const py::object& params, const py::tuple& columns, const py::object& frozen);

// Add 1 to tensors of one float32 number on the CPU; return what they are then, doubles. None where one is not such.
py::object advance(const py::list& counts);

}  // namespace fastmask
