// mv: few rows of x (M <= 16). Weights are operand A of the tensor cores, x is operand B: 8 rows of x cost what one costs.
//
// A block of 8 warps finishes 8 / warps_k row blocks; `warps_k` warps share the columns of one. x is staged into shared memory, a chunk of columns at a
// time; weights go from global memory straight to registers, one super-tile ahead. Sums are float32 in an order that the launch fixes: a warp's own
// super-tiles, then the warps, then the splits (reduce.cu).
#pragma once

#include "launch.h"
#include "shape.h"
#include "simt.hpp"
#include "stage.cuh"
#include "tile.cuh"

namespace mxq::cuda {

// Columns [c, c + count) of the piece for all rows of x, zeros behind its last column. `count` is a multiple of 64.
__device__ __forceinline__ void stage_chunk(const Params& p, const PartView& part, const PieceView& piece, int c, int count, int stride, const float* factor, uint16_t* xs) {
  const bool bf16 = p.x_type == BF16;
  const int filled = min(int(piece.cols) - c, count);
  const int32_t* perm = part.perm_cols ? part.perm_cols + piece.c0 + c : nullptr;
  const uint16_t* x = static_cast<const uint16_t*>(p.x);
  const uint16_t* from = x + piece.c0 + c;
  const bool vectors = !perm && (reinterpret_cast<uintptr_t>(from) | uintptr_t(p.ldx * 2)) % 16 == 0;
  for (int i = int(threadIdx.x); i < p.m * (count / 8); i += MV_THREADS) {
    const int m = i / (count / 8), k = i % (count / 8) * 8;
    unsigned v[4] = {};
    if (vectors && k + 8 <= filled) {
      load_16(v, from + m * p.ldx + k);
    } else {
      for (int j = 0; j < 8 && k + j < filled; j++) v[j / 2] |= unsigned(__ldg(perm ? x + m * p.ldx + __ldg(perm + k + j) : from + m * p.ldx + k + j)) << 16 * (j % 2);
    }
    if (bf16)
      for (int j = 0; j < 4; j++) v[j] = bf16_to_staged(v[j], factor[m]);
    *reinterpret_cast<uint4*>(xs + m * stride + k) = make_uint4(v[0], v[1], v[2], v[3]);
  }
}

// The sparse part of the block's rows: 16 threads a row, each every 16th value; summed in a fixed order. extra[m][row].
__device__ __forceinline__ void add_sparse(const Params& p, const PartView& part, unsigned first_row, int rows, float* extra) {
  const int lane16 = int(threadIdx.x) % 16;
  for (int r = int(threadIdx.x) / 16; r < rows; r += MV_THREADS / 16) {
    const unsigned row = first_row + unsigned(r);
    int begin = 0, end = 0;
    if (row < part.rows && part.rowptr) {
      const int original = original_row(part, row);
      begin = __ldg(part.rowptr + original), end = __ldg(part.rowptr + original + 1);
    }
    for (int m = 0; m < p.m; m++) {
      float sum = 0.0f;
      for (int e = begin + lane16; e < end; e += 16)
        sum = fmaf(ptx::half_to_float(__ldg(part.values + e)), number_at(p.x, m * p.ldx + __ldg(part.cols + e), p.x_type), sum);
#pragma unroll
      for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane16 == 0) extra[m * rows + r] = sum;
    }
  }
}

template <class D, int NT>
__device__ __forceinline__ void multiply_chunk(const PieceView& piece, uint64_t block, int c, int count, int first, int step, const uint16_t* xs, int stride, int m,
                                               float (&acc)[NT][4], int lane) {
  constexpr int cols = D::tiles * TILE_COLS;
  const unsigned begin = unsigned(c / cols), end = unsigned((c + count + cols - 1) / cols);
  D d;
  begin_piece(d, piece, block, lane);
  unsigned i = begin + unsigned(first);
  if (i >= end) return;
  Unit unit = load_unit<D>(piece, block, i, lane);
  while (true) {
    const unsigned next = i + unsigned(step);
    Unit ahead = {};
    if (next < end) ahead = load_unit<D>(piece, block, next, lane);
    const int tiles = min(D::tiles, int(piece.tiles - i * D::tiles));
    multiply<D, NT>(d, unit, piece, tiles, xs + (i - begin) * cols, stride, m, acc, lane);
    if (next >= end) return;
    unit = ahead, i = next;
  }
}

