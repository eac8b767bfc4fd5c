// The C++ bodies of ptx.cuh that need more than a line: 16-bit floats, matrix products, ldmatrix, cp.async.
#pragma once

#include "simt_machine.hpp"

namespace simt {

// ------------------------------------------------------------------------------------------------------------------ 16-bit floats

// A float of 1 sign bit, EXPONENT bits and MANTISSA bits, as its 16-bit pattern; a NaN that is made is 0x7fff, as on a device.
template <int EXPONENT, int MANTISSA>
struct Small {
  static constexpr int LEAST = 2 - (1 << (EXPONENT - 1));  // exponent of the smallest normal number
  static double read(uint32_t h) {
    const uint64_t sign = static_cast<uint64_t>(h >> 15 & 1) << 63, exponent = h >> MANTISSA & ((1u << EXPONENT) - 1), man = h & ((1u << MANTISSA) - 1);
    uint64_t u;
    double d;
    if (exponent == 0) {
      d = static_cast<double>(man) * power(LEAST - MANTISSA);
      return sign ? -d : d;
    }
    u = sign | (exponent == (1u << EXPONENT) - 1 ? 0x7ffull : exponent + 1022 + LEAST) << 52 | man << (52 - MANTISSA);
    memcpy(&d, &u, 8);
    return d;
  }
  // One rounding, to nearest, ties to even.
  static uint16_t round(double d) {
    uint64_t u;
    memcpy(&u, &d, 8);
    const uint32_t sign = static_cast<uint32_t>(u >> 48) & 0x8000;
    const uint64_t a = u & ~(1ull << 63);
    constexpr uint32_t INF = ((1u << EXPONENT) - 1) << MANTISSA;
    constexpr int DROP = 52 - MANTISSA;
    if (a > 0x7ffull << 52) return 0x7fff;
    if (a < static_cast<uint64_t>(1023 + LEAST) << 52) {  // subnormal: the adder rounds at its unit
      double v;
      memcpy(&v, &a, 8);
      v += power(LEAST - MANTISSA + 52);
      memcpy(&u, &v, 8);
      return static_cast<uint16_t>(sign | (u & 0xffff));
    }
    const uint64_t r = ((a - (static_cast<uint64_t>(1022 + LEAST) << 52)) + ((1ull << (DROP - 1)) - 1) + (a >> DROP & 1)) >> DROP;
    return static_cast<uint16_t>(sign | (r >= INF ? INF : static_cast<uint32_t>(r)));
  }

 private:
  static double power(int e) {
    const uint64_t u = static_cast<uint64_t>(1023 + e) << 52;
    double d;
    memcpy(&d, &u, 8);
    return d;
  }
};
using Half = Small<5, 10>;
using Bf16 = Small<8, 7>;

// x + y as a double that rounds on to a shorter type as the exact sum would: its last bit is set where something was lost.
inline double add_to_odd(double x, double y) {
  const double s = x + y;
  if (!isfinite(s)) return s;
  const double back = s - x, lost = (x - (s - back)) + (y - back);
  uint64_t u;
  memcpy(&u, &s, 8);
  if (lost == 0 || (u & 1)) return s;
  u += (lost > 0) == (s > 0) ? 1 : -1;  // towards what was lost; s is not 0, or nothing would be
  double odd;
  memcpy(&odd, &u, 8);
  return odd;
}

template <class T>
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [](uint32_t x, uint32_t y, uint32_t z) { return T::round(add_to_odd(T::read(x) * T::read(y), T::read(z))); };  // the product is exact
  return one(a & 0xffff, b & 0xffff, c & 0xffff) | static_cast<uint32_t>(one(a >> 16, b >> 16, c >> 16)) << 16;
}
template <class T>
inline uint32_t add2(uint32_t a, uint32_t b) {
  const auto one = [](uint32_t x, uint32_t y) { return T::round(add_to_odd(T::read(x), T::read(y))); };
  return one(a & 0xffff, b & 0xffff) | static_cast<uint32_t>(one(a >> 16, b >> 16)) << 16;
}
template <class T>
inline uint32_t mul2(uint32_t a, uint32_t b) {
  const auto one = [](uint32_t x, uint32_t y) { return T::round(T::read(x) * T::read(y)); };
  return one(a & 0xffff, b & 0xffff) | static_cast<uint32_t>(one(a >> 16, b >> 16)) << 16;
}

inline double half_of_word(uint32_t w, int i) { return Half::read(w >> (16 * i) & 0xffff); }
inline double bf16_of_word(uint32_t w, int i) { return Bf16::read(w >> (16 * i) & 0xffff); }
inline int64_t byte_of_word(uint32_t w, int i) { return static_cast<int8_t>(w >> (8 * i) & 0xff); }

// ------------------------------------------------------------------------------------------------------------------ matrix products

