// The kernels for any shape and type: dequant (the weight itself, for large M and as an oracle) and scalar (one thread per output).
#include "launch.h"
#include "simt.hpp"
#include "weight.cuh"

namespace mxq::cuda {
namespace {

constexpr int DEQUANT_WARPS = 8;

template <int N>
struct Constant {
  static constexpr int value = N;
};

// One tile: each lane decodes its 32 codes, whose places are constants here, and stores runs of 8 columns.
template <int BITS, bool QUADS>
__device__ __forceinline__ void dequant_tile(const uint8_t* blob, const CudaPiece& p, uint64_t block, unsigned tile, int rows, const int32_t* row_map, unsigned row0,
                                             const int32_t* perm_cols, void* out, int64_t k, int type) {
  const int lane = int(threadIdx.x) % WARP, g = lane / 4, t = lane % 4;
  const uint32_t* words = blob_at<uint32_t>(blob, p.codes + block * p.code_step);
  uint32_t w[BITS];
#pragma unroll
  for (int i = 0; i < BITS; i++) w[i] = __ldg(words + word_index(BITS, tile, p.tiles, i, lane));
  const int cols = int(p.c1 - p.c0);
#pragma unroll
  for (int second = 0; second < 2; second++) {
    const int r = g + 8 * second;
    if (r >= rows) continue;
    const int64_t to = int64_t(row_map ? __ldg(row_map + r) : int(row0) + r) * k;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int first = int(tile) * TILE_COLS + 32 * half + 8 * t;
      const RowGroup group = row_group(blob, p, block, r, unsigned(first));
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const CodePlace place = code_place(BITS, QUADS, 8 * second, 32 * half + j);  // as lane 0 has it: all lanes are alike
        unsigned code = place.low ? w[place.word] >> place.bit & ((1u << place.low) - 1) : 0;
        for (int b = place.low; b < BITS; b++) code |= (w[place.high_word + (b - place.low) * place.high_step] >> place.high_bit & 1) << b;
        if (first + j >= cols) continue;
        const int64_t at = int(p.c0) + first + j;
        store_number(out, to + (perm_cols ? __ldg(perm_cols + at) : at), type, weight_of(p.format, group, code));
      }
    }
  }
}

// grid: row blocks of all bands. out[N, K] in original order.
__global__ void __launch_bounds__(DEQUANT_WARPS* WARP) dequant(const uint8_t* blob, void* out, int type) {
  const CudaHead& h = blob_head(blob);
  const CudaBand* band = blob_at<CudaBand>(blob, h.off_bands);
  unsigned first = 0, count;
  while (blockIdx.x >= first + (count = (band->r1 - band->r0 + TILE_ROWS - 1) / TILE_ROWS)) first += count, band++;
  const unsigned block = blockIdx.x - first, row0 = band->r0 + block * TILE_ROWS;
  const int rows = min(int(band->r1 - row0), TILE_ROWS);
  const int32_t* row_map = h.off_perm_rows ? blob_at<int32_t>(blob, h.off_perm_rows) + row0 : nullptr;
  const int32_t* perm_cols = h.off_perm_cols ? blob_at<int32_t>(blob, h.off_perm_cols) : nullptr;
  for (unsigned i = 0; i < band->pieces; i++) {
    const CudaPiece& p = blob_at<CudaPiece>(blob, h.off_pieces)[band->first_piece + i];
    const bool quads = quad_order(p.format);
    for (unsigned tile = threadIdx.x / WARP; tile < p.tiles; tile += DEQUANT_WARPS) {
      const auto go = [&](auto bits, auto order) {
        dequant_tile<decltype(bits)::value, decltype(order)::value>(blob, p, block, tile, rows, row_map, row0, perm_cols, out, h.k, type);
      };
      switch (p.format.bits) {
        case 2: quads ? go(Constant<2>(), Constant<1>()) : go(Constant<2>(), Constant<0>()); break;
        case 3: quads ? go(Constant<3>(), Constant<1>()) : go(Constant<3>(), Constant<0>()); break;
        case 4: quads ? go(Constant<4>(), Constant<1>()) : go(Constant<4>(), Constant<0>()); break;
        case 8: go(Constant<8>(), Constant<0>()); break;
        default: go(Constant<16>(), Constant<0>());
      }
    }
  }
}

