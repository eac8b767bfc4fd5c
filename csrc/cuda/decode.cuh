// Words of a tile -> operand A of m16n8k16, in registers, exactly: fp16 integers q - z for uniform formats, table values for the others.
// The places of the codes are drawn in csrc/cuda_layout.h; step s of a tile is 16 columns, a[0..3] its four registers.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace mxq::cuda {

__device__ constexpr unsigned twice(unsigned half) { return half << 16 | half; }

// Uniform codes. OR-ing 0x6400 over a field at bit p gives 1024 + q * 2^p; times 2^-p, minus (1024 / 2^p + z): each step is exact in fp16.
// Row g and row g + 8 have zero points of their own, so an integer zero point costs nothing per weight.
template <int BITS>
struct Uniform {
  static constexpr int bits = BITS, tiles = super_tiles(BITS);
  static constexpr bool scaled = true, zeroed = true, tabled = false;
  static __device__ bool reads(const PieceView& p) { return p.kind == UNIFORM && p.bits == BITS; }
  unsigned low[2], high[2];  // -(1024 / 2^p + z), both halves alike, of rows g, g + 8; `high` for the fields with the larger p

  __device__ void load(const PieceView&, uint64_t, int) {}

  static constexpr int shift(bool second_row, bool larger) {
    if (BITS == 2) return (second_row ? 2 : 0) + (larger ? 4 : 0);
    if (BITS == 3) return larger ? 6 : second_row ? 3 : 0;
    if (BITS == 4) return second_row ? 4 : 0;
    if (BITS == 5) return second_row ? 5 : 0;
    if (BITS == 6) return second_row || larger ? 4 : 0;
    return 0;
  }
  // Halves 2^-p and -1024 / 2^p.
  static constexpr unsigned inverse(int p) { return twice(unsigned(15 - p) << 10); }
  static constexpr unsigned minus_magic(int p) { return twice(0x8000u | unsigned(25 - p) << 10); }

  __device__ void set_zero(unsigned row_g, unsigned row_g8) {  // zero points as half2, both halves alike
    if (BITS == 1) return;  // 0 always: zeros of 1 bit are floats
    constexpr unsigned minus_one = twice(0xbc00);
    low[0] = ptx::hfma2(row_g, minus_one, minus_magic(shift(false, false)));
    low[1] = ptx::hfma2(row_g8, minus_one, minus_magic(shift(true, false)));
    if (BITS == 2 || BITS == 3 || BITS == 6) {
      high[0] = ptx::hfma2(row_g, minus_one, minus_magic(shift(false, true)));
      high[1] = ptx::hfma2(row_g8, minus_one, minus_magic(shift(true, true)));
    }
  }

  // The field at bit P (of `w` after any shift) of row g (R = 0) or g + 8.
  template <int P>
  static __device__ unsigned field(unsigned w) {
    return ptx::lop3<0xea>(w, twice(((1u << BITS) - 1) << P), twice(0x6400));  // (w & mask) | magic
  }
  template <int P>
  static __device__ unsigned exact(unsigned field, unsigned constant) {
    return P ? ptx::hfma2(field, inverse(P), constant) : ptx::hadd2(field, constant);
  }

  // A code of 1 bit at bit 10 + I: alone in the exponent of a half it is 2^(2^I - 15), and a product makes that 1. Behind an OR with 0x6400 each of eight p
  // would need its own constant in a register.
  template <int I>
  static __device__ unsigned bit(unsigned w) {
    return ptx::hmul2(w & twice(1u << (10 + I)), inverse((1 << I) - 15));
  }

  // Codes without their zero point: a field at bit p and nothing else is the subnormal half q * 2^(p - 24), exact and without any arithmetic.
  // What p is depends on the row, and for some widths on the step: those of `other` steps have their own sums.
  static constexpr bool others = BITS == 2 || BITS == 3 || BITS == 6;
  static constexpr bool other(int step) { return BITS == 2 ? step % 2 == 1 : others && step == 3; }
  static constexpr int place(bool second_row, bool other) { return BITS == 1 ? int(second_row) : shift(second_row, other); }

