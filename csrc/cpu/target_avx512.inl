// Both AVX-512 targets: 32 registers of 16 lanes.
#include <immintrin.h>

#include "linear.h"
#include "simd.h"

namespace mxq {
namespace MXQ_TARGET {
// gemm: 12 rows of x by two vectors of weights are 24 accumulators, two weights and one input beside them.
static constexpr int GEMV_BLOCK = 8, GEMM_BLOCK = 12, GEMM_TILES = 2;
static constexpr int GEMV_CHAINS_1 = 8, GEMV_CHAINS_2 = 4, GEMV_CHAINS_END = 8;
// gemm8: 6 rows of x by four vectors, so that a chunk's 64 rows share each block of x: 24 accumulators, four weights, one input.
static constexpr int GEMV8_BLOCK = 4, GEMM8_BLOCK = 6, GEMM8_TILES = 4;
static constexpr int64_t GEMV8_MOST = GEMV8_ROWS;
}  // namespace MXQ_TARGET
}  // namespace mxq

#include "linear.inl"
#include "attention.inl"
#include "layer.inl"
