// mm: more rows of x than mv takes, fewer than dequantizing the weight would pay for. A block of 4 warps finishes 64 rows of W for 32 or 64 rows of x; each
// warp decodes only its own 16 rows, once for all of them. x is fp16 in stored column order, as it came or from the stage kernel (mm_stage.cu); it comes into
// shared memory by cp.async, 128 columns at a time, while the columns before are multiplied. Weights go from global memory to registers, a super-tile ahead.
#pragma once

#include "launch.h"
#include "shape.h"
#include "numbers.cuh"
#include "simt.hpp"
#include "tile.cuh"

namespace mxq::cuda {

// A place among the columns of a part: a tile of a piece, and its column in the staged x.
struct Place {
  unsigned piece;
  int tile;
  int64_t column;
  __device__ bool before(const Place& other) const { return piece < other.piece || (piece == other.piece && tile < other.tile); }
};

// Split `split` of all pieces begins there.
__device__ __forceinline__ Place begin_of(const Params& p, const PartView& part, unsigned split) {
  int all = 0;
  for (unsigned i = 0; i < part.pieces; i++) all += int(p.piece[part.first_piece + i].tiles + MM_SPLIT - 1) / MM_SPLIT;
  int left = int(int64_t(all) * split / unsigned(p.splits));
  Place at = {part.first_piece, 0, 0};
  for (; at.piece < part.first_piece + part.pieces; at.piece++) {
    const int tiles = int(p.piece[at.piece].tiles), count = (tiles + MM_SPLIT - 1) / MM_SPLIT;
    if (left < count) break;
    left -= count, at.column += int64_t(tiles) * TILE_COLS;
  }
  at.tile = left * MM_SPLIT, at.column += int64_t(at.tile) * TILE_COLS;
  return at;
}

// Half HALF of a tile, half `half` of its super-tile, whose words of that tile are w; `xs`: the lane's first number of x row 0, of that half.
template <class D, int NT, bool FZ, int HALF>
__device__ __forceinline__ void multiply_half(D& d, const Unit& u, const unsigned* w, const PieceView& p, int half, bool last, const uint16_t* xs,
                                              float (&part)[NT][4], float (&acc)[NT][4], int lane) {
  const int mask = int((1u << p.group_shift) - 1), group = half >> p.group_shift;
  if (D::zeroed && !FZ && p.zero == INT && (half & mask) == 0) {
    const unsigned z = pair_of(u.zero, group, lane);
    d.set_zero(half_pair(z & 0xff), half_pair(z >> 8));
  }
  float zero[2] = {};
  if (FZ) {
    const unsigned z = pair_of(u.zero, group, lane);
    zero[0] = scale_value(z & 0xffff, p.bf16), zero[1] = scale_value(z >> 16, p.bf16);
  }
  unsigned a[2][4];
  d.template step<2 * HALF>(w, a[0]), d.template step<2 * HALF + 1>(w, a[1]);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    unsigned b[4];
    load_shared_16(b, xs + 8 * n * MM_STRIDE);
    const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    float(&to)[4] = D::scaled ? part[n] : acc[n];
    ptx::mma_m16n8k16_f16(to, a[0], first, to);
    ptx::mma_m16n8k16_f16(to, a[1], second, to);
    if (FZ) {  // the sums of the inputs, in the places where the products are
      constexpr unsigned one = 0x3c003c00u;
      const unsigned ones[4] = {one, one, one, one};
      float sums[4] = {};
      ptx::mma_m16n8k16_f16(sums, ones, first, sums);
      ptx::mma_m16n8k16_f16(sums, ones, second, sums);
#pragma unroll
      for (int i = 0; i < 4; i++) acc[n][i] = fmaf(zero[i / 2], sums[i], acc[n][i]);
    }
  }
  if (!D::scaled || (((half + 1) & mask) != 0 && !last)) return;
  const unsigned s = pair_of(u.scale, group, lane);
  const float scale[2] = {scale_value(s & 0xffff, p.bf16), scale_value(s >> 16, p.bf16)};
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[n][i] = fmaf(scale[i / 2], part[n][i], acc[n][i]), part[n][i] = 0.0f;
}

// Tiles [tile, stop) of a piece. `next` gives the shared memory where the next MM_TILES tiles of x are; all warps call it, those without rows do nothing else.
// Sums of x rows that do not exist are 0.
template <class D, int NT, bool FZ, class Next>
__device__ __forceinline__ void multiply_piece(D& d, const PieceView& p, uint64_t block, bool active, int tile, int stop, Next&& next, float (&acc)[NT][4],
                                               int lane) {
  constexpr int most = D::tiles > MM_TILES ? D::tiles : MM_TILES;
  Unit unit = {}, ahead = {};
  if (active) begin_piece(d, p, block, lane), ahead = load_unit<D>(p, block, unsigned(tile / D::tiles), lane);
  float part[NT][4] = {};
#pragma unroll 1
  for (; tile < stop; tile += most) {
#pragma unroll
    for (int i = 0; i < most; i += MM_TILES) {
      if (tile + i >= stop) break;
      const uint16_t* xs = next() + lane / 4 * MM_STRIDE + lane % 4 * 8;
      if (!active) continue;
#pragma unroll
      for (int j = 0; j < MM_TILES; j++) {
        const int in_unit = (i + j) % D::tiles;  // a constant: `tile` begins at a super-tile
        if (tile + i + j >= stop) break;
        if (in_unit == 0) {
          unit = ahead;
          if (tile + i + j + D::tiles < stop) ahead = load_unit<D>(p, block, unsigned((tile + i + j) / D::tiles + 1), lane);
        }
        const bool last = in_unit == D::tiles - 1 || tile + i + j + 1 == stop;
        const unsigned* w = unit.w + in_unit * D::bits;
        multiply_half<D, NT, FZ, 0>(d, unit, w, p, 2 * in_unit, false, xs + j * TILE_COLS, part, acc, lane);
        multiply_half<D, NT, FZ, 1>(d, unit, w, p, 2 * in_unit + 1, last, xs + j * TILE_COLS + 32, part, acc, lane);
      }
    }
  }
}