// [16, K] by [K, 8] with A words of `a` and B words of `b` in a lane, PER elements in a word; the layout is drawn in ptx.cuh.
template <int A, int PER, int B, class Sum, class T, class Element>
inline void mma(const char* what, T (&d)[4], const uint32_t (&a)[A], const uint32_t (&b)[B], const T (&c)[4], Site site, Element element) {
  constexpr int K = 4 * PER * B;
  struct In {
    uint32_t a[A], b[B];
    T c[4];
  } in;
  struct Out {
    T d[4];
  } out;
  memcpy(in.a, a, sizeof a);
  memcpy(in.b, b, sizeof b);
  memcpy(in.c, c, sizeof c);
  collective(0xffffffffu, what, site, in, out, [&](auto lanes) {
    Sum left[16][K], right[K][8];
    for (int lane = 0; lane < 32; lane++) {
      const In& x = lanes.in(lane);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < A; i++)
        for (int j = 0; j < PER; j++) left[g + 8 * (i % 2)][PER * t + 4 * PER * (i / 2) + j] = static_cast<Sum>(element(x.a[i], j));
      for (int i = 0; i < B; i++)
        for (int j = 0; j < PER; j++) right[PER * t + 4 * PER * i + j][g] = static_cast<Sum>(element(x.b[i], j));
    }
    Sum sum[16][8];
    for (int row = 0; row < 16; row++) {
      for (int n = 0; n < 8; n++) sum[row][n] = static_cast<Sum>(lanes.in(4 * (row % 8) + n / 2).c[2 * (row / 8) + n % 2]);
      for (int k = 0; k < K; k++)
        for (int n = 0; n < 8; n++) sum[row][n] += left[row][k] * right[k][n];
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) lanes.out(lane).d[i] = static_cast<T>(sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
    count(&Stats::mma);
  });
  memcpy(d, out.d, sizeof d);
}

// ------------------------------------------------------------------------------------------------------------------ memory

template <int N, bool TRANS>
inline void ldmatrix(const char* what, uint32_t (&d)[N], const void* row, Site site) {
  struct Rows {
    const unsigned char* p[N][2];
  } rows;
  if (self->lane < 8 * N) check_shared(row, 16, 16, what, site);
  const unsigned char* mine = static_cast<const unsigned char*>(row);
  collective(0xffffffffu, what, site, mine, rows, [&](auto lanes) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < N; i++)
        for (int j = 0; j < 2; j++)
          lanes.out(lane).p[i][j] = TRANS ? lanes.in(8 * i + 2 * (lane % 4) + j) + 2 * (lane / 4) : lanes.in(8 * i + lane / 4) + 4 * (lane % 4) + 2 * j;
    for (int i = 0; i < N; i++) {
      uintptr_t phase[8];
      for (int r = 0; r < 8; r++) phase[r] = reinterpret_cast<uintptr_t>(lanes.in(8 * i + r));
      count_conflicts(phase, 8);
    }
  });
  // Each lane fetches its own elements, and later than the others if the schedule wants: the instruction promises no order.
  for (int i = 0; i < N; i++) {
    uint16_t lo, hi;
    memcpy(&lo, rows.p[i][0], 2);
    memcpy(&hi, rows.p[i][1], 2);
    d[i] = lo | static_cast<uint32_t>(hi) << 16;
  }
}

inline void land(const Copy& c) {
  if (c.take) memcpy(c.to, c.from, static_cast<size_t>(c.take));
  memset(static_cast<char*>(c.to) + c.take, 0, static_cast<size_t>(c.bytes - c.take));
}

inline void cp_async(const char* what, void* to, const void* from, int bytes, int take, Site site) {
  count(&Stats::cp_async);
  check_shared(to, static_cast<size_t>(bytes), static_cast<size_t>(bytes), what, site);
  if (take < 0 || take > bytes) fail(site, "%s: %d bytes to take of %d", what, take, bytes);
  if (take) check_global(from, static_cast<size_t>(bytes), what, site);
  const Copy copy{to, from, bytes, take};
  if (!options().lazy) {
    land(copy);
    return;
  }
  // The bytes land in the wait, the latest moment allowed; until then nobody may count on anything, the old contents included.
  const volatile char* source = static_cast<const char*>(from);
  if (take) (void)source[0], (void)source[take - 1];  // a source out of bounds is reported here, not in the wait
  memset(to, 0xff, static_cast<size_t>(bytes));
  push_copy(copy);
}

inline void cp_async_wait(int young) {
  Copy copy;
  while (pop_copy(young, copy)) land(copy);
}

template <class T>
inline T ld_global(const char* what, const void* p, Site site) {
  check_global(p, sizeof(T), what, site);
  return *static_cast<const T*>(p);
}

}  // namespace simt
