#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "numbers.h"

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

// A group of x as int8 in units of its largest magnitude / 127.
struct Rounded {
  std::vector<int> codes;
  float unit;
};
Rounded round_group(const std::vector<float>& x) {
  float largest = 0.0f;
  for (const float v : x) largest = v != v ? v : std::fabs(v) > largest ? std::fabs(v) : largest;
  Rounded r{std::vector<int>(x.size()), largest < 0x1p-100f ? 0.0f : largest / 127.0f};
  const float inverse = largest < 0x1p-100f ? 0.0f : 127.0f / largest;
  for (size_t i = 0; i < x.size() && std::isfinite(largest); i++) r.codes[i] = int(std::nearbyint(x[i] * inverse));
  return r;
}

// A weight as the integer kernels know it.
double weight8_at(const Canonical& c, int64_t row, int64_t col) {
  const Format f = c.rect.format;
  const int64_t cols = c.rect.c1 - c.rect.c0;
  const uint8_t* scales = c.scales + row * scale_row_bytes(f, cols);
  if (f.kind != LUT && f.kind != NF) return double(weight_at(c, row, col));
  const int q = code_at(c.codes + row * code_row_bytes(f, cols), col, f.bits);
  if (f.kind == NF) return double(half_at(scales, f.group ? col / f.group : 0, f.bf16)) * std::round(NF4_LEVELS[q] * 127.0f) / 127.0;
  uint8_t table[32];
  for (int i = 0; i < 16; i++) std::memcpy(table + 2 * i, scales + 2 * (i % (1 << f.bits)), 2);
  const ByteTable t = byte_table(table);
  return double(t.unit) * t.values[q];
}

void add_rounded(const Canonical& c, const Weight& weight, const void* x, int64_t ldx, int type, int64_t m, double* sums) {
  const int64_t cols = c.rect.c1 - c.rect.c0, group = a8_group(c.rect.format);
  for (int64_t c0 = 0; c0 < cols; c0 += group) {
    const int64_t c1 = std::min(cols, c0 + group);
    for (int64_t i = 0; i < m; i++) {
      std::vector<float> part;
      for (int64_t col = c0; col < c1; col++) {
        const int64_t at = c.rect.c0 + col;
        part.push_back(read_number(x, i * ldx + (weight.perm_cols ? weight.perm_cols[at] : at), type));
      }
      const Rounded r = round_group(part);
      for (int64_t row = c.rect.r0; row < c.rect.r1; row++) {
        double sum = 0.0;
        for (int64_t col = c0; col < c1; col++) sum += weight8_at(c, row - c.rect.r0, col) * r.codes[col - c0];
        sums[i * weight.n + (weight.perm_rows ? weight.perm_rows[row] : row)] += double(r.unit) * sum;
      }
    }
  }
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

void linear(const Weight& weight, const void* x, int64_t ldx, int type, int64_t m, void* y, const void* bias, int bias_type, bool a8) {
  Weight exact = weight;  // what reads x as it is
  std::vector<Canonical> rounded;
  if (a8) {
    exact.rects.clear();
    for (const Canonical& c : weight.rects) (c.rect.format.kind == FLOAT ? exact.rects : rounded).push_back(c);
  }
  std::vector<float> w(size_t(weight.n) * size_t(weight.k));
  dequantize(exact, w.data());
  std::vector<double> sums(size_t(m) * size_t(weight.n));
  for (int64_t i = 0; i < m; i++)
    for (int64_t row = 0; row < weight.n; row++)
      for (int64_t col = 0; col < weight.k; col++)
        sums[i * weight.n + row] += double(read_number(x, i * ldx + col, type)) * double(w[row * weight.k + col]);
  for (const Canonical& c : rounded) add_rounded(c, weight, x, ldx, type, m, sums.data());
  for (int64_t i = 0; i < m; i++)
    for (int64_t row = 0; row < weight.n; row++)
      write_number(y, i * weight.n + row, type, float(sums[i * weight.n + row] + (bias ? double(read_number(bias, row, bias_type)) : 0.0)));
}

void embedding(const Weight& weight, const int64_t* ids, int64_t count, void* y, int type) {
  std::vector<float> w(size_t(weight.n) * size_t(weight.k));
  dequantize(weight, w.data());
  for (int64_t i = 0; i < count; i++)
    for (int64_t col = 0; col < weight.k; col++) write_number(y, i * weight.k + col, type, w[ids[i] * weight.k + col]);
}

}  // namespace mxq::ref
