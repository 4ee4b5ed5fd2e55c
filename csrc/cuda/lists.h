// Ops over many tensors in one launch: a table of addresses that travels with the launch, as its parameter. Nothing
// is copied to the device beforehand, and a CUDA graph keeps the table with the node.
#pragma once

#include "launch.h"
#include "octet.h"

namespace fastmask {

// Elements a block: four rounds of an octet a thread.
constexpr int64_t kPiece = 4 * 8 * kThreads;
// Tensors a launch. 24 KB of the 32 KB that parameters may have, for the widest table; more tensors, more launches.
constexpr int kRows = 320;

template <int COLUMNS>
struct Table {
  int64_t row[kRows][COLUMNS];  // the number of elements last
  int32_t first[kRows + 1];     // the block each tensor starts with, then their number
  int32_t count;
};

// The row of this block's tensor and the first element of its piece.
template <int COLUMNS>
__device__ inline const int64_t* piece(const Table<COLUMNS>& table, int64_t& begin) {
  const int block = int(blockIdx.x);
  int low = 0, high = table.count;  // first[low] <= block < first[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  begin = int64_t(block - table.first[low]) * kPiece;
  return table.row[low];
}

// Call body(element, count) for this thread's octets of a piece, `count` elements being there.
template <class Body>
__device__ inline void each_octet(int64_t begin, int64_t n, Body body) {
  const int64_t end = begin + kPiece < n ? begin + kPiece : n;
#pragma unroll 1
  for (int64_t e = begin + 8 * int64_t(threadIdx.x); e < end; e += 8 * kThreads)
    body(e, end - e < 8 ? int(end - e) : 8);
}

// Run a kernel over the rows of a host table, as many as fit at a time; empty tensors have no row.
template <int COLUMNS, class Numbers>
int launch_list(int64_t device, void* stream, void (*kernel)(Table<COLUMNS>, Numbers), const int64_t* rows,
                int64_t count, Numbers numbers) {
  Table<COLUMNS> table;
  table.count = 0;
  table.first[0] = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t* row = rows + i * COLUMNS;
    const int64_t pieces = blocks(row[COLUMNS - 1], kPiece);
    if (pieces > 0) {
      for (int c = 0; c < COLUMNS; c++) table.row[table.count][c] = row[c];
      table.first[table.count + 1] = table.first[table.count] + int32_t(pieces);
      table.count++;
    }
    if (table.count == kRows || (i == count - 1 && table.count > 0)) {
      const int code = launch(device, stream, kernel, grid(table.first[table.count]), kThreads, table, numbers);
      if (code != 0) return code;
      table.count = 0;
    }
  }
  return 0;
}

template <class P>
__device__ inline P* pointer(int64_t address) {
  return reinterpret_cast<P*>(address);
}

}  // namespace fastmask