  template <int P>
  static __device__ unsigned only(unsigned w) {
    return w & twice(((1u << BITS) - 1) << P);
  }
  // Bits that the other words have left at their bit 15, brought to bit P and above.
  static __device__ unsigned gathered(const unsigned* w, int p) {
    unsigned last = 0;
    for (int b = 0; b < BITS; b++) last |= w[b] >> (15 - p - b) & twice(1u << (p + b));
    return last;
  }

  template <int S>
  __device__ void raw_step(const unsigned* w, unsigned (&a)[4]) const {
    if constexpr (BITS == 1) {
      const unsigned v = w[0] >> 4 * S, u = v >> 2;
      a[0] = only<0>(v), a[1] = only<1>(v), a[2] = only<0>(u), a[3] = only<1>(u);
    } else if constexpr (BITS == 2) {
      constexpr int p = S % 2 * 4;
      const unsigned v = S < 2 ? w[0] : w[0] >> 8, u = S < 2 ? w[1] : w[1] >> 8;
      a[0] = only<p>(v), a[1] = only<p + 2>(v), a[2] = only<p>(u), a[3] = only<p + 2>(u);
    } else if constexpr (BITS == 3 && S == 3) {
      a[0] = only<6>(w[0]), a[1] = only<6>(w[1]), a[2] = only<6>(w[2]), a[3] = gathered(w, 6);
    } else if constexpr (BITS == 3 || BITS == 4) {
      const unsigned v = w[S], u = v >> (BITS == 3 ? 9 : 8);
      a[0] = only<0>(v), a[1] = only<BITS>(v), a[2] = only<0>(u), a[3] = only<BITS>(u);
    } else if constexpr (BITS == 5) {
      a[0] = only<0>(w[S]), a[1] = only<5>(w[S]), a[2] = only<0>(w[S] >> 10);
      a[3] = S == 3 ? gathered(w, 5) : only<5>(S == 0 ? w[4] << 5 : S == 1 ? w[4] : w[4] >> 5);
    } else if constexpr (BITS == 6 && S < 3) {
      const unsigned v = w[2 * S], u = w[2 * S + 1];
      a[0] = only<0>(v), a[1] = only<4>(v >> 6), a[2] = only<0>(u), a[3] = only<4>(u >> 6);
    } else if constexpr (BITS == 6) {
      const auto join = [](unsigned upper, unsigned lower) { return (upper & twice(15u << 6)) | (lower & twice(3u << 4)); };
      a[0] = join(w[0], w[4] >> 2), a[1] = join(w[1], w[4] >> 4), a[2] = join(w[2], w[5] >> 2), a[3] = join(w[3], w[5] >> 4);
    } else {
      const unsigned v = w[2 * S], u = w[2 * S + 1];
      a[0] = ptx::prmt(v, 0, 0x4240), a[1] = ptx::prmt(v, 0, 0x4341), a[2] = ptx::prmt(u, 0, 0x4240), a[3] = ptx::prmt(u, 0, 0x4341);
    }
  }

