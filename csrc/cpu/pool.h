// Threads: those of the OpenMP runtime that torch has loaded, found at run time and linked by nobody; where there is
// none, or in a child of fork, a small pool of our own. A runtime's threads spin for milliseconds after each parallel
// region, so that another pool beside it waits for a core: a masked SGD step after a torch step, 2 threads on 2 cores
// (AMD EPYC), takes 1.25 to 1.4 times as long on our own pool.
#pragma once

#include <stdint.h>

namespace fastmask {

// Call body(context, i) once for each i in [0, tasks) on at most `threads` threads, the caller's among them.
// Called while another call runs, from a task or from another thread, it runs its tasks where it is.
void run(int64_t tasks, int64_t threads, void (*body)(void*, int64_t), void* context);

// Run tasks on the threads of a runtime from now on: its GOMP_parallel and omp_get_thread_num.
void borrow(uintptr_t parallel, uintptr_t thread_number);

}  // namespace fastmask