// Kernel for the formats of the decoders Ds. grid: (blocks of all parts, splits). 2 blocks to an SM, where the kernel with all decoders would spill.
template <int NT, class... Ds>
__global__ void __launch_bounds__(MV_THREADS, sizeof...(Ds) > 1 ? 1 : 2) mv(const __grid_constant__ Params p) {
  MXQ_DYN_SMEM(float, smem);
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP, blocks = MV_WARPS / p.warps_k, rows = blocks * TILE_ROWS;
  const int part_index = find_part(p, blockIdx.x);
  const PartView& part = p.part[part_index];
  const unsigned first_row = (blockIdx.x - part.first_cta) * unsigned(rows);
  const unsigned block = first_row / TILE_ROWS + unsigned(warp / p.warps_k);
  float *sums = smem, *factor = smem + MV_WARPS * TILE_ROWS * 8 * NT, *extra = factor + 32;
  uint16_t* xs = reinterpret_cast<uint16_t*>(smem + (mv_floats(NT, p.warps_k, p.m, p.sparse) + 3) / 4 * 4);
  const int stride = p.chunk + STAGE_PAD;

  for (int m = warp; m < p.m; m += MV_WARPS) {
    const float f = p.x_type == BF16 ? row_factor(largest_of_row(static_cast<const uint16_t*>(p.x) + m * p.ldx, p.k, lane, WARP)) : 1.0f;
    if (lane == 0) factor[m] = f;
  }

  float acc[NT][4] = {};
  int turn = 0;
  for (unsigned i = 0; i < part.pieces; i++) {
    const PieceView& piece = p.piece[part.first_piece + i];
    for (int c = 0; c < int(piece.cols); c += p.chunk) {
      if (turn++ % p.splits != int(blockIdx.y)) continue;
      const int count = min(p.chunk, int(piece.tiles) * TILE_COLS - c);
      __syncthreads();  // the chunk before has been read, the factors are written
      stage_chunk(p, part, piece, c, count, stride, factor, xs);
      __syncthreads();
      if (block * TILE_ROWS < part.rows)
        for_decoder<Ds...>(piece, [&](auto d) {
          multiply_chunk<decltype(d), NT>(piece, block, c, count, warp % p.warps_k, p.warps_k, xs, stride, p.m, acc, lane);
        });
    }
  }

  const int g = lane / 4, t = lane % 4;
  float* mine = sums + warp * (TILE_ROWS * 8 * NT);  // [m][16 rows]
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) mine[(8 * n + 2 * t + e % 2) * TILE_ROWS + g + e / 2 * 8] = acc[n][e];
  if (p.sparse && blockIdx.y == 0) add_sparse(p, part, first_row, rows, extra);
  __syncthreads();
  for (int i = int(threadIdx.x); i < p.m * rows; i += MV_THREADS) {
    const int m = i / rows, r = i % rows;
    float sum = 0.0f;
    for (int w = 0; w < p.warps_k; w++) sum += sums[(r / TILE_ROWS * p.warps_k + w) * (TILE_ROWS * 8 * NT) + m * TILE_ROWS + r % TILE_ROWS];
    sum *= row_unfactor(factor[m]);
    if (p.sparse && blockIdx.y == 0) sum += extra[i];
    if (p.splits == 1) finish(p, part, m, first_row + unsigned(r), sum);
    else p.partial[(int64_t(blockIdx.y) * p.m + m) * p.ctas * rows + int64_t(blockIdx.x) * rows + r] = sum;
  }
}

// Defines the launcher of one translation unit.
#define MXQ_MV(name, ...)                                                                                     \
  int name(const Params& p, int tiles, unsigned ctas, int smem, void* stream) {                               \
    const dim3 grid(ctas, unsigned(p.splits)), block(MV_THREADS);                                             \
    return tiles == 1 ? MXQ_LAUNCH((mv<1, __VA_ARGS__>), grid, block, size_t(smem), stream, p)                \
                      : MXQ_LAUNCH((mv<2, __VA_ARGS__>), grid, block, size_t(smem), stream, p);               \
  }

}  // namespace mxq::cuda