  template <int S>
  __device__ void step(const unsigned* w, unsigned (&a)[4]) const {
    if constexpr (BITS == 1) {
      const unsigned v = S == 3 ? w[0] >> 2 : w[0] << (S == 3 ? 0 : 10 - 4 * S);
      a[0] = bit<0>(v), a[1] = bit<1>(v), a[2] = bit<2>(v), a[3] = bit<3>(v);
    } else if constexpr (BITS == 4) {
      const unsigned v = w[S], u = v >> 8;
      a[0] = exact<0>(field<0>(v), low[0]), a[1] = exact<4>(field<4>(v), low[1]);
      a[2] = exact<0>(field<0>(u), low[0]), a[3] = exact<4>(field<4>(u), low[1]);
    } else if constexpr (BITS == 2) {
      constexpr int p = S % 2 * 4;
      const unsigned* c = S % 2 ? high : low;
      const unsigned v = S < 2 ? w[0] : w[0] >> 8, u = S < 2 ? w[1] : w[1] >> 8;
      a[0] = exact<p>(field<p>(v), c[0]), a[1] = exact<p + 2>(field<p + 2>(v), c[1]);
      a[2] = exact<p>(field<p>(u), c[0]), a[3] = exact<p + 2>(field<p + 2>(u), c[1]);
    } else if constexpr (BITS == 3 && S < 3) {
      const unsigned v = w[S], u = v >> 9;
      a[0] = exact<0>(field<0>(v), low[0]), a[1] = exact<3>(field<3>(v), low[1]);
      a[2] = exact<0>(field<0>(u), low[0]), a[3] = exact<3>(field<3>(u), low[1]);
    } else if constexpr (BITS == 3) {
      const unsigned last = (w[0] >> 9 & twice(1u << 6)) | (w[1] >> 8 & twice(1u << 7)) | (w[2] >> 7 & twice(1u << 8));
      a[0] = exact<6>(field<6>(w[0]), high[0]), a[1] = exact<6>(field<6>(w[1]), high[1]);
      a[2] = exact<6>(field<6>(w[2]), high[0]), a[3] = exact<6>(last | twice(0x6400), high[1]);
    } else if constexpr (BITS == 5) {
      a[0] = exact<0>(field<0>(w[S]), low[0]), a[1] = exact<5>(field<5>(w[S]), low[1]), a[2] = exact<0>(field<0>(w[S] >> 10), low[0]);
      if constexpr (S < 3) {
        a[3] = exact<5>(field<5>(S == 0 ? w[4] << 5 : S == 1 ? w[4] : w[4] >> 5), low[1]);
      } else {
        const unsigned last = (w[0] >> 10 & twice(1u << 5)) | (w[1] >> 9 & twice(1u << 6)) | (w[2] >> 8 & twice(1u << 7)) | (w[3] >> 7 & twice(1u << 8)) |
                              (w[4] >> 6 & twice(1u << 9));
        a[3] = exact<5>(last | twice(0x6400), low[1]);
      }
    } else if constexpr (BITS == 6 && S < 3) {
      const unsigned v = w[2 * S], u = w[2 * S + 1];
      a[0] = exact<0>(field<0>(v), low[0]), a[1] = exact<4>(field<4>(v >> 6), low[1]);
      a[2] = exact<0>(field<0>(u), low[0]), a[3] = exact<4>(field<4>(u >> 6), low[1]);
    } else if constexpr (BITS == 6) {
      const auto join = [](unsigned upper, unsigned lower) {  // four bits at 6 of one word, two at 4 of another: a field at bit 4
        return ptx::lop3<0xea>(upper, twice(15u << 6), ptx::lop3<0xea>(lower, twice(3u << 4), twice(0x6400)));
      };
      a[0] = exact<4>(join(w[0], w[4] >> 2), high[0]), a[1] = exact<4>(join(w[1], w[4] >> 4), high[1]);
      a[2] = exact<4>(join(w[2], w[5] >> 2), high[0]), a[3] = exact<4>(join(w[3], w[5] >> 4), high[1]);
    } else {
      const unsigned v = w[2 * S], u = w[2 * S + 1], magic = 0x64646464u;
      a[0] = ptx::hadd2(ptx::prmt(v, magic, 0x4240), low[0]), a[1] = ptx::hadd2(ptx::prmt(v, magic, 0x4341), low[1]);
      a[2] = ptx::hadd2(ptx::prmt(u, magic, 0x4240), low[0]), a[3] = ptx::hadd2(ptx::prmt(u, magic, 0x4341), low[1]);
    }
  }
};

// NF4 levels as halves: the kernels on tensor cores multiply these, the dequant and scalar kernels the levels themselves.
// A level is off by at most 2^-12 of itself, as any weight is that is rounded to fp16.
__device__ constexpr unsigned NF4_HALVES[8] = {0xb992bc00, 0xb652b833, 0xb1eab48d, 0x0000add4, 0x31262d18, 0x356833e0, 0x3880370d, 0x3c0039c9};

// Codes that select from a table of 2^bits halves, one table per row (lut) or one for all (nf4). A look-up is a byte permutation of registers.
template <int BITS, bool LEVELS>
struct Table {
  static constexpr int bits = BITS, tiles = 4, words = (1 << BITS) / 2;
  static constexpr bool scaled = LEVELS, zeroed = false, tabled = !LEVELS, others = false;
  static constexpr bool other(int) { return false; }
  static __device__ bool reads(const PieceView& p) { return p.kind == (LEVELS ? NF : LUT) && p.bits == BITS; }
  unsigned t[2][words];  // rows g, g + 8. 2 bits: the halves; 3, 4 bits: low bytes of all halves, then high bytes

