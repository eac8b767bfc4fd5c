// A call as Python hands it over (plain structs of 8-byte fields, filled through ctypes), and the functions that launch its kernels.
#pragma once

#include "dispatch.h"

namespace mxq::cuda {

// One weight and where its product goes.
struct Output {
  const uint8_t *head, *blob;  // head: host copy of the blob's first head_nbytes; blob: device memory
  void* y;                     // [m, n], `ldy` elements between rows
  const void* bias;            // [n] or null
  int64_t ldy, bias_type;
};

struct LinearCall {
  const void* x;  // [m, k], `ldx` elements between rows
  int64_t ldx, x_type, y_type, m, outputs;
  const Output* output;  // all read the same x
  void* workspace;       // device memory of workspace_nbytes()
  void* stream;
  int64_t path, capability, sms;
  int64_t warps, blocks, batch, splits;  // 0: as the configuration has it. Tests set them to reach every branch with small weights
};

// All return a cudaError_t, 0 for success, or NO_KERNEL. Nothing is allocated, nothing waits.
constexpr int NO_KERNEL = -1;
Desc desc_of(const LinearCall& c);
Config config_of(const LinearCall& c, const Desc& d);  // d: desc_of(c)
int64_t workspace_nbytes(const LinearCall& c);
int linear(const LinearCall& c);
// `count` stored rows of the weight from `begin` on, [count, k] of `type`: the columns in original or in stored order, the rows in stored order, but in
// original order if they are all rows.
int dequantize(const uint8_t* head, const uint8_t* blob, void* out, int type, int64_t begin, int64_t count, bool stored_cols, void* stream);
// Rows ids[0..count) (int64, device memory) in original order, [count, k] of `type`; NaN for an id that is no row.
int embedding(const uint8_t* head, const uint8_t* blob, const int64_t* ids, int64_t count, void* out, int type, void* stream);

// Rows of a weight that are wanted: all of them in original order, or a piece of `count` stored rows from `begin` on, in stored order (a product with them
// is put into the original order by its caller). Their columns in original order, or in stored order (the caller has x in that order).
struct WeightRows {
  int begin, count, original, stored_cols;
};

// mv_<format>.cu. `early`: the kernel may start before the one ahead of it has ended (compute capability 9.0 and later).
using MvLaunch = int (*)(const Params& p, int tiles, bool early, void* stream);
int mv_w1(const Params&, int, bool, void*);
int mv_w2(const Params&, int, bool, void*);
int mv_w3(const Params&, int, bool, void*);
int mv_w4(const Params&, int, bool, void*);
int mv_w5(const Params&, int, bool, void*);
int mv_w6(const Params&, int, bool, void*);
int mv_w8(const Params&, int, bool, void*);
int mv_lut2(const Params&, int, bool, void*);
int mv_lut3(const Params&, int, bool, void*);
int mv_lut4(const Params&, int, bool, void*);
int mv_nf4(const Params&, int, bool, void*);
int mv_fp16(const Params&, int, bool, void*);
int mv_mixed(const Params&, int, bool, void*);

// mm_<format>.cu
using MmLaunch = int (*)(const Params& p, void* stream);
int mm_w1(const Params&, void*);
int mm_w2(const Params&, void*);
int mm_w3(const Params&, void*);
int mm_w4(const Params&, void*);
int mm_w5(const Params&, void*);
int mm_w6(const Params&, void*);
int mm_w8(const Params&, void*);
int mm_lut2(const Params&, void*);
int mm_lut3(const Params&, void*);
int mm_lut4(const Params&, void*);
int mm_nf4(const Params&, void*);
int mm_fp16(const Params&, void*);
int mm_mixed(const Params&, void*);
int launch_stage(const Params& p, uint16_t* staged, float* unscale, void* stream);

// dequant.cu, plain.cu and reduce.cu. `units`: super-tiles of the band that has most of them.
int launch_dequant(const CudaHead& head, int64_t first_block, int64_t blocks, int64_t units, const WeightRows& of, const uint8_t* blob, void* out, int type,
                   void* stream);
int launch_add_values(const CudaHead& head, const WeightRows& of, const uint8_t* blob, void* out, int type, void* stream);
int launch_lookup(const CudaHead& head, const uint8_t* blob, const int64_t* ids, int64_t count, void* out, int type, void* stream);
int launch_scalar(const CudaHead& head, const LinearCall& c, const Output& o, void* stream);
int launch_reduce(const Params& p, int rows, bool early, void* stream);

}  // namespace mxq::cuda
