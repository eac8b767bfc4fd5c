// Stands in for the kernels that a small library leaves out: the tables of launch.cpp name all of them. A kernel that is there takes its place.
#include "launch.h"

namespace mxq::cuda {

#define STUB_MV(name) \
  __attribute__((weak)) int mv_##name(const Params&, int, unsigned, int, void*) { return NO_KERNEL; }
#define STUB_MM(name) \
  __attribute__((weak)) int mm_##name(const Params&, void*) { return NO_KERNEL; }
#define STUBS(name) STUB_MV(name) STUB_MM(name)
STUBS(w2) STUBS(w3) STUBS(w4) STUBS(w8) STUBS(lut2) STUBS(lut3) STUBS(lut4) STUBS(nf4) STUBS(fp16) STUBS(mixed)

}  // namespace mxq::cuda
