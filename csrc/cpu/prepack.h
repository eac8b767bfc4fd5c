// Canonical rectangles <-> the prepacked blob, and reading single rows of the blob.
#pragma once

#include <string>
#include <vector>

#include "../blob.h"

namespace mxq {

// A rectangle as the checkpoint stores it; pointers may be null where the format has no such tensor. `codes` are the values of fp16.
struct Canonical {
  Rect rect;
  uint8_t *codes, *scales, *zeros;  // `scales` is the table of lut
};

struct Weight {
  int64_t n, k;
  std::vector<Canonical> rects;
  const int32_t* perm_rows = nullptr;  // [n]: original row of stored row i, or null
  const int32_t* perm_cols = nullptr;  // [k]
  const int32_t* rowptr = nullptr;     // [n+1] or null: no sparse part
  const int32_t* cols = nullptr;       // [nnz]
  const uint16_t* values = nullptr;    // [nnz] fp16
  int64_t nnz = 0;
};

// Bytes of the blob; depends on shapes and formats alone.
int64_t blob_nbytes(const Weight& w);
// Fills `blob` (blob_nbytes() bytes, any alignment; 64 is fastest).
void prepack(const Weight& w, uint8_t* blob, int threads);
// Writes the codes, scales and zeros of rectangle i to `out` in the canonical layout.
void unpack(const uint8_t* blob, uint32_t i, const Canonical& out, int threads);

// Row `row` (original order) of the weight as float32 [k].
void dequantize_row(const uint8_t* blob, int64_t row, float* out);

std::string format_name(Format f);
// The format where there is one, else for example "w3g64+w8+sparse".
std::string blob_format_name(const uint8_t* blob);

}  // namespace mxq
