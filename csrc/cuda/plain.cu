// The kernels that read one weight at a time: lookup (single rows of the weight), scalar (one thread per output), and what adds the values of the sparse
// part to a weight.
#include <math.h>

#include "launch.h"
#include "simt.hpp"
#include "weight.cuh"

namespace mxq::cuda {
namespace {

// Value `e` of the sparse part, in original column `col` of the row that `band`, `block` and `r` say, plus the weight that it is added to, anew in float32.
__device__ __forceinline__ float with_value(const uint8_t* blob, const CudaBand& band, uint64_t block, int r, int col, int64_t e) {
  const CudaHead& h = blob_head(blob);
  const unsigned stored = h.off_col_of ? unsigned(__ldg(blob_at<int32_t>(blob, h.off_col_of) + col)) : unsigned(col);
  const CudaPiece* p = blob_at<CudaPiece>(blob, h.off_pieces) + band.first_piece;
  while (stored < p->c0 || stored >= p->c1) p++;
  return __fadd_rn(weight_at(blob, *p, block, r, stored - p->c0), ptx::half_to_float(__ldg(blob_at<uint16_t>(blob, h.off_values) + e)));
}

// One thread per value of the sparse part. Runs behind dequant.
__global__ void __launch_bounds__(256) add_values(const uint8_t* blob, void* out, int type, WeightRows of) {
  const CudaHead& h = blob_head(blob);
  const int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (e >= int64_t(h.nnz)) return;
  const int32_t* rowptr = blob_at<int32_t>(blob, h.off_rowptr);
  int row = 0, above = int(h.n);  // rowptr[row] <= e < rowptr[above]
  while (above - row > 1) {
    const int middle = (row + above) / 2;
    (__ldg(rowptr + middle) <= e ? row : above) = middle;
  }
  const int stored = h.off_row_of ? __ldg(blob_at<int32_t>(blob, h.off_row_of) + row) : row, piece_row = stored - of.begin;
  if (unsigned(piece_row) >= unsigned(of.count)) return;
  const int col = __ldg(blob_at<int32_t>(blob, h.off_cols) + e);
  uint64_t block;
  int r;
  const CudaBand& band = band_of(blob, unsigned(stored), block, r);
  const int place = of.stored_cols && h.off_col_of ? __ldg(blob_at<int32_t>(blob, h.off_col_of) + col) : col;
  store_number(out, int64_t(of.original ? row : piece_row) * h.k + place, type, with_value(blob, band, block, r, col, e));
}

// grid: one block per id. out[i, K] = row ids[i] without the sparse part, columns in original order; NaN where there is no such row: the host does not
// know the ids, and would have to wait for them.
__global__ void __launch_bounds__(256) lookup(const uint8_t* blob, const int64_t* ids, void* out, int type) {
  const CudaHead& h = blob_head(blob);
  const int64_t row = __ldg(ids + blockIdx.x), to = int64_t(blockIdx.x) * h.k;
  if (row < 0 || row >= int64_t(h.n)) {
    for (unsigned c = threadIdx.x; c < h.k; c += 256) store_number(out, to + c, type, NAN);
    return;
  }
  const unsigned stored = h.off_row_of ? unsigned(__ldg(blob_at<int32_t>(blob, h.off_row_of) + row)) : unsigned(row);
  const int32_t* perm_cols = h.off_perm_cols ? blob_at<int32_t>(blob, h.off_perm_cols) : nullptr;
  uint64_t block;
  int r;
  const CudaBand& band = band_of(blob, stored, block, r);
  for (unsigned i = 0; i < band.pieces; i++) {
    const CudaPiece& p = blob_at<CudaPiece>(blob, h.off_pieces)[band.first_piece + i];
    for (unsigned c = p.c0 + threadIdx.x; c < p.c1; c += 256) store_number(out, to + (perm_cols ? __ldg(perm_cols + c) : int(c)), type, weight_at(blob, p, block, r, c - p.c0));
  }
}

// The same grid, behind lookup: the values of the sparse part. A kernel of its own, since two places that decode a weight made lookup spill.
__global__ void __launch_bounds__(256) lookup_values(const uint8_t* blob, const int64_t* ids, void* out, int type) {
  const CudaHead& h = blob_head(blob);
  const int64_t row = __ldg(ids + blockIdx.x), to = int64_t(blockIdx.x) * h.k;
  if (row < 0 || row >= int64_t(h.n)) return;
  const unsigned stored = h.off_row_of ? unsigned(__ldg(blob_at<int32_t>(blob, h.off_row_of) + row)) : unsigned(row);
  uint64_t block;
  int r;
  const CudaBand& band = band_of(blob, stored, block, r);
  const int32_t *rowptr = blob_at<int32_t>(blob, h.off_rowptr), *cols = blob_at<int32_t>(blob, h.off_cols);
  for (int e = __ldg(rowptr + row) + int(threadIdx.x); e < __ldg(rowptr + row + 1); e += 256)
    store_number(out, to + __ldg(cols + e), type, with_value(blob, band, block, r, __ldg(cols + e), e));
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

int launch_add_values(const CudaHead& head, const WeightRows& of, const uint8_t* blob, void* out, int type, void* stream) {
  return MXQ_LAUNCH(add_values, dim3(unsigned((head.nnz + 255) / 256)), dim3(256), 0, stream, blob, out, type, of);
}

int launch_lookup(const CudaHead& head, const uint8_t* blob, const int64_t* ids, int64_t count, void* out, int type, void* stream) {
  if (const int error = MXQ_LAUNCH(lookup, dim3(unsigned(count)), dim3(256), 0, stream, blob, ids, out, type)) return error;
  return head.nnz ? MXQ_LAUNCH(lookup_values, dim3(unsigned(count)), dim3(256), 0, stream, blob, ids, out, type) : 0;
}

int launch_scalar(const CudaHead& head, const LinearCall& c, const Output& o, void* stream) {
  return MXQ_LAUNCH(scalar, dim3((head.n + 255) / 256, unsigned(c.m < 65535 ? c.m : 65535)), dim3(256), 0, stream, o.blob, c.x, c.ldx, int(c.x_type), int(c.m), o.y, o.ldy, int(c.y_type), o.bias,
                    int(o.bias_type));
}

}  // namespace mxq::cuda