// grid: (tiles of 8 * NT x rows, blocks of all parts, splits)
template <int NT, class... Ds>
__global__ void __launch_bounds__(MM_THREADS, 2) mm(const __grid_constant__ Params p) {
  MXQ_DYN_SMEM(uint16_t, smem);
  constexpr int rows_x = 8 * NT, chunks = MM_TILES * TILE_COLS / 8, rows_a_turn = MM_THREADS / chunks, buffer_size = rows_x * MM_STRIDE;
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP, m0 = int(blockIdx.x) * rows_x;
  const PartView& part = p.part[find_part(p, blockIdx.y)];
  const unsigned first_row = (blockIdx.y - part.first_cta) * unsigned(MM_ROWS_W), block = first_row / TILE_ROWS + unsigned(warp);
  const bool active = block * TILE_ROWS < part.rows;
  Place at = begin_of(p, part, blockIdx.z), ahead = at;
  const Place end = begin_of(p, part, blockIdx.z + 1);

  // Copies the next columns of x in the background; zeros for rows that do not exist.
  const int row = m0 + int(threadIdx.x) / chunks, k = int(threadIdx.x) % chunks * 8;
  const uint16_t* from = p.staged + row * p.ld_staged + k;
  uint16_t* to = smem + int(threadIdx.x) / chunks * MM_STRIDE + k;
  int buffer = 0;
  const auto fetch = [&] {
    if (ahead.before(end)) {
      const int tiles = min(MM_TILES, int(p.piece[ahead.piece].tiles) - ahead.tile);
      if (k < tiles * TILE_COLS) {
        const uint16_t* source = from + ahead.column;
#pragma unroll
        for (int i = 0; i < rows_x; i += rows_a_turn, source += rows_a_turn * p.ld_staged)
          ptx::cp_async_16(to + buffer * buffer_size + i * MM_STRIDE, source, row + i < p.m ? 16 : 0);
      }
      ahead.tile += tiles, ahead.column += tiles * TILE_COLS;
      if (ahead.tile == int(p.piece[ahead.piece].tiles)) ahead.piece++, ahead.tile = 0;
    }
    ptx::cp_async_commit();
    buffer ^= 1;
  };
  const auto next = [&]() -> const uint16_t* {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the columns are there for all, and all have read those before, whose place is filled now
    fetch();
    return smem + buffer * buffer_size;
  };

  float acc[NT][4] = {};
  fetch();
  for (; at.before(end); at.piece++, at.tile = 0) {
    const PieceView& piece = p.piece[at.piece];
    const int stop = at.piece == end.piece ? end.tile : int(piece.tiles);
    for_decoder<Ds...>(piece, [&](auto d) {
      using D = decltype(d);
      if constexpr (D::zeroed) {
        if (D::bits == 1 || piece.zero == FLOATZERO) return multiply_piece<D, NT, true>(d, piece, block, active, at.tile, stop, next, acc, lane);
      }
      if constexpr (D::bits > 1) multiply_piece<D, NT, false>(d, piece, block, active, at.tile, stop, next, acc, lane);
    });
  }
  __syncthreads();

  float* sums = reinterpret_cast<float*>(smem);  // [m][64 rows]
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) sums[(8 * n + 2 * t + e % 2) * MM_ROWS_W + warp * TILE_ROWS + g + e / 2 * 8] = acc[n][e];
  __syncthreads();
  const int64_t all = int64_t(p.ctas) * MM_ROWS_W;
  for (int i = int(threadIdx.x); i < min(rows_x, p.m - m0) * MM_ROWS_W; i += MM_THREADS) {
    const int m = m0 + i / MM_ROWS_W;
    const unsigned row = first_row + unsigned(i % MM_ROWS_W);
    float sum = sums[i] * (p.unscale ? __ldg(p.unscale + m) : 1.0f);
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

template <int NT, class... Ds>
int launch_mm(const Params& p, void* stream) {
  const dim3 grid(unsigned(ceil_div(p.m, 8 * NT)), unsigned(p.ctas), unsigned(p.splits));
  return MXQ_LAUNCH((mm<NT, Ds...>), grid, dim3(MM_THREADS), size_t(mm_smem(NT)), stream, p);
}

// Defines the launcher of one translation unit.
#define MXQ_MM(name, ...) \
  int name(const Params& p, void* stream) { return mm_tiles(p.m, false) == 4 ? launch_mm<4, __VA_ARGS__>(p, stream) : launch_mm<8, __VA_ARGS__>(p, stream); }

}  // namespace mxq::cuda
