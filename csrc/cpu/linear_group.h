// Several linears that read the same x (q, k and v; gate and up) as one parallel section.
#pragma once

#include <stdint.h>

namespace mxq {

struct GroupItem {
  const uint8_t* blob;  // a prepacked weight [n][k]; all of a group have the same k
  const void* bias;     // [n] or null
  int bias_type;
  bool a8;
  void* y;              // [m][n]
};

// y[m][n] = x[m][ldx] W^T + bias for each of `count` items: the numbers of linear() (driver.h), with one start of the threads for all of them and
// x brought into the kernels' order once for all weights that read it in the same form. Types are Type (linear.h). Throws std::bad_alloc.
void linear_group(const GroupItem* items, int count, const void* x, int64_t ldx, int type, int64_t m, int threads);

}  // namespace mxq
