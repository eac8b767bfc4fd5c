#include "reference.h"

#include <algorithm>
#include <vector>

#include "convert.h"
#include "linear.h"

namespace mxq::ref {
namespace {

// Code i of a canonical bit stream, bit by bit as the document says it.
int code_at(const uint8_t* row, int64_t i, int bits) {
  int code = 0;
  for (int b = 0; b < bits; b++) {
    const int64_t bit = i * bits + b;
    code |= (row[bit / 8] >> bit % 8 & 1) << b;
  }
  return code;
}

float half_at(const uint8_t* base, int64_t i, bool bf16) {
  const uint16_t u = load_u16(base + 2 * i);
  return bf16 ? bf16_to_float(u) : half_to_float(u);
}

float weight_at(const Canonical& c, int64_t row, int64_t col) {
  const Format f = c.rect.format;
  const int64_t cols = c.rect.c1 - c.rect.c0, g = f.group ? col / f.group : 0;
  const uint8_t* codes = c.codes + row * code_row_bytes(f, cols);
  if (f.kind == FLOAT) return half_at(codes, col, false);
  const int q = code_at(codes, col, f.bits);
  const uint8_t* scales = c.scales + row * scale_row_bytes(f, cols);
  if (f.kind == LUT) return half_at(scales, q, false);
  const float s = half_at(scales, g, f.bf16);
  if (f.kind == NF) return s * NF4_LEVELS[q];
  if (f.zero == SYM) return s * float(q - (1 << (f.bits - 1)));
  const uint8_t* zeros = c.zeros + row * zero_row_bytes(f, cols);
  if (f.zero == INT) return s * float(q - code_at(zeros, g, f.bits));
  return s * float(q) + half_at(zeros, g, f.bf16);
}

float read(const void* p, int64_t i, int type) {
  return type == F32 ? static_cast<const float*>(p)[i] : half_at(static_cast<const uint8_t*>(p), i, type == BF16);
}

void write(void* p, int64_t i, int type, float v) {
  if (type == F32) static_cast<float*>(p)[i] = v;
  else static_cast<uint16_t*>(p)[i] = type == BF16 ? float_to_bf16(v) : float_to_half(v);
}

}  // namespace

void dequantize(const Weight& weight, float* w) {
  std::fill(w, w + weight.n * weight.k, 0.0f);
  for (const Canonical& c : weight.rects)
    for (int64_t row = c.rect.r0; row < c.rect.r1; row++)
      for (int64_t col = c.rect.c0; col < c.rect.c1; col++) {
        const int64_t to_row = weight.perm_rows ? weight.perm_rows[row] : row, to_col = weight.perm_cols ? weight.perm_cols[col] : col;
        w[to_row * weight.k + to_col] = weight_at(c, row - c.rect.r0, col - c.rect.c0);
      }
  for (int64_t row = 0; row < weight.n && weight.rowptr; row++)
    for (int32_t i = weight.rowptr[row]; i < weight.rowptr[row + 1]; i++)
      w[row * weight.k + weight.cols[i]] += half_to_float(weight.values[i]);
}

void linear(const Weight& weight, const void* x, int64_t ldx, int type, int64_t m, void* y, const void* bias, int bias_type) {
  std::vector<float> w(size_t(weight.n) * size_t(weight.k));
  dequantize(weight, w.data());
  for (int64_t i = 0; i < m; i++)
    for (int64_t row = 0; row < weight.n; row++) {
      double sum = 0.0;
      for (int64_t col = 0; col < weight.k; col++) sum += double(read(x, i * ldx + col, type)) * double(w[row * weight.k + col]);
      if (bias) sum += double(read(bias, row, bias_type));
      write(y, i * weight.n + row, type, float(sum));
    }
}

void embedding(const Weight& weight, const int64_t* ids, int64_t count, void* y, int type) {
  std::vector<float> w(size_t(weight.n) * size_t(weight.k));
  dequantize(weight, w.data());
  for (int64_t i = 0; i < count; i++)
    for (int64_t col = 0; col < weight.k; col++) write(y, i * weight.k + col, type, w[ids[i] * weight.k + col]);
}

}  // namespace mxq::ref
