// Sizes of the blocks of mv and mm, which launch.cpp needs without the kernels.
#pragma once

#include "../cuda_layout.h"

namespace mxq::cuda {

constexpr int MV_WARPS = 8, MV_THREADS = MV_WARPS * WARP;
constexpr int STAGE_PAD = 32;  // halves behind each staged row: rows begin 16 banks apart, so that 8 lanes (2 rows) read without conflict

// Shared memory of an mv block, in the order: sums of all warps, factors of the rows of x, sums of the sparse part, staged x.
static constexpr int mv_floats(int nt, int warps_k, int m, bool sparse) {  // before the staged rows
  return MV_WARPS * TILE_ROWS * 8 * nt + 32 + (sparse ? MV_WARPS / warps_k * TILE_ROWS * m : 0);
}
static constexpr int mv_smem(int nt, int warps_k, int m, int chunk, bool sparse) {
  return (mv_floats(nt, warps_k, m, sparse) * 4 + 15) / 16 * 16 + m * (chunk + STAGE_PAD) * 2;
}

// An mm block: MM_ROWS_W rows of W by MM_TILE_M rows of x, MM_TILES tiles of columns in each of two buffers.
constexpr int MM_WARPS = 4, MM_THREADS = MM_WARPS * WARP, MM_ROWS_W = MM_WARPS * TILE_ROWS, MM_TILE_M = 32, MM_TILES = 4;
constexpr int MM_STRIDE = MM_TILES * TILE_COLS + STAGE_PAD, MM_SMEM = 2 * MM_TILE_M * MM_STRIDE * 2;
static_assert(MM_SMEM <= 48 * 1024 && MM_SMEM >= MM_TILE_M * MM_ROWS_W * 4, "fits every device, and the sums fit where x was");

}  // namespace mxq::cuda
