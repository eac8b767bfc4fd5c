// Operand A of attention's products, in registers, exactly: 16 rows (a tile) by 32 columns (a stripe) of a packed page, or of keys and values in floating
// point.
//
// Lane 4 * g + t owns rows 2g and 2g + 1 of the tile and columns 8t .. 8t + 7 of the stripe: two of the page's quads, and two products m16n8k16. Which row
// of the page is which row of the product, and which column which, is ours to choose, so a lane's codes are words that the layout has side by side (rows 2g
// and 2g + 1 are 8 bytes), and nothing is exchanged. A quad's columns go by pairs (0, 2) and (1, 3), which are bytes 0, 2 and 1, 3 of its word.
#pragma once

#include "attention.h"
#include "ptx.cuh"

namespace mxq::cuda {

// What a lane reads. STAGED: from its warp's copy in shared memory, otherwise from global memory.
template <bool STAGED>
__device__ __forceinline__ uint32_t read_4(const void* p) {
  if constexpr (STAGED) return *static_cast<const uint32_t*>(p);
  else return ptx::ld_global_nc_4(p);
}
template <bool STAGED>
__device__ __forceinline__ uint2 read_8(const void* p) {
  if constexpr (STAGED) return *static_cast<const uint2*>(p);
  else return ptx::ld_global_nc_8(p);
}
template <bool STAGED>
__device__ __forceinline__ uint4 read_16(const void* p) {
  if constexpr (STAGED) return *static_cast<const uint4*>(p);
  else return ptx::ld_global_nc_16(p);
}

// a[u]: quad 2t + u, in the registers of one product: row 2g columns (0, 2), row 2g + 1 the same, row 2g columns (1, 3), row 2g + 1 the same.
struct Tile {
  uint32_t a[2][4];
};

__device__ constexpr uint32_t both(uint32_t half) { return half << 16 | half; }

// Two codes of `BITS` bits at bits P and P + 16 of a word -> fp16 numbers -2^(BITS-1) .. 2^(BITS-1) - 1. The XOR gives 1024 + (code + 2^(BITS-1)) * 2^P.
template <int BITS, int P>
__device__ __forceinline__ uint32_t two_codes(uint32_t word) {
  constexpr uint32_t CENTRE = 1u << (BITS - 1 + P);
  const uint32_t raised = ptx::lop3<0x6a>(word, both(((1u << BITS) - 1) << P), both(0x6400u | CENTRE));  // (a & b) ^ c
  if (P == 0) return ptx::hsub2(raised, both(0x6400u | CENTRE));
  return ptx::hfma2(raised, both(uint32_t(15 - P) << 10), both(0x8000u | uint32_t(25 - P) << 10 | CENTRE));  // times 2^-P, minus 1024 / 2^P and the centre
}

// In a warp's copy of a page, groups of 32 bytes change places within 128: byte `at` of the codes is at `at ^ staged_turn(bits, at)`. The lanes of a load then
// meet no bank twice.
__device__ __forceinline__ constexpr int staged_turn(int bits, int at) {
  return bits == 16 ? at >> 3 & 0x60 : bits == 8 ? at >> 2 & 0x60 : bits == 4 ? at >> 2 & 0x20 : 0;
}

// The codes of a lane as they are loaded, apart from the decoding so that several tiles are under way at once.
// `at`: where the page's stripe begins, 64 * BITS bytes of which belong to this tile.
template <int BITS>
struct Codes {
  static constexpr int WORDS = BITS == 3 ? 3 : BITS == 8 ? 2 : 1;
  uint2 w[WORDS];  // x: row 2g, y: row 2g + 1

