// Single numbers of any activation type in plain C++, for the twins.
#pragma once

#include "convert.h"
#include "linear.h"

namespace mxq {

static inline float read_number(const void* p, int64_t i, int type) {
  if (type == F32) return static_cast<const float*>(p)[i];
  const uint16_t u = static_cast<const uint16_t*>(p)[i];
  return type == BF16 ? bf16_to_float(u) : half_to_float(u);
}

static inline void write_number(void* p, int64_t i, int type, float v) {
  if (type == F32) static_cast<float*>(p)[i] = v;
  else static_cast<uint16_t*>(p)[i] = type == BF16 ? float_to_bf16(v) : float_to_half(v);
}

}  // namespace mxq
