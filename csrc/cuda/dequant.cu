// dequant: the weight itself, for products of torch with many rows of x and as an oracle. A warp decodes a super-tile as mv and mm do; a lane then has 8
// neighbouring columns of two rows, which are 16 bytes of a 16-bit type. Values are those of weight.cuh to the bit: the decoders give fp16 numbers without
// rounding, and the products and sums behind them are the same.
#include "launch.h"
#include "simt.hpp"
#include "tile.cuh"
#include "weight.cuh"

namespace mxq::cuda {
namespace {

constexpr int DEQUANT_WARPS = 4;

// Where the weights of a row block go. `row[i]`: where the lane's row g + 8 * i begins; null: nowhere.
struct Target {
  uint8_t* row[2];
  int type;
  const int32_t* perm_cols;  // or null
};

// Columns [first, first + 8) of a piece in one row; those behind its end are left out.
__device__ __forceinline__ void store_run(uint8_t* row, const Target& to, const PieceView& p, unsigned first, const float (&v)[8]) {
  const unsigned at = p.c0 + first;
  const bool wide = to.type == F32;
  uint8_t* place = row + size_t(at) * (wide ? 4 : 2);
  if (!to.perm_cols && first + 8 <= p.cols && reinterpret_cast<uintptr_t>(place) % 16 == 0) {
    uint4* run = reinterpret_cast<uint4*>(place);
    if (wide) {
      run[0] = make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
      run[1] = make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]), __float_as_uint(v[7]));
    } else if (to.type == F16) {
      *run = make_uint4(ptx::floats_to_half2(v[0], v[1]), ptx::floats_to_half2(v[2], v[3]), ptx::floats_to_half2(v[4], v[5]), ptx::floats_to_half2(v[6], v[7]));
    } else {
      *run = make_uint4(ptx::floats_to_bf162(v[0], v[1]), ptx::floats_to_bf162(v[2], v[3]), ptx::floats_to_bf162(v[4], v[5]), ptx::floats_to_bf162(v[6], v[7]));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (first + j < p.cols) store_number(row, to.perm_cols ? unsigned(__ldg(to.perm_cols + at + j)) : at + j, to.type, v[j]);
}

// Half tile HALF of the tile whose words are w: v[row g, g + 8][8 columns], before scales.
template <class D, int HALF>
__device__ __forceinline__ void decode_half(const D& d, const unsigned* w, float level, float (&v)[2][8]) {
  if constexpr (D::scaled && !D::zeroed) {  // nf4: the levels have more bits than fp16; a lane holds level lane % 16
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int j = 0; j < 8; j++) v[r][j] = __shfl_sync(~0u, level, int(w[2 * HALF + j / 4] >> (16 * r + 4 * (j % 4)) & 15));
  } else {
    unsigned a[2][4];
    d.template step<2 * HALF>(w, a[0]), d.template step<2 * HALF + 1>(w, a[1]);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 two = ptx::half2_to_floats(a[i / 2][r + i % 2 * 2]);
        v[r][2 * i] = two.x, v[r][2 * i + 1] = two.y;
      }
  }
}

// Super-tile `index` of a row block. Tile by tile in a loop that is not unrolled: its code is long, for the stores of every type and order.
template <class D>
__device__ __forceinline__ void dequant_unit(const PieceView& p, uint64_t block, unsigned index, const Target& to, int lane) {
  Unit u = load_unit<D>(p, block, index, lane);
  D d;
  begin_piece(d, p, block, lane);
  const float level = D::scaled && !D::zeroed ? nf4_levels[lane % 16] : 0.0f;
  const int tiles = min(D::tiles, int(p.tiles - index * D::tiles)), mask = int((1u << p.group_shift) - 1);
  float scale[2] = {}, zero[2] = {};
#pragma unroll 1
  for (int tile = 0; tile < tiles; tile++) {
    const auto go = [&](auto h) {
      constexpr int half = decltype(h)::value;
      const int first = 2 * tile + half;
      if (D::scaled && (first & mask) == 0) {
        const int group = first >> p.group_shift;
        const unsigned s = pair_of(u.scale, group, lane);
        scale[0] = scale_value(s & 0xffff, p.bf16), scale[1] = scale_value(s >> 16, p.bf16);
        if (D::zeroed && p.zero != SYM) {
          const unsigned z = pair_of(u.zero, group, lane);
          if (p.zero == INT) d.set_zero(half_pair(z & 0xff), half_pair(z >> 8));
          else zero[0] = scale_value(z & 0xffff, p.bf16), zero[1] = scale_value(z >> 16, p.bf16);
        }
      }
      float v[2][8];
      decode_half<D, half>(d, u.w, level, v);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if (D::scaled) {  // products round by themselves (no fused multiply-add), as in weight.cuh
#pragma unroll
          for (int j = 0; j < 8; j++) v[r][j] = __fmul_rn(scale[r], v[r][j]);
          if (D::zeroed && p.zero == FLOATZERO)
#pragma unroll
            for (int j = 0; j < 8; j++) v[r][j] = __fadd_rn(v[r][j], zero[r]);
        }
        if (to.row[r]) store_run(to.row[r], to, p, (index * D::tiles + unsigned(tile)) * TILE_COLS + 32 * half + lane % 4 * 8, v[r]);
      }
    };
    go(Constant<0>()), go(Constant<1>());
#pragma unroll
    for (int i = 0; i + D::bits < D::bits * D::tiles; i++) u.w[i] = u.w[i + D::bits];
  }
}

