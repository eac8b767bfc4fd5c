// Stands in for the kernels that a small library leaves out: launch.cpp, attention.cpp and layer.cpp name all of them. A kernel that is there takes its place.
#include "attention.h"
#include "launch.h"
#include "layer.h"

namespace mxq::cuda {

#define STUB_MV(name) \
  __attribute__((weak)) int mv_##name(const Params&, int, bool, void*) { return NO_KERNEL; }
#define STUB_MM(name) \
  __attribute__((weak)) int mm_##name(const Params&, void*) { return NO_KERNEL; }
#define STUBS(name) STUB_MV(name) STUB_MM(name)
STUBS(w1) STUBS(w2) STUBS(w3) STUBS(w4) STUBS(w5) STUBS(w6) STUBS(w8) STUBS(lut2) STUBS(lut3) STUBS(lut4) STUBS(nf4) STUBS(fp16) STUBS(mixed)

__attribute__((weak)) int launch_attend(const AttendParams&, int, void*) { return NO_KERNEL; }
__attribute__((weak)) int launch_attend_merge(const AttendParams&, bool, void*) { return NO_KERNEL; }
__attribute__((weak)) int pack_page(const PageDesc&, const Rows&, int64_t, int64_t, uint8_t*, uint16_t*, void*) { return NO_KERNEL; }
__attribute__((weak)) int launch_add_norm(NormParams, int64_t, bool, void*) { return NO_KERNEL; }
__attribute__((weak)) int launch_turn_and_store(const TurnParams&, int64_t, bool, void*) { return NO_KERNEL; }
__attribute__((weak)) int launch_silu_gate(GateParams, bool, void*) { return NO_KERNEL; }

}  // namespace mxq::cuda
