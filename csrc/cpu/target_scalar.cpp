// Plain C++: runs everywhere, and is vectorized by the compiler with what every x86-64 has.
#define MXQ_TARGET scalar
#define MXQ_TARGET_TABLE target_scalar
#define MXQ_TARGET_NAME "scalar"

#include "linear.h"
#include "simd.h"

namespace mxq::scalar {
static constexpr int GEMV_BLOCK = 4, GEMM_BLOCK = 4, GEMM_TILES = 1;
static constexpr int GEMV_CHAINS_2 = 2, GEMV_CHAINS_END = 3;
}  // namespace mxq::scalar

#include "linear.inl"
