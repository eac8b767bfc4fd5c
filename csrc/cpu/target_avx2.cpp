// AVX2, FMA and F16C (Haswell 2013, Zen 2017 and later). 16 registers of 8 lanes: a vector here is a pair.
#define MXQ_AVX2 1
#define MXQ_TARGET avx2
#define MXQ_TARGET_TABLE target_avx2
#define MXQ_TARGET_NAME "avx2"

#include <immintrin.h>

#include "linear.h"
#include "simd.h"

namespace mxq::avx2 {
// gemm: 6 rows of x by one pair are 12 accumulators, and one pair of weights and one input beside them.
static constexpr int GEMV_BLOCK = 4, GEMM_BLOCK = 6, GEMM_TILES = 1;
static constexpr int GEMV_CHAINS_1 = 4, GEMV_CHAINS_2 = 2, GEMV_CHAINS_END = 3;
static constexpr int GEMV8_BLOCK = 4, GEMM8_BLOCK = 4, GEMM8_TILES = 1;
}  // namespace mxq::avx2

#include "linear.inl"
#include "attention.inl"
#include "layer.inl"
