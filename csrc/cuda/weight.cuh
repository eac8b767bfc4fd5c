// A blob read one weight at a time, by the formulas of formats.h in float32: what the kernels of plain.cu share. Slow, exact, for any format.
#pragma once

#include "numbers.cuh"

namespace mxq::cuda {

__device__ __forceinline__ const CudaHead& blob_head(const uint8_t* blob) { return *reinterpret_cast<const CudaHead*>(blob); }
template <class T>
__device__ __forceinline__ const T* blob_at(const uint8_t* blob, uint64_t offset) {
  return reinterpret_cast<const T*>(blob + offset);
}

// The levels of formats.h where a thread can pick one of them.
static __constant__ float nf4_levels[16] = {NF4_LEVELS[0], NF4_LEVELS[1], NF4_LEVELS[2],  NF4_LEVELS[3],  NF4_LEVELS[4],  NF4_LEVELS[5],  NF4_LEVELS[6],  NF4_LEVELS[7],
                                            NF4_LEVELS[8], NF4_LEVELS[9], NF4_LEVELS[10], NF4_LEVELS[11], NF4_LEVELS[12], NF4_LEVELS[13], NF4_LEVELS[14], NF4_LEVELS[15]};

// What the weights of one row and group share.
struct RowGroup {
  float scale, zero;
  const uint16_t* table;  // lut
};

__device__ __forceinline__ RowGroup row_group(const uint8_t* blob, const CudaPiece& p, uint64_t block, int r, unsigned col) {
  const Format f = p.format;
  RowGroup g = {};
  const uint16_t* scales = blob_at<uint16_t>(blob, p.scales + block * p.scale_step);
  if (f.kind == LUT) g.table = scales + (r << f.bits);
  if (f.kind != UNIFORM && f.kind != NF) return g;
  const unsigned place = (f.group ? col / f.group : 0) * TILE_ROWS + pair_place(r);
  const auto number = [&](const uint16_t* of) { return f.bf16 ? ptx::bf16_to_float(__ldg(of + place)) : ptx::half_to_float(__ldg(of + place)); };
  g.scale = number(scales);
  const uint8_t* zeros = blob + p.zeros + block * p.zero_step;
  g.zero = f.zero == FLOATZERO ? number(reinterpret_cast<const uint16_t*>(zeros)) : f.zero == INT ? float(__ldg(zeros + place)) : float(1 << (f.bits - 1));
  return g;
}

// A weight from its code. Products round by themselves (no fused multiply-add), so that every kernel gives the bits of the reference.
__device__ __forceinline__ float weight_of(Format f, const RowGroup& g, unsigned code) {
  if (f.kind == FLOAT) return ptx::half_to_float(uint16_t(code));
  if (f.kind == LUT) return ptx::half_to_float(__ldg(g.table + code));
  if (f.kind == NF) return __fmul_rn(g.scale, nf4_levels[code]);
  if (f.zero == FLOATZERO) return __fadd_rn(__fmul_rn(g.scale, float(code)), g.zero);
  return __fmul_rn(g.scale, float(code) - g.zero);
}

// Row r of row block `block`, column `col` of a piece.
__device__ __forceinline__ float weight_at(const uint8_t* blob, const CudaPiece& p, uint64_t block, int r, unsigned col) {
  const uint32_t* words = blob_at<uint32_t>(blob, p.codes + block * p.code_step);
  const unsigned code = read_code(words, p.format.bits, quad_order(p.format), p.tiles, r, col);
  return weight_of(p.format, row_group(blob, p, block, r, col), code);
}

// Stored row -> its band; `block` becomes the number of the row block inside the band, `r` the row in that.
__device__ __forceinline__ const CudaBand& band_of(const uint8_t* blob, unsigned row, uint64_t& block, int& r) {
  const CudaBand* band = blob_at<CudaBand>(blob, blob_head(blob).off_bands);
  while (band->r1 <= row) band++;
  block = (row - band->r0) / TILE_ROWS, r = int((row - band->r0) % TILE_ROWS);
  return *band;
}

}  // namespace mxq::cuda