  template <bool STAGED>
  __device__ __forceinline__ void load(const uint8_t* codes, int at, int lane, bool) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      const int word = BITS == 2 ? t / 2 : BITS == 3 ? i : BITS == 4 ? t : 2 * t + i;
      const int here = 64 * word + 8 * g;  // `at` has no part in the turn
      w[i] = read_8<STAGED>(codes + at + (STAGED ? here ^ staged_turn(BITS, here) : here));
    }
  }

  // Quad 2t from bit 0 and quad 2t + 1 from bit BITS of each byte; 8 bits: a quad is a word.
  static __device__ __forceinline__ uint32_t quads(uint32_t w0, uint32_t w1, uint32_t w2, int t) {
    if (BITS == 2) return w0 >> 4 * (t % 2);
    if (BITS == 4) return w0;
    // 3 bits: quads 6 and 7 are in what the others leave of the three words.
    const uint32_t last = (w0 >> 6 & 0x03030303u) | (w1 >> 4 & 0x04040404u) | (w2 >> 3 & 0x18181818u) | (w1 >> 2 & 0x20202020u);
    return t == 0 ? w0 : t == 1 ? w1 : t == 2 ? w2 : last;
  }

  __device__ __forceinline__ void decode(Tile& tile, int lane) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const auto row = [&](int i) { return r ? w[i].y : w[i].x; };
      if constexpr (BITS == 8) {
#pragma unroll
        for (int u = 0; u < 2; u++) {
          tile.a[u][r] = two_codes<8, 0>(row(u));
          tile.a[u][2 + r] = two_codes<8, 0>(row(u) >> 8);
        }
      } else {
        const uint32_t both_quads = quads(row(0), row(BITS == 3 ? 1 : 0), row(BITS == 3 ? 2 : 0), lane % 4);
        tile.a[0][r] = two_codes<BITS, 0>(both_quads), tile.a[0][2 + r] = two_codes<BITS, 0>(both_quads >> 8);
        tile.a[1][r] = two_codes<BITS, BITS>(both_quads), tile.a[1][2 + r] = two_codes<BITS, BITS>(both_quads >> 8);
      }
    }
  }
};

// Words that hold rows 2g and 2g + 1 of one column each -> the tile.
__device__ __forceinline__ void tile_of_columns(const uint32_t (&c)[8], Tile& tile) {
#pragma unroll
  for (int u = 0; u < 2; u++) {
    tile.a[u][0] = ptx::prmt(c[4 * u], c[4 * u + 2], 0x5410), tile.a[u][1] = ptx::prmt(c[4 * u], c[4 * u + 2], 0x7632);
    tile.a[u][2] = ptx::prmt(c[4 * u + 1], c[4 * u + 3], 0x5410), tile.a[u][3] = ptx::prmt(c[4 * u + 1], c[4 * u + 3], 0x7632);
  }
}

// fp16 numbers, 32 bytes a column. `inside`: whether the lane's columns are there at all, since 16-bit pages are not padded.
template <>
struct Codes<16> {
  uint32_t c[8];

  template <bool STAGED>
  __device__ __forceinline__ void load(const uint8_t* codes, int at, int lane, bool inside) {
    at += 256 * (lane % 4);
    const int turn = STAGED ? staged_turn(16, at) : 0;
#pragma unroll
    for (int i = 0; i < 8; i++) c[i] = inside ? read_4<STAGED>(codes + at + (32 * i ^ turn) + 4 * (lane / 4)) : 0;
  }
  __device__ __forceinline__ void decode(Tile& tile, int) const { tile_of_columns(c, tile); }
};

// ------------------------------------------------------------------------------------------------------------------ numbers as operand B

// Operand B of the two products of a stripe: column g of the product is row g / 2 of the vectors, its leading half for even g and what that rounds off for
// odd g. So 8 columns hold 4 rows to 22 bits, and lane 4 * g + t of the result has both parts of row t.
struct Vectors {
  uint32_t b[2][2];
};
__device__ __forceinline__ Vectors vectors_of(const float (&x)[8], int lane) {
  Vectors v;
  const uint32_t rest = lane / 4 % 2 ? 0xffffffffu : 0;
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float first = x[4 * u + i], second = x[4 * u + i + 2];
      const float2 f = ptx::half2_to_floats(ptx::floats_to_half2(first, second) & rest);
      v.b[u][i] = ptx::floats_to_half2(first - f.x, second - f.y);
    }
  return v;
}

