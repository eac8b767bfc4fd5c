// mv: few rows of x (M <= 16). Weights are operand A of the tensor cores, x is operand B: 8 rows of x cost what one costs.
//
// As many blocks as there are SMs share the row blocks of all weights evenly, by bytes, and the `splits` share their columns. A block brings its columns of
// x into shared memory once. The super-tiles of all its row blocks are one list, of which warp w takes numbers w, w + warps, ...: no warp waits for another,
// and the ring of each (ring.cuh) runs on from row block to row block. Sums are float32 and end up in shared memory, where each warp has its own for each row
// block of a batch; behind a barrier they are added in the order of the warps, and by reduce.cu in the order of the splits. So the configuration fixes the
// order of all sums.
#pragma once

#include "launch.h"
#include "ring.cuh"
#include "shape.h"
#include "simt.hpp"
#include "stage.cuh"

namespace mxq::cuda {

__device__ __forceinline__ int threads_of(const Params& p) { return p.warps * WARP; }

// The super-tiles of each row block that a split multiplies.
struct Share {
  int first, count;
};
__device__ __forceinline__ Share share_of(const PieceView& piece, int splits, int split) {
  if (splits == 1) return {0, int(piece.units)};
  const unsigned first = piece.units * unsigned(split) / unsigned(splits), end = piece.units * unsigned(split + 1) / unsigned(splits);
  return {int(first), int(end - first)};
}

// The row block with which block `index` of those that share them begins.
__device__ __forceinline__ int first_row_block(const Params& p, unsigned index) {
  if (p.cost == 0) return int(index * p.each + min(index, p.more));  // all row blocks cost the same
  uint64_t target = p.cost * index / unsigned(p.blocks);
  int blocks = 0;
  for (int i = 0; i < p.parts; i++) {
    const PartView& part = p.part[i];
    const unsigned count = (part.rows + TILE_ROWS - 1) / TILE_ROWS;
    const uint64_t all = uint64_t(count) * part.cost;
    if (target <= all) return blocks + int((target + part.cost - 1) / part.cost);
    target -= all, blocks += int(count);
  }
  return blocks;
}

// Columns of x of a piece, `count` of them from `c` on, on their way to xs[m][stride], zeros behind the piece's last column; bfloat16 as they are.
__device__ __forceinline__ void stage_piece(const Params& p, const PartView& part, const PieceView& piece, int c, int count, int stride, uint16_t* xs) {
  const int filled = min(int(piece.cols) - c, count);
  const int32_t* perm = part.perm_cols ? part.perm_cols + piece.c0 + c : nullptr;
  const uint16_t* x = static_cast<const uint16_t*>(p.x);
  const uint16_t* from = x + piece.c0 + c;
  const bool vectors = !perm && (reinterpret_cast<uintptr_t>(from) | uintptr_t(p.ldx * 2)) % 16 == 0;
  for (int k = int(threadIdx.x) * 8; k < count; k += threads_of(p) * 8) {
    if (vectors && (k + 8 <= filled || k >= filled)) {
#pragma unroll 4
      for (int m = 0; m < p.m; m++) ptx::cp_async_16(xs + m * stride + k, k < filled ? from + m * p.ldx + k : x, k < filled ? 16 : 0);
      continue;
    }
#pragma unroll 1
    for (int m = 0; m < p.m; m++) {
      unsigned v[4] = {};
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (k + j < filled) v[j / 2] |= unsigned(perm ? x[m * p.ldx + __ldg(perm + k + j)] : from[m * p.ldx + k + j]) << 16 * (j % 2);
      *reinterpret_cast<uint4*>(xs + m * stride + k) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }
}

// bfloat16 in xs [m][columns] -> staged halves in place, by factors that are those of these columns alone. Called by all threads behind a barrier.
__device__ __forceinline__ void convert_staged(const Params& p, int columns, int stride, uint16_t* xs, float* largest, float* factor, int warp, int lane) {
  for (int m = 0; m < p.m; m++) {
    float most = 0.0f;  // NaN does not count
    for (int k = int(threadIdx.x) * 8; k < columns; k += threads_of(p) * 8) {
      unsigned v[4];
      load_shared_16(v, xs + m * stride + k);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float a = __uint_as_float((j % 2 ? v[j / 2] : v[j / 2] << 16) & 0x7fff0000u);
        most = a > most ? a : most;
      }
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      const float other = __shfl_xor_sync(~0u, most, d);
      most = other > most ? other : most;
    }
    if (lane == 0) largest[warp * 16 + m] = most;
  }
  __syncthreads();
  if (int(threadIdx.x) < p.m) {
    float most = 0.0f;
    for (int w = 0; w < p.warps; w++) most = largest[w * 16 + threadIdx.x] > most ? largest[w * 16 + threadIdx.x] : most;
    factor[threadIdx.x] = row_factor(most);
  }
  __syncthreads();
  for (int m = 0; m < p.m; m++)
    for (int k = int(threadIdx.x) * 8; k < columns; k += threads_of(p) * 8) {
      unsigned v[4];
      load_shared_16(v, xs + m * stride + k);
      for (int j = 0; j < 4; j++) v[j] = bf16_to_staged(v[j], factor[m]);
      *reinterpret_cast<uint4*>(xs + m * stride + k) = make_uint4(v[0], v[1], v[2], v[3]);
    }
}

// Sums of x over half tiles, running on within each 256 columns of a piece, for its `columns` in xs: to[column / 32][8 * tiles]. A warp takes 256 columns of
// a row at a time, a lane 8 of them. Called by all threads.
__device__ __forceinline__ void sum_staged(const Params& p, int columns, int stride, const uint16_t* xs, int tiles, float* to, int warp, int lane) {
  if (columns == 0) return;  // more splits than super-tiles
  const int blocks = (columns + 255) / 256;
  int m = p.m == 1 ? 0 : warp / blocks, block = warp - m * blocks;
  for (; m < p.m && block < blocks;) {
    const int column = block * 256 + lane * 8;
    float sum = 0.0f;
    if (column < columns) {
      unsigned v[4];
      load_shared_16(v, xs + m * stride + column);
      float two[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 pair = ptx::half2_to_floats(v[j]);
        two[j] = pair.x + pair.y;
      }
      sum = (two[0] + two[1]) + (two[2] + two[3]);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
#pragma unroll
    for (int d = 4; d < WARP; d *= 2) {
      const float left = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += left;
    }
    if (lane % 4 == 0 && column < columns) to[column / 32 * 8 * tiles + m] = sum;
    block += p.warps;
    while (p.m > 1 && block >= blocks) block -= blocks, m++;
  }
}

// The sparse part of some rows: 16 threads a row, each every 16th value; summed in a fixed order. extra[m][row].
__device__ __forceinline__ void add_sparse(const Params& p, const PartView& part, unsigned first_row, int rows, float* extra) {
  const int lane16 = int(threadIdx.x) % 16;
  for (int r = int(threadIdx.x) / 16; r < rows; r += threads_of(p) / 16) {
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

// A warp's way through the super-tiles of a piece: of the row blocks before `last`, `count` each, and where the copies ahead of it are.
struct Cursor {
  int block, i, ahead_block, ahead_i, last, first, count;
  int slot, ahead_slot;  // bytes in the ring
  int blocks, rest;      // the warps of a block are blocks * count + rest super-tiles
  RowBlock ahead;        // `codes` of its super-tile

  // p.warps super-tiles on.
  __device__ __forceinline__ void step(int& block, int& i) const {
    block += blocks, i += rest;
    if (i >= count) i -= count, block++;
  }
};

// The next copies of the cursor, as a group, which is empty behind the last super-tile.
template <class D>
__device__ __forceinline__ void fetch_ahead(const Params& p, const PieceView& piece, Cursor& c, uint8_t* ring, int lane) {
  if (c.ahead_block < c.last) {
    fetch<D>(piece, c.ahead, unsigned(c.first + c.ahead_i), ring + c.ahead_slot, lane);
    const int block = c.ahead_block, i = c.ahead_i;
    c.step(c.ahead_block, c.ahead_i);
    // Steps from row block to row block are below 2^32 bytes (K below 2^27): one multiplication with 64-bit sum each.
    const unsigned blocks = unsigned(c.ahead_block - block);
    c.ahead.codes += uint64_t(blocks) * uint32_t(piece.code_step) + int64_t(c.ahead_i - i) * slot_codes(D::bits);
    if (D::scaled || D::tabled) c.ahead.scales += uint64_t(blocks) * uint32_t(piece.scale_step);
    if (D::zeroed) c.ahead.zeros += uint64_t(blocks) * uint32_t(piece.zero_step);
  }
  ptx::cp_async_commit();
  c.ahead_slot = c.ahead_slot + p.slot == p.depth * p.slot ? 0 : c.ahead_slot + p.slot;
}

// Begins with the row blocks [begin, last) of a piece: fills all slots but one.
template <class D>
__device__ __forceinline__ void start(const Params& p, const PieceView& piece, Cursor& c, int begin, int last, uint8_t* ring, int warp, int lane) {
  const Share share = share_of(piece, p.splits, int(blockIdx.y));
  c.first = share.first, c.count = share.count, c.last = share.count ? last : begin;
  const int count = max(share.count, 1);
  c.block = begin, c.i = warp, c.blocks = 0, c.rest = p.warps, c.slot = c.ahead_slot = 0;
  if (count <= p.warps) {  // rather than divide where there is nothing to divide
    c.blocks = p.warps / count, c.rest = p.warps - c.blocks * count;
    c.block += warp / count, c.i = warp % count;
  }
  c.ahead_block = c.block, c.ahead_i = c.i;
  c.ahead.codes = reinterpret_cast<const uint8_t*>(piece.codes) + c.block * piece.code_step + int64_t(c.first + c.i) * slot_codes(D::bits) + lane * 16;
  c.ahead.scales = piece.scales + c.block * piece.scale_step + lane * 16;
  c.ahead.zeros = piece.zeros + c.block * piece.zero_step + lane * 16;
  for (int i = 1; i < p.depth; i++) fetch_ahead<D>(p, piece, c, ring, lane);
}

// Multiplies the super-tiles of the row blocks before `end`, and adds to this warp's sums of the batch, which begins with row block `batch`.
template <class D, int NT, int FOLD, int ZERO>
__device__ __forceinline__ void go_on(const Params& p, const PieceView& piece, Cursor& c, int batch, int end, const uint16_t* xs, int stride, const float* x_sums,
                                      float* sums, uint8_t* ring, int warp, int lane) {
  constexpr Places places = places_of<D>();
  const int g = lane / 4, t = lane % 4;
  const uint16_t* rows[NT];
#pragma unroll
  for (int n = 0; n < NT; n++) rows[n] = xs + min(8 * n + g, p.m - 1) * stride + 8 * t;  // absent rows: those of the last one
  D d;
  if constexpr (D::scaled && !D::zeroed) d.load(piece, 0, lane);
  float acc[NT][4] = {};
  while (c.block < end && c.block < c.last) {
    wait_for_copies(p.depth - 2);
    __syncwarp();  // other lanes copied scales for this one, and have read the slot that is filled next
    fetch_ahead<D>(p, piece, c, ring, lane);
    const uint8_t* slot = ring + c.slot;
    if constexpr (D::tabled) d.set_tables(reinterpret_cast<const uint32_t*>(slot + slot_codes(D::bits)), lane);
    const uint16_t* from[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) from[n] = rows[n] + c.i * (D::tiles * TILE_COLS);
    multiply_slot<D, NT, FOLD, ZERO>(d, slot, piece, from, {x_sums + c.i * (D::tiles * 16 * NT) + 2 * t, c.i * 2 * D::tiles % 8 != 0}, acc, lane);
    c.slot = c.slot + p.slot == p.depth * p.slot ? 0 : c.slot + p.slot;
    const int block = c.block;
    c.step(c.block, c.i);
    if (c.block == block) continue;
    float* mine = sums + ((block - batch) * p.warps + warp) * p.m * SUM_STRIDE;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int m = 8 * n + 2 * t + e % 2;
        if (m < p.m) mine[m * SUM_STRIDE + g + e / 2 * 8] += acc[n][e] * places.back[e / 2];
        acc[n][e] = 0.0f;
      }
  }
}

// The same with the groups and zeros of a piece known to the compiler: a branch in the middle of a super-tile keeps loads and products
// from overlapping. Not in the kernel with all decoders, which would be 12 times as large.
template <class D, int NT, bool KNOWN>
__device__ __forceinline__ void go_on(const Params& p, const PieceView& piece, Cursor& c, int batch, int end, const uint16_t* xs, int stride, const float* x_sums,
                                      float* sums, uint8_t* ring, int warp, int lane) {
  constexpr int halves = 2 * D::tiles;
  const auto with = [&](auto fold, auto zero) {
    go_on<D, NT, decltype(fold)::value, decltype(zero)::value>(p, piece, c, batch, end, xs, stride, x_sums, sums, ring, warp, lane);
  };
  if constexpr (KNOWN && D::scaled) {
    const auto with_zeros = [&](auto fold) {
      constexpr bool only_floats = D::zeroed && D::bits == 1;
      if (only_floats || (D::zeroed && piece.zero == FLOATZERO)) return with(fold, Constant<D::zeroed ? FLOATZERO : SYM>{});
      if constexpr (!only_floats) {
        if (D::zeroed && piece.zero == INT) return with(fold, Constant<D::zeroed ? INT : SYM>{});
        with(fold, Constant<SYM>{});
      }
    };
    const int fold = 1 << min(int(piece.group_shift), 3);
    if (fold >= halves) return with_zeros(Constant<halves>{});
    if (halves > 4 && fold == 4) return with_zeros(Constant<(halves < 4 ? halves : 4)>{});
    if (fold == 2) return with_zeros(Constant<2>{});
    with_zeros(Constant<1>{});
  } else {
    with(Constant<0>{}, Constant<SYM>{});
  }
}

// Kernel for the formats of the decoders Ds. grid: (blocks, splits).
template <int NT, class... Ds>
__global__ void __launch_bounds__(mv_warps(NT, sizeof...(Ds) > 1) * WARP, 1) mv(const __grid_constant__ Params p) {
  MXQ_DYN_SMEM(float, smem);
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP, stride = p.columns + STAGE_PAD;
  const MvShape shape = {p.warps, p.batch, p.m, p.depth, p.slot, p.columns, p.sparse};
  float *sums = smem, *factor = smem + shape.factors(), *largest = smem + shape.largest(), *extra = smem + shape.extra();
  int* range = reinterpret_cast<int*>(smem + shape.range());  // the first row block and the one behind the last: in shared memory, as registers are short
  uint8_t* bytes = reinterpret_cast<uint8_t*>(smem);
  uint8_t* ring = bytes + shape.ring() + warp * p.depth * p.slot;
  uint16_t* xs = reinterpret_cast<uint16_t*>(bytes + shape.x());
  float* x_sums = reinterpret_cast<float*>(bytes + shape.x_sums());

  int part_index;
  {
    const int row_block = first_row_block(p, blockIdx.x), end_block = first_row_block(p, blockIdx.x + 1);
    if (row_block == end_block) return;
    if (threadIdx.x == 0) range[0] = row_block, range[1] = end_block;
    part_index = find_part(p, unsigned(row_block));
    // Weights do not depend on what ran before: they are asked for before the wait.
    const PieceView& piece = p.piece[p.part[part_index].first_piece];
    const Share share = share_of(piece, p.splits, int(blockIdx.y));
    const int lines = slot_codes(piece.bits) / 128;
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(piece.codes) + uint64_t(row_block - int(p.part[part_index].first_cta)) * piece.code_step;
    for (int i = warp; i < share.count && i < 4 * p.warps; i += p.warps)
      if (lane < lines && uint64_t(share.first + i) * unsigned(slot_codes(piece.bits)) + unsigned(lane) * 128 < piece.code_step)
        ptx::prefetch_l2(codes + uint64_t(share.first + i) * unsigned(slot_codes(piece.bits)) + lane * 128);
  }
  for (int i = int(threadIdx.x); i < shape.sums(); i += threads_of(p)) sums[i] = 0.0f;
  if (threadIdx.x < 16) factor[threadIdx.x] = 1.0f;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();

  __syncthreads();
  for (bool first = true; part_index < p.parts && int(p.part[part_index].first_cta) < range[1]; part_index++, first = false) {
    const PartView& part = p.part[part_index];
    const PieceView* pieces = p.piece + part.first_piece;
    const int begin = max(range[0] - int(part.first_cta), 0), last = min(range[1] - int(part.first_cta), int((part.rows + TILE_ROWS - 1) / TILE_ROWS));
    const bool stage = first || part.restage;
    int columns = 0;  // of x in shared memory
    if (!first) __syncthreads();  // x and the sums have been read
    if (stage) {
      for (unsigned i = 0; i < part.pieces; i++) {
        const Share share = share_of(pieces[i], p.splits, int(blockIdx.y));
        const int width = super_cols(pieces[i].bits);
        stage_piece(p, part, pieces[i], share.first * width, share.count * width, stride, xs + columns);
        columns += share.count * width;
      }
      ptx::cp_async_commit();
    }
    Cursor cursor;
    for_decoder<Ds...>(pieces[0], [&](auto d) { start<decltype(d)>(p, pieces[0], cursor, begin, part.pieces == 1 ? last : min(begin + p.batch, last), ring, warp, lane); });
    if (stage) {
      wait_for_copies(p.depth - 1);
      __syncthreads();
      if (p.x_type == BF16) {
        convert_staged(p, columns, stride, xs, largest, factor, warp, lane);
        __syncthreads();
      }
      if ((Ds::zeroed || ...)) {
        int from = 0;
        for (unsigned i = 0; i < part.pieces; i++) {
          const int wide = share_of(pieces[i], p.splits, int(blockIdx.y)).count * super_cols(pieces[i].bits);
          sum_staged(p, wide, stride, xs + from, NT, x_sums + from / 32 * 8 * NT, warp, lane);
          from += wide;
        }
        __syncthreads();
      }
    }

    for (int batch = begin; batch < last; batch += p.batch) {
      const int end = min(batch + p.batch, last), rows = (end - batch) * TILE_ROWS;
      int from = 0;
      for (unsigned i = 0; i < part.pieces; i++) {
        const PieceView& piece = pieces[i];
        for_decoder<Ds...>(piece, [&](auto d) {
          if (part.pieces > 1 && (i > 0 || batch > begin)) start<decltype(d)>(p, piece, cursor, batch, end, ring, warp, lane);
          go_on<decltype(d), NT, sizeof...(Ds) == 1>(p, piece, cursor, batch, end, xs + from, stride, x_sums + from / 32 * 8 * NT, sums, ring, warp, lane);
        });
        if (part.pieces > 1) __syncwarp();  // the ring is filled anew
        from += share_of(piece, p.splits, int(blockIdx.y)).count * super_cols(piece.bits);
      }
      const bool sparse = p.sparse && blockIdx.y == 0;
      if (sparse) add_sparse(p, part, unsigned(batch * TILE_ROWS), rows, extra);
      __syncthreads();
      const int shift = p.m == 1 ? 0 : p.m == 2 ? 1 : p.m <= 4 ? 2 : p.m <= 8 ? 3 : 4;
      for (int i = int(threadIdx.x); i < rows << shift; i += threads_of(p)) {
        const int m = i / TILE_ROWS & ((1 << shift) - 1), r = (i / TILE_ROWS >> shift) * TILE_ROWS + i % TILE_ROWS;
        if (m >= p.m) continue;
        float* place = sums + (r / TILE_ROWS * p.warps * p.m + m) * SUM_STRIDE + r % TILE_ROWS;
        float sum = 0.0f;
        for (int w = 0; w < p.warps; w++) sum += place[w * p.m * SUM_STRIDE], place[w * p.m * SUM_STRIDE] = 0.0f;
        sum *= row_unfactor(factor[m]);
        if (sparse) sum += extra[m * rows + r];
        const unsigned row = unsigned(batch * TILE_ROWS + r);
        if (p.splits == 1) finish(p, part, m, row, sum);
        else p.partial[(int64_t(blockIdx.y) * p.m + m) * p.ctas * TILE_ROWS + int64_t(part.first_cta) * TILE_ROWS + row] = sum;
      }
      if (end < last) __syncthreads();  // the sums have been read
    }
  }
}

// Defines the launcher of one translation unit.
#define MXQ_MV(name, ...)                                                                                                        \
  int name(const Params& p, int tiles, bool early, void* stream) {                                                               \
    const dim3 grid(unsigned(p.blocks), unsigned(p.splits)), block(unsigned(p.warps) * WARP);                                    \
    const MvShape shape = {p.warps, p.batch, p.m, p.depth, p.slot, p.columns, p.sparse};                                         \
    return tiles == 1 ? MXQ_LAUNCH_EARLY(early, (mv<1, __VA_ARGS__>), grid, block, size_t(shape.nbytes()), stream, p)            \
                      : MXQ_LAUNCH_EARLY(early, (mv<2, __VA_ARGS__>), grid, block, size_t(shape.nbytes()), stream, p);           \
  }

}  // namespace mxq::cuda