// One thread per value of the sparse part: the weight it is added to, anew in float32, plus the value. Runs behind dequant.
__global__ void __launch_bounds__(256) add_values(const uint8_t* blob, void* out, int type) {
  const CudaHead& h = blob_head(blob);
  const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (e >= int64_t(h.nnz)) return;
  const int32_t* rowptr = blob_at<int32_t>(blob, h.off_rowptr);
  int row = 0, above = int(h.n);  // rowptr[row] <= e < rowptr[above]
  while (above - row > 1) {
    const int middle = (row + above) / 2;
    (__ldg(rowptr + middle) <= e ? row : above) = middle;
  }
  const int col = __ldg(blob_at<int32_t>(blob, h.off_cols) + e);
  const unsigned stored_row = h.off_row_of ? unsigned(__ldg(blob_at<int32_t>(blob, h.off_row_of) + row)) : unsigned(row);
  const unsigned stored_col = h.off_col_of ? unsigned(__ldg(blob_at<int32_t>(blob, h.off_col_of) + col)) : unsigned(col);
  uint64_t block;
  int r;
  const CudaBand& band = band_of(blob, stored_row, block, r);
  const CudaPiece* p = blob_at<CudaPiece>(blob, h.off_pieces) + band.first_piece;
  while (stored_col < p->c0 || stored_col >= p->c1) p++;
  const float w = weight_at(blob, *p, block, r, stored_col - p->c0);
  store_number(out, int64_t(row) * h.k + col, type, __fadd_rn(w, ptx::half_to_float(__ldg(blob_at<uint16_t>(blob, h.off_values) + e))));
}

// One thread per stored row and, in grid.y, row of x: float32 products and sums, pieces and columns in order. Any type of x and y.
__global__ void __launch_bounds__(256) scalar(const uint8_t* blob, const void* x, int64_t ldx, int x_type, int m, void* y, int64_t ldy, int y_type, const void* bias,
                                              int bias_type) {
  const CudaHead& h = blob_head(blob);
  const unsigned stored = blockIdx.x * 256 + threadIdx.x;
  if (stored >= h.n) return;
  const int32_t* perm_cols = h.off_perm_cols ? blob_at<int32_t>(blob, h.off_perm_cols) : nullptr;
  const int row = h.off_perm_rows ? __ldg(blob_at<int32_t>(blob, h.off_perm_rows) + stored) : int(stored);
  uint64_t block;
  int r;
  const CudaBand& band = band_of(blob, stored, block, r);
  for (int64_t i = blockIdx.y; i < m; i += gridDim.y) {
    const int64_t at = i * ldx;
    float sum = 0.0f;
    for (unsigned q = 0; q < band.pieces; q++) {
      const CudaPiece& p = blob_at<CudaPiece>(blob, h.off_pieces)[band.first_piece + q];
      for (unsigned c = p.c0; c < p.c1; c++) sum = fmaf(weight_at(blob, p, block, r, c - p.c0), number_at(x, at + (perm_cols ? __ldg(perm_cols + c) : int(c)), x_type), sum);
    }
    if (h.off_rowptr) {
      const int32_t *rowptr = blob_at<int32_t>(blob, h.off_rowptr), *cols = blob_at<int32_t>(blob, h.off_cols);
      for (int e = __ldg(rowptr + row); e < __ldg(rowptr + row + 1); e++)
        sum = fmaf(ptx::half_to_float(__ldg(blob_at<uint16_t>(blob, h.off_values) + e)), number_at(x, at + __ldg(cols + e), x_type), sum);
    }
    if (bias) sum += number_at(bias, row, bias_type);
    store_number(y, i * ldy + row, y_type, sum);
  }
}

}  // namespace

int launch_dequant(const CudaHead& head, int64_t row_blocks, const uint8_t* blob, void* out, int type, void* stream) {
  if (const int error = MXQ_LAUNCH(dequant, dim3(unsigned(row_blocks)), dim3(DEQUANT_WARPS * WARP), 0, stream, blob, out, type)) return error;
  return head.nnz ? MXQ_LAUNCH(add_values, dim3(unsigned((head.nnz + 255) / 256)), dim3(256), 0, stream, blob, out, type) : 0;
}

int launch_scalar(const CudaHead& head, const LinearCall& c, const Output& o, void* stream) {
  return MXQ_LAUNCH(scalar, dim3((head.n + 255) / 256, unsigned(c.m < 65535 ? c.m : 65535)), dim3(256), 0, stream, o.blob, c.x, c.ldx, int(c.x_type), int(c.m), o.y, o.ldy, int(c.y_type), o.bias,
                    int(o.bias_type));
}

}  // namespace mxq::cuda
