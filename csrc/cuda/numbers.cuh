// Numbers of the three types, and what every kernel does at the end of a row.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace mxq::cuda {

// A number as a type.
template <int N>
struct Constant {
  static constexpr int value = N;
};

// Not by __ldg, which is for memory that nobody writes while the kernel runs: one that starts early has activations that are still being written.
__device__ __forceinline__ float number_at(const void* p, int64_t i, int type) {
  if (type == F32) return static_cast<const float*>(p)[i];
  const uint16_t u = static_cast<const uint16_t*>(p)[i];
  return type == BF16 ? ptx::bf16_to_float(u) : ptx::half_to_float(u);
}
__device__ __forceinline__ void store_number(void* p, int64_t i, int type, float v) {
  if (type == F32) static_cast<float*>(p)[i] = v;
  else static_cast<uint16_t*>(p)[i] = type == BF16 ? ptx::float_to_bf16(v) : ptx::float_to_half(v);
}

__device__ __forceinline__ int original_row(const PartView& part, unsigned row) {
  return part.row_map ? __ldg(part.row_map + row) : int(part.row0 + row);
}
__device__ __forceinline__ int find_part(const Params& p, unsigned cta) {
  int i = 0;
  while (i + 1 < p.parts && cta >= p.part[i + 1].first_cta) i++;
  return i;
}

// Adds the bias and stores output (m, stored row).
__device__ __forceinline__ void finish(const Params& p, const PartView& part, int m, unsigned row, float sum) {
  if (row >= part.rows) return;
  const int n = original_row(part, row);
  if (part.bias) sum += number_at(part.bias, n, part.bias_type);
  store_number(part.y, m * part.ldy + n, p.y_type, sum);
}

}  // namespace mxq::cuda
