// Half precision in plain C++, for the code that is compiled once for every CPU (the targets have their own in simd.h).
#pragma once

#include <stdint.h>
#include <string.h>

#include <cmath>

namespace mxq {

static inline uint16_t load_u16(const void* p) { uint16_t u; memcpy(&u, p, 2); return u; }
static inline void store_u16(void* p, uint16_t u) { memcpy(p, &u, 2); }

static inline float bf16_to_float(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline float half_to_float(uint16_t h) {
  const uint32_t exp = h >> 10 & 31, man = h & 0x3ff;
  float f;
  if (exp == 0) {
    f = float(man) * 0x1p-24f;
  } else {
    const uint32_t u = (exp == 31 ? 0xffu : exp + 112) << 23 | man << 13;
    memcpy(&f, &u, 4);
  }
  return h & 0x8000 ? -f : f;
}

// To nearest, ties to even.
static inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline uint16_t float_to_half(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (a >= 0x38800000) return uint16_t(sign | (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13);
  float v;
  memcpy(&v, &a, 4);
  v += 0.5f;  // a subnormal half: the sum is rounded at 2^-24, which is its unit
  memcpy(&u, &v, 4);
  return uint16_t(sign | (u & 0xffff));
}

// A table of 16 fp16 values as int8 in units of its largest magnitude / 127 (formats.h, integer activations).
struct ByteTable {
  int8_t values[16];
  float unit;
};
static inline ByteTable byte_table(const uint8_t* halves) {
  ByteTable t{};
  float v[16], most = 0.0f;
  for (int i = 0; i < 16; i++) {
    v[i] = half_to_float(load_u16(halves + 2 * i));
    most = v[i] != v[i] ? v[i] : std::fabs(v[i]) > most ? std::fabs(v[i]) : most;  // keeps a NaN: no number is larger than it
  }
  t.unit = most / 127.0f;
  const bool usable = most > 0.0f && std::isfinite(most);  // else the unit alone, 0, infinite or NaN, says all
  for (int i = 0; i < 16 && usable; i++) t.values[i] = int8_t(std::nearbyint(v[i] * (127.0f / most)));
  return t;
}

}  // namespace mxq
