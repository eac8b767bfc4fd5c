// The inputs as the tensor cores take them: fp16, in the order of the weight's stored columns.
//
// bfloat16 inputs become fp16 by a power of two per row of x, so that the largest magnitude lies in [2^14, 2^15). That is exact for whatever is larger
// than 2^-31 of the largest (bfloat16 has 8 bits, fp16 reaches down to 2^-24), and below that the error is less than 2^-39 of the largest. So one kind of
// kernel, with exact fp16 weights, serves both types.
#pragma once

#include "numbers.cuh"

namespace mxq::cuda {

// The factor for a row whose largest magnitude is `largest`, a power of two; 1 for a row of zeros.
__device__ __forceinline__ float row_factor(float largest) {
  if (largest == 0.0f) return 1.0f;
  const int exponent = int(__float_as_uint(largest) >> 23) - 127, up = 14 - exponent;
  return __uint_as_float(unsigned((up > 126 ? 126 : up) + 127) << 23);
}
// 1 / row_factor, exactly.
__device__ __forceinline__ float row_unfactor(float factor) { return __uint_as_float((254u << 23) - __float_as_uint(factor)); }

// Largest magnitude among every `step`-th number of a row of x [k] of bfloat16, over the 32 lanes of a warp; NaN does not count.
__device__ __forceinline__ float largest_of_row(const uint16_t* x, int64_t k, int first, int step) {
  float most = 0.0f;
  for (int64_t i = first; i < k; i += step) {
    const float v = ptx::bf16_to_float(__ldg(x + i));
    const float a = v < 0 ? -v : v;
    most = a > most ? a : most;
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    const float other = __shfl_xor_sync(~0u, most, d);
    most = other > most ? other : most;
  }
  return most;
}

// Two bfloat16 as staged halves.
__device__ __forceinline__ unsigned bf16_to_staged(unsigned pair, float factor) {
  const float2 v = ptx::bf162_to_floats(pair);
  return ptx::floats_to_half2(v.x * factor, v.y * factor);
}

}  // namespace mxq::cuda