// grid: `shares` blocks for each row block of all bands from `first_block` on, with a warp for each super-tile. out[rows.count, K].
__global__ void __launch_bounds__(DEQUANT_WARPS* WARP, 5) dequant(const uint8_t* blob, void* out, int type, unsigned first_block, unsigned shares,
                                                                  WeightRows of) {
  const CudaHead& h = blob_head(blob);
  const CudaBand* band = blob_at<CudaBand>(blob, h.off_bands);
  const int lane = int(threadIdx.x) % WARP;
  unsigned block = first_block + blockIdx.x / shares, blocks;
  while (block >= (blocks = (band->r1 - band->r0 + TILE_ROWS - 1) / TILE_ROWS)) block -= blocks, band++;
  Target to{{}, type, h.off_perm_cols && !of.stored_cols ? blob_at<int32_t>(blob, h.off_perm_cols) : nullptr};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const unsigned stored = band->r0 + block * TILE_ROWS + unsigned(lane / 4 + 8 * i);
    const bool wanted = stored < band->r1 && stored - unsigned(of.begin) < unsigned(of.count);
    const bool mapped = wanted && of.original && h.off_perm_rows;
    const int row = mapped ? __ldg(blob_at<int32_t>(blob, h.off_perm_rows) + stored) : int(stored) - of.begin;
    if (wanted) to.row[i] = static_cast<uint8_t*>(out) + row * int64_t(h.k) * (type == F32 ? 4 : 2);
  }
  unsigned index = blockIdx.x % shares * DEQUANT_WARPS + threadIdx.x / WARP;  // of the row block's super-tiles, then of those of a piece
  const CudaPiece* piece = blob_at<CudaPiece>(blob, h.off_pieces) + band->first_piece;
  for (unsigned i = 0; i < band->pieces; i++, piece++) {
    const unsigned per = unsigned(super_tiles(piece->format.bits)), units = (piece->tiles + per - 1) / per;
    if (index < units) break;
    if (i + 1 == band->pieces) return;
    index -= units;
  }
  const PieceView p = view_of(*piece, blob);
  for_decoder<Uniform<1>, Uniform<2>, Uniform<3>, Uniform<4>, Uniform<5>, Uniform<6>, Uniform<8>, Table<2, false>, Table<3, false>, Table<4, false>,
              Table<4, true>, Half>(p, [&](auto d) { dequant_unit<decltype(d)>(p, block, index, to, lane); });
}

}  // namespace

int launch_dequant(const CudaHead& head, int64_t first_block, int64_t blocks, int64_t units, const WeightRows& of, const uint8_t* blob, void* out, int type,
                   void* stream) {
  const unsigned shares = unsigned(ceil_div(units, DEQUANT_WARPS)), grid = unsigned(blocks) * shares;
  const int error = MXQ_LAUNCH(dequant, dim3(grid), dim3(DEQUANT_WARPS * WARP), 0, stream, blob, out, type, unsigned(first_block), shares, of);
  if (error) return error;
  return head.nnz ? launch_add_values(head, of, blob, out, type, stream) : 0;
}

}  // namespace mxq::cuda
