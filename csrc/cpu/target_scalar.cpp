// Plain C++ with the smallest vectors of the architecture (SSE2 on every x86-64): runs everywhere.
#define MXQ_TARGET scalar
#define MXQ_TARGET_TABLE target_scalar
#define MXQ_TARGET_NAME "scalar"

#include "linear.h"
#include "simd.h"

namespace mxq::scalar {
// 16 registers of 4 lanes, four for each vector: two rows of x are all that they hold.
static constexpr int GEMV_BLOCK = 2, GEMM_BLOCK = 2, GEMM_TILES = 1;
static constexpr int GEMV_CHAINS_1 = 2, GEMV_CHAINS_2 = 1, GEMV_CHAINS_END = 0;
static constexpr int GEMV8_BLOCK = 2, GEMM8_BLOCK = 2, GEMM8_TILES = 1;
static constexpr int64_t GEMV8_MOST = GEMV8_ROWS;
}  // namespace mxq::scalar

#include "linear.inl"
#include "attention.inl"
#include "layer.inl"
