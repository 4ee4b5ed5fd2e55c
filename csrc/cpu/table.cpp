// The table of one instruction set's kernels.
#include "kernels.h"

#define FASTMASK_TEXT(x) #x
#define FASTMASK_NAME(x) FASTMASK_TEXT(x)

namespace fastmask {
namespace FASTMASK_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    FASTMASK_NAME(FASTMASK_ISA),
#define X(kernel, arguments) kernel,
    FASTMASK_KERNELS(X)
#undef X
};

}  // namespace FASTMASK_ISA
}  // namespace fastmask
