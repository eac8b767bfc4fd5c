// The ops as the binding calls them. Everything was checked in Python; pointers are trusted.
#pragma once

#include <stdint.h>

namespace mxq {

// True if `m` rows of x are computed by the gemm kernels, false for gemv.
bool uses_gemm(const uint8_t* blob, int64_t m, bool a8);

// y[m][n] = x[m][ldx] W^T + bias; a8: with x rounded to int8 (formats.h). Types are Type (linear.h); bias may be null. Throws std::bad_alloc.
void linear(const uint8_t* blob, const void* x, int64_t ldx, int type, int64_t m, void* y, const void* bias, int bias_type, bool a8, int threads);

// y[i] = row ids[i] of the weight, in y's type [count][k]. ids null: rows 0 .. count-1 (the whole weight). Throws std::bad_alloc.
void embedding(const uint8_t* blob, const int64_t* ids, int64_t count, void* y, int type, int threads);

}  // namespace mxq
