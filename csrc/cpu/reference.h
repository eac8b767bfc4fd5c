// The plain-loop twin of every op, over the canonical layout: what all kernels are held to.
#pragma once

#include "prepack.h"

namespace mxq::ref {

// w[n][k], original row and column order.
void dequantize(const Weight& weight, float* w);
// y[m][n] = x[m][ldx] W^T + bias, accumulated in double in ascending column order. a8: with x, nf levels and lut tables rounded to int8 as
// formats.h says, everything else unrounded.
void linear(const Weight& weight, const void* x, int64_t ldx, int type, int64_t m, void* y, const void* bias, int bias_type, bool a8);
// y[i] = row ids[i].
void embedding(const Weight& weight, const int64_t* ids, int64_t count, void* y, int type);

}  // namespace mxq::ref
