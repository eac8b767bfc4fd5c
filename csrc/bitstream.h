// Codes in a canonical bit stream (formats.h): least significant bit first, as both packers read and write them.
#pragma once

#include <stdint.h>

namespace mxq {

static inline uint32_t get_code(const uint8_t* row, int64_t i, int bits) {
  const int64_t bit = i * bits;
  uint32_t two = row[bit / 8];
  if (bit % 8 + bits > 8) two |= uint32_t(row[bit / 8 + 1]) << 8;
  return two >> bit % 8 & ((1u << bits) - 1);
}

static inline void put_code(uint8_t* row, int64_t i, int bits, uint32_t code) {  // into zeroed bytes
  const int64_t bit = i * bits;
  row[bit / 8] |= uint8_t(code << bit % 8);
  if (bit % 8 + bits > 8) row[bit / 8 + 1] |= uint8_t(code >> (8 - bit % 8));
}

}  // namespace mxq