__device__ __forceinline__ void load8(const float* p, float (&x)[8]) {  // 16-byte aligned
  const float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// ------------------------------------------------------------------------------------------------------------------ keys and values in floating point

// 2^exponent, for exponents of normal numbers.
__device__ __forceinline__ float power_of_2(int exponent) { return __uint_as_float(uint32_t(exponent + 127) << 23); }

// The exponent of the power of two that brings a float32 number, given by its bits, into [2^13, 2^14) where that is not out of range.
__device__ __forceinline__ int raise_to_2_14(uint32_t bits) { return min(max(140 - int(bits >> 23), -126), 126); }

// Tokens in floating point: n rows of D numbers, at most 16, `stride` bytes apart, all aligned to 16 bytes; in shared memory those from 8 on are moved by
// TOKEN_SHIFT bytes, so that the lanes of a load of values meet no bank twice. They become fp16 times `factor`; of float32 a second tile has what that rounds
// off. fp16 numbers go as they are.
template <int TYPE, bool STAGED>
struct Tokens {
  static constexpr int SIZE = TYPE == F32 ? 4 : 2, PARTS = TYPE == F32 ? 2 : 1;
  const uint8_t* data;
  int64_t stride;
  int n;
  float factor, undo;  // its inverse

  __device__ __forceinline__ const uint8_t* at(int token) const { return data + token * stride + (STAGED ? token / 8 * TOKEN_SHIFT : 0); }

  __device__ __forceinline__ void round(float x, float y, uint32_t& h, uint32_t& rest) const {
    x *= factor, y *= factor;
    h = ptx::floats_to_half2(x, y);
    if (TYPE != F32) return;
    const float2 f = ptx::half2_to_floats(h);
    rest = ptx::floats_to_half2(x - f.x, y - f.y);
  }

  // The tile of keys: its rows are tokens, the stripe's columns channels. `inside`: whether the lane's channels, from `channel` on, are there at all.
  __device__ __forceinline__ void keys(int channel, bool inside, int lane, Tile (&to)[PARTS]) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int token = 2 * (lane / 4) + r;
      uint32_t h[4] = {}, rest[4] = {};
      if (inside && token < n) {
        const uint8_t* p = at(token) + channel * SIZE;
        const uint4 v = read_16<STAGED>(p);
        const uint32_t w[4] = {v.x, v.y, v.z, v.w};
        if constexpr (TYPE == F32) {
          const uint4 next = read_16<STAGED>(p + 16);
          const uint32_t more[4] = {next.x, next.y, next.z, next.w};
#pragma unroll
          for (int i = 0; i < 2; i++) {
            round(__uint_as_float(w[2 * i]), __uint_as_float(w[2 * i + 1]), h[i], rest[i]);
            round(__uint_as_float(more[2 * i]), __uint_as_float(more[2 * i + 1]), h[2 + i], rest[2 + i]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float2 f = ptx::bf162_to_floats(w[i]);
            if (TYPE == BF16) round(f.x, f.y, h[i], rest[i]);
            else h[i] = w[i];
          }
        }
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const uint32_t(&w)[4] = part ? rest : h;
#pragma unroll
        for (int u = 0; u < 2; u++)
          to[part].a[u][r] = ptx::prmt(w[2 * u], w[2 * u + 1], 0x5410), to[part].a[u][2 + r] = ptx::prmt(w[2 * u], w[2 * u + 1], 0x7632);
      }
    }
  }

  // Tile `tile` of values: its rows are channels, the stripe's columns tokens.
  __device__ __forceinline__ void values(int tile, int lane, Tile (&to)[PARTS]) const {
    const int token = 8 * (lane % 4);
    const uint8_t* p = at(token) + (16 * tile + 2 * (lane / 4)) * SIZE;
    uint32_t h[8] = {}, rest[8] = {};
#pragma unroll
    for (int i = 0; i < 8; i++, p += stride) {
      if (token + i >= n) continue;
      if constexpr (TYPE == F32) {
        const uint2 w = read_8<STAGED>(p);
        round(__uint_as_float(w.x), __uint_as_float(w.y), h[i], rest[i]);
      } else {
        h[i] = read_4<STAGED>(p);
        const float2 f = ptx::bf162_to_floats(h[i]);
        if (TYPE == BF16) round(f.x, f.y, h[i], rest[i]);
      }
    }
    tile_of_columns(h, to[0]);
    if constexpr (PARTS == 2) tile_of_columns(rest, to[1]);
  }

  // Sets the power of two that brings the largest finite number near 2^14: bfloat16 becomes fp16 exactly down to 2^-31 of it, float32 in two parts.
  __device__ __forceinline__ void scale(int head, int lane) {
    factor = undo = 1.0f;
    if (TYPE == F16) return;
    const int row = head * SIZE / 16;  // loads
    uint32_t most = 0;
    for (int first = 0; first < n * row; first += WARP) {  // as often for all lanes: they meet behind it
      const int i = min(first + lane, n * row - 1);
      const uint4 v = read_16<STAGED>(at(i / row) + i % row * 16);
      const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        // Of two bfloat16 in a word, the upper one keeps its neighbour as bits far below its own.
        const uint32_t x = (TYPE == F32 ? w[j] : w[j] << 16) & 0x7fffffffu, y = w[j] & 0x7fffffffu;
        if (x < 0x7f800000u) most = max(most, x);
        if (y < 0x7f800000u) most = max(most, y);
      }
    }
#pragma unroll
    for (int m = WARP / 2; m; m /= 2) most = max(most, __shfl_xor_sync(~0u, most, m));
    const int exponent = raise_to_2_14(most);
    factor = power_of_2(exponent), undo = power_of_2(-exponent);
  }
};

}  // namespace mxq::cuda
