// AVX-512 F, BW, DQ, VL (Skylake-X 2017, Zen 4 and later). 32 registers of 16 lanes.
#define MXQ_AVX512 1
#define MXQ_TARGET avx512
#define MXQ_TARGET_TABLE target_avx512
#define MXQ_TARGET_NAME "avx512"

#include <immintrin.h>

#include "linear.h"
#include "simd.h"

namespace mxq::avx512 {
// gemm: 12 rows of x by two vectors of weights are 24 accumulators, two weights and one input beside them.
static constexpr int GEMV_BLOCK = 8, GEMM_BLOCK = 12, GEMM_TILES = 2;
static constexpr int GEMV_CHAINS_1 = 4, GEMV_CHAINS_2 = 4, GEMV_CHAINS_END = 8;
}  // namespace mxq::avx512

#include "linear.inl"