  __device__ void load(const PieceView& p, uint64_t block, int lane) {
    if constexpr (LEVELS) {
      for (int r = 0; r < 2; r++) set_row(r, [](int i) { return NF4_HALVES[i]; });
    } else {
      const uint32_t* table = reinterpret_cast<const uint32_t*>(p.scales + block * p.scale_step);
      for (int r = 0; r < 2; r++) set_row(r, [&](int i) { return __ldg(table + (lane / 4 + 8 * r) * words + i); });
    }
  }
  // From the tables of a row block in shared memory.
  __device__ void set_tables(const uint32_t* tables, int lane) {
    for (int r = 0; r < 2; r++) set_row(r, [&](int i) { return tables[(lane / 4 + 8 * r) * words + i]; });
  }
  // pair(i): halves 2i and 2i + 1 of a row's table.
  template <class F>
  __device__ void set_row(int r, F&& pair) {
    unsigned h[words];
    for (int i = 0; i < words; i++) h[i] = pair(i);
    for (int i = 0; i < words; i++) {
      if (BITS == 2) t[r][i] = h[i];
      else t[r][i] = ptx::prmt(h[i % (words / 2) * 2], h[i % (words / 2) * 2 + 1], i < words / 2 ? 0x6420 : 0x7531);
    }
  }
  __device__ void set_zero(unsigned, unsigned) {}

  // Four table bytes of one plane, chosen by the nibbles of `sel`.
  static __device__ unsigned plane(const unsigned* bytes, unsigned sel, unsigned upper) {
    if constexpr (BITS == 3) return ptx::prmt(bytes[0], bytes[1], sel);
    else return ptx::prmt(ptx::prmt(bytes[0], bytes[1], sel), ptx::prmt(bytes[2], bytes[3], sel), upper);
  }
  // The quad of row R whose selectors are the low 16 bits.
  template <int R>
  __device__ void quad(unsigned sel, unsigned upper, unsigned (&a)[4]) const {
    if constexpr (BITS == 2) {
      a[R] = ptx::prmt(t[R][0], t[R][1], sel), a[R + 2] = ptx::prmt(t[R][0], t[R][1], sel >> 16);
    } else {
      const unsigned lo = plane(t[R], sel, upper), hi = plane(t[R] + words / 2, sel, upper);
      a[R] = ptx::prmt(lo, hi, 0x5140), a[R + 2] = ptx::prmt(lo, hi, 0x7362);
    }
  }

  template <int S>
  __device__ void step(const unsigned* w, unsigned (&a)[4]) const {
    if constexpr (BITS == 2) {  // a code q becomes the nibbles 2q, 2q + 1: the bytes of its half
      const unsigned v = w[S / 2] >> 4 * (S % 2);
      quad<0>((v & 0x03030303u) * 0x22u + 0x10101010u, 0, a);
      quad<1>((v >> 2 & 0x03030303u) * 0x22u + 0x10101010u, 0, a);
    } else if constexpr (BITS == 3) {
      const unsigned top = S < 2 ? w[2] << (2 - S) : w[2] >> (S - 2);
      const unsigned sel = (w[S / 2] >> 2 * (S % 2) & 0x33333333u) | (top & 0x44444444u);
      quad<0>(sel, 0, a), quad<1>(sel >> 16, 0, a);
    } else {
      const unsigned sel = w[S] & 0x77777777u, upper = (w[S] >> 1 & 0x44444444u) | 0x32103210u;
      quad<0>(sel, upper, a), quad<1>(sel >> 16, upper >> 16, a);
    }
  }
};

// fp16 values are stored as fragments.
struct Half {
  static constexpr int bits = 16, tiles = 1;
  static constexpr bool scaled = false, zeroed = false, tabled = false, others = false;
  static constexpr bool other(int) { return false; }
  static __device__ bool reads(const PieceView& p) { return p.kind == FLOAT; }
  __device__ void load(const PieceView&, uint64_t, int) {}
  __device__ void set_zero(unsigned, unsigned) {}
  template <int S>
  __device__ void step(const unsigned* w, unsigned (&a)[4]) const {
    for (int i = 0; i < 4; i++) a[i] = w[4 * S + i];
  }
};

}  // namespace mxq::cuda
