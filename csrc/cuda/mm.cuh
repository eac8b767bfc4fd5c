// mm: more rows of x than mv takes, fewer than dequantizing the weight would pay for. A block of 4 warps finishes 64 rows of W for 32 rows of x; each warp
// decodes only its own 16 rows, once for all 32. x was brought into fp16 in stored column order by the stage kernel (mm_stage.cu); it comes into shared
// memory by cp.async, 256 columns at a time, while the columns before are multiplied. Weights go from global memory to registers, as in mv.
#pragma once

#include "launch.h"
#include "shape.h"
#include "numbers.cuh"
#include "simt.hpp"
#include "tile.cuh"

namespace mxq::cuda {

// Rows [m0, m0 + MM_TILE_M) of the staged x, `cols` columns from `c`, as copies in the background; zeros for rows that do not exist.
__device__ __forceinline__ void copy_stage(const Params& p, int m0, int64_t c, int cols, uint16_t* xs) {
  for (int i = int(threadIdx.x); i < MM_TILE_M * (cols / 8); i += MM_THREADS) {
    const int m = i / (cols / 8), k = i % (cols / 8) * 8;
    const bool there = m0 + m < p.m;
    ptx::cp_async_16(xs + m * MM_STRIDE + k, p.staged + (there ? (m0 + m) * p.ld_staged + c + k : 0), there ? 16 : 0);
  }
}

// The super-tiles of one stage: tiles [first, first + tiles) of the piece.
template <class D>
__device__ __forceinline__ void multiply_stage(D& d, const PieceView& piece, uint64_t block, int first, int tiles, const uint16_t* xs, float (&acc)[MM_TILE_M / 8][4], int lane) {
  for (int i = 0; i < tiles; i += D::tiles) {
    const Unit unit = load_unit<D>(piece, block, unsigned((first + i) / D::tiles), lane);
    multiply<D, MM_TILE_M / 8>(d, unit, piece, min(D::tiles, tiles - i), xs + i * TILE_COLS, MM_STRIDE, MM_TILE_M, acc, lane);
  }
}

// grid: (tiles of x rows, blocks of all parts, splits)
template <class... Ds>
__global__ void __launch_bounds__(MM_THREADS, 2) mm(const __grid_constant__ Params p) {
  MXQ_DYN_SMEM(uint16_t, smem);
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP, m0 = int(blockIdx.x) * MM_TILE_M;
  const PartView& part = p.part[find_part(p, blockIdx.y)];
  const unsigned first_row = (blockIdx.y - part.first_cta) * unsigned(MM_ROWS_W), block = first_row / TILE_ROWS + unsigned(warp);
  const bool active = block * TILE_ROWS < part.rows;

  // This block's stages: a contiguous share of those of all pieces.
  int stages = 0;
  for (unsigned i = 0; i < part.pieces; i++) stages += int(p.piece[part.first_piece + i].tiles + MM_TILES - 1) / MM_TILES;
  const int begin = int(int64_t(stages) * blockIdx.z / unsigned(p.splits)), end = int(int64_t(stages) * (blockIdx.z + 1) / unsigned(p.splits));

  // Stage `s` -> piece, its first tile, and the column of the staged x where it begins.
  const auto locate = [&](int s, unsigned& piece, int& tile, int64_t& column) {
    piece = part.first_piece, column = 0;
    for (;; piece++) {
      const int count = int(p.piece[piece].tiles + MM_TILES - 1) / MM_TILES;
      if (s < count) break;
      s -= count, column += int64_t(p.piece[piece].tiles) * TILE_COLS;
    }
    tile = s * MM_TILES, column += int64_t(tile) * TILE_COLS;
  };
  const auto fetch = [&](int s) {
    unsigned piece;
    int tile;
    int64_t column;
    locate(s, piece, tile, column);
    copy_stage(p, m0, column, min(MM_TILES, int(p.piece[piece].tiles) - tile) * TILE_COLS, smem + s % 2 * (MM_TILE_M * MM_STRIDE));
  };

  float acc[MM_TILE_M / 8][4] = {};
  if (begin < end) fetch(begin);
  ptx::cp_async_commit();
  for (int s = begin; s < end; s++) {
    if (s + 1 < end) fetch(s + 1);  // into the buffer that was read before the barrier at the end of the last round
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    unsigned i;
    int tile;
    int64_t column;
    locate(s, i, tile, column);
    const PieceView& piece = p.piece[i];
    if (active)
      for_decoder<Ds...>(piece, [&](auto d) {
        begin_piece(d, piece, block, lane);
        multiply_stage(d, piece, block, tile, min(MM_TILES, int(piece.tiles) - tile), smem + s % 2 * (MM_TILE_M * MM_STRIDE), acc, lane);
      });
    __syncthreads();
  }

  float* sums = reinterpret_cast<float*>(smem);  // [m][64 rows]
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < MM_TILE_M / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) sums[(8 * n + 2 * t + e % 2) * MM_ROWS_W + warp * TILE_ROWS + g + e / 2 * 8] = acc[n][e];
  __syncthreads();
  const int64_t all = int64_t(p.ctas) * MM_ROWS_W;
  for (int i = int(threadIdx.x); i < min(MM_TILE_M, p.m - m0) * MM_ROWS_W; i += MM_THREADS) {
    const int m = m0 + i / MM_ROWS_W;
    const unsigned row = first_row + unsigned(i % MM_ROWS_W);
    float sum = sums[i] * __ldg(p.unscale + m);
    if (part.rowptr && blockIdx.z == 0 && row < part.rows) {
      const int n = original_row(part, row), last = __ldg(part.rowptr + n + 1);
      float extra = 0.0f;
      for (int e = __ldg(part.rowptr + n); e < last; e++)
        extra = fmaf(ptx::half_to_float(__ldg(part.values + e)), number_at(p.x, m * p.ldx + __ldg(part.cols + e), p.x_type), extra);
      sum += extra;
    }
    if (p.splits == 1) finish(p, part, m, row, sum);
    else p.partial[(int64_t(blockIdx.z) * p.m + m) * all + int64_t(blockIdx.y) * MM_ROWS_W + i % MM_ROWS_W] = sum;
  }
}

// Defines the launcher of one translation unit.
#define MXQ_MM(name, ...)                                                                                                     \
  int name(const Params& p, void* stream) {                                                                                   \
    const dim3 grid(unsigned((p.m + MM_TILE_M - 1) / MM_TILE_M), unsigned(p.ctas), unsigned(p.splits)), block(MM_THREADS);    \
    return MXQ_LAUNCH((mm<__VA_ARGS__>), grid, block, size_t(MM_SMEM), stream, p);                                            \
  }

}  // namespace mxq::cuda
