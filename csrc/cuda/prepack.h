// Canonical rectangles <-> the CUDA blob (csrc/cuda_layout.h). Host code without torch and without CUDA.
#pragma once

#include "../cuda_layout.h"

namespace mxq::cuda {

// Plain structs of 8-byte fields, which Python fills through ctypes (mxq_ext/cuda.py): absent parts are 0.
struct RectDesc {
  int64_t r0, r1, c0, c1;
  int64_t kind, bits, zero, bf16, group;  // Format
  uint8_t *codes, *scales, *zeros;        // canonical tensors; `codes` are the values of fp16, `scales` the table of lut
};
struct WeightDesc {
  int64_t n, k, rect_count, nnz;
  const RectDesc* rects;
  const int32_t *perm_rows, *perm_cols;  // original row (column) of each stored one
  const int32_t *rowptr, *cols;          // CSR of the sparse part
  const uint16_t* values;                // fp16
};

struct Sizes {
  int64_t nbytes, head_nbytes;
};
// Bytes of the blob and of its head; they depend on shapes, formats and the count of sparse values alone.
Sizes blob_sizes(const WeightDesc& w);
// Fills `blob` (in host memory).
void prepack(const WeightDesc& w, uint8_t* blob, int threads);
// Writes the canonical tensors of rectangle i; `blob` is a whole blob in host memory.
void unpack(const uint8_t* blob, int64_t i, const RectDesc& out, int threads);

static inline const CudaHead& head_of(const uint8_t* blob) { return *reinterpret_cast<const CudaHead*>(blob); }
template <class T>
static inline const T* at(const uint8_t* blob, uint64_t offset) {
  return reinterpret_cast<const T*>(blob + offset);
}

}  // namespace mxq::cuda
