// A small pool of threads of our own: OpenMP runtimes that come with other wheels fight over the cores.
#pragma once

#include <stdint.h>

namespace fastmask {

// Call body(context, i) once for each i in [0, tasks) on at most `threads` threads, the caller's among them.
// Called while another call runs, from a task or from another thread, it runs its tasks where it is.
void run(int64_t tasks, int64_t threads, void (*body)(void*, int64_t), void* context);

}  // namespace fastmask
