// The inputs of an mm launch: fp16, columns in stored order, each piece padded to whole tiles with zeros. Not launched where x is that already.
#include "launch.h"
#include "simt.hpp"
#include "stage.cuh"

namespace mxq::cuda {
namespace {

// grid: rows of x
__global__ void __launch_bounds__(256) stage(const __grid_constant__ Params p, uint16_t* staged, float* unscale) {
  MXQ_SHARED(float, most, 8);
  const int m = int(blockIdx.x);
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + m * p.ldx;
  const bool bf16 = p.x_type == BF16;
  float factor = 1.0f;
  if (bf16) {
    const float mine = largest_of_row(x, p.k, int(threadIdx.x), 256);
    if (threadIdx.x % WARP == 0) most[threadIdx.x / WARP] = mine;
    __syncthreads();
    float all = 0.0f;
    for (int i = 0; i < 8; i++) all = most[i] > all ? most[i] : all;
    factor = row_factor(all);
  }
  if (threadIdx.x == 0) unscale[m] = row_unfactor(factor);
  const PartView& part = p.part[0];
  uint16_t* to = staged + m * p.ld_staged;
  for (unsigned i = 0; i < part.pieces; i++) {
    const PieceView& piece = p.piece[part.first_piece + i];
    for (unsigned k = 2 * threadIdx.x; k < piece.tiles * TILE_COLS; k += 512) {
      unsigned pair = 0;
      for (unsigned e = 0; e < 2 && k + e < piece.cols; e++) {
        const unsigned col = piece.c0 + k + e;
        pair |= unsigned(__ldg(x + (part.perm_cols ? unsigned(__ldg(part.perm_cols + col)) : col))) << 16 * e;
      }
      *reinterpret_cast<unsigned*>(to + k) = bf16 ? bf16_to_staged(pair, factor) : pair;
    }
    to += piece.tiles * TILE_COLS;
  }
}

}  // namespace

int launch_stage(const Params& p, uint16_t* staged, float* unscale, void* stream) {
  return MXQ_LAUNCH(stage, dim3(unsigned(p.m)), dim3(256), 0, stream, p, staged, unscale);
}

}  // namespace mxq::cuda
