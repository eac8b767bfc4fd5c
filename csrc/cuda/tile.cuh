// What mv and mm share: fetching a lane's words, and multiplying a super-tile with the inputs that lie in shared memory.
#pragma once

#include "decode.cuh"

namespace mxq::cuda {

__device__ __forceinline__ void load_16(unsigned* to, const void* from) {  // global, 16 bytes, aligned
  const uint4 v = ptx::ld_global_nc_16(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ void load_shared_16(unsigned* to, const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// One super-tile of one lane: its words, scales and zeros, as loads that may still be on their way.
struct Unit {
  unsigned w[20];
  unsigned scale[2], zero[2];  // lane l holds the pair (row l % 8, row l % 8 + 8) of group l / 8, and of group 4 + l / 8
};

// Super-tile `index` of a row block: BITS bits, PER tiles. What lies behind the last tile is left out.
template <class D>
__device__ __forceinline__ Unit load_unit(const PieceView& p, uint64_t block, unsigned index, int lane) {
  constexpr int words = D::bits * D::tiles;
  Unit u = {};
  const uint32_t* base = p.codes + block * (p.code_step / 4) + uint64_t(index) * (words * WARP);
  if ((index + 1) * D::tiles <= p.tiles) {
#pragma unroll
    for (int j = 0; j < words / 4; j++) load_16(u.w + 4 * j, base + (j * WARP + lane) * 4);
  } else {
    const int rest = int(p.tiles - index * D::tiles) * D::bits;
#pragma unroll
    for (int i = 0; i < words; i++)
      if (i < rest) u.w[i] = __ldg(base + i * WARP + lane);
  }
  if constexpr (D::scaled) {
    const unsigned first = (index * (2 * D::tiles)) >> p.group_shift, last = (index * (2 * D::tiles) + 2 * D::tiles - 1) >> p.group_shift;
    const uint32_t* scales = reinterpret_cast<const uint32_t*>(p.scales + block * p.scale_step);
    const uint8_t* zeros = p.zeros + block * p.zero_step;
#pragma unroll
    for (int i = 0; i < (D::tiles > 2 ? 2 : 1); i++) {
      const unsigned group = first + unsigned(lane / 8 + 4 * i);
      if (group > last || group >= p.groups) continue;
      u.scale[i] = __ldg(scales + group * 8 + lane % 8);
      if (!D::zeroed) continue;
      if (p.zero == INT) u.zero[i] = __ldg(reinterpret_cast<const uint16_t*>(zeros) + group * 8 + lane % 8);
      if (p.zero == FLOATZERO) u.zero[i] = __ldg(reinterpret_cast<const uint32_t*>(zeros) + group * 8 + lane % 8);
    }
  }
  return u;
}

// An integer below 1024 as two halves.
__device__ __forceinline__ unsigned half_pair(unsigned i) { return ptx::hadd2(twice(0x6400u | i), twice(0xe400u)); }

// Of the pairs that the lanes hold, the one of rows (g, g + 8) and group `group` of the super-tile.
__device__ __forceinline__ unsigned pair_of(const unsigned (&pairs)[2], int group, int lane) {
  return __shfl_sync(~0u, group < 4 ? pairs[0] : pairs[1], group % 4 * 8 + lane / 4);
}

__device__ __forceinline__ float scale_value(unsigned half, bool bf16) { return bf16 ? ptx::bf16_to_float(uint16_t(half)) : ptx::half_to_float(uint16_t(half)); }

// acc[n][0..3] += W X^T for one super-tile: 16 rows, its columns, and 8 * NT rows of x, of which `m` exist. Thread fragments as m16n8k16 has them:
// acc[n][0], [1]: row g, x rows 8n + 2t, + 1;  [2], [3]: row g + 8. `xs` points to the super-tile's first column of x row 0.
// Sums of x rows that do not exist are those of the last one: nobody reads them.
template <class D, int NT>
__device__ __forceinline__ void multiply(D& d, const Unit& u, const PieceView& p, int tiles, const uint16_t* xs, int stride, int m, float (&acc)[NT][4], int lane) {
  constexpr unsigned one = 0x3c003c00u;
  const int g = lane / 4, t = lane % 4, mask = int((1u << p.group_shift) - 1);
  float part[NT][4] = {}, sums[NT][4] = {};
#pragma unroll
  for (int half = 0; half < 2 * D::tiles; half++) {
    if (half >= 2 * tiles) break;
    if (D::zeroed && p.zero == INT && (half & mask) == 0) {
      const unsigned z = pair_of(u.zero, half >> p.group_shift, lane);
      d.set_zero(half_pair(z & 0xff), half_pair(z >> 8));
    }
    unsigned b[NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++) load_shared_16(b[n], xs + min(8 * n + g, m - 1) * stride + half * 32 + 8 * t);
    const unsigned* w = u.w + half / 2 * D::bits;
    unsigned a[2][4];
    if (half % 2 == 0) d.template step<0>(w, a[0]), d.template step<1>(w, a[1]);
    else d.template step<2>(w, a[0]), d.template step<3>(w, a[1]);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const unsigned bs[2] = {b[n][2 * s], b[n][2 * s + 1]};
        float(&to)[4] = D::scaled ? part[n] : acc[n];
        ptx::mma_m16n8k16_f16(to, a[s], bs, to);
      }
    if (D::zeroed && p.zero == FLOATZERO) {  // the sums of the inputs, in the places where the products are
      const unsigned ones[4] = {one, one, one, one};
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int s = 0; s < 2; s++) {
          const unsigned bs[2] = {b[n][2 * s], b[n][2 * s + 1]};
          ptx::mma_m16n8k16_f16(sums[n], ones, bs, sums[n]);
        }
    }
    if constexpr (D::scaled) {
      if (((half + 1) & mask) != 0 && half != 2 * tiles - 1) continue;
      const int group = half >> p.group_shift;
      const unsigned s = pair_of(u.scale, group, lane);
      const float scale[2] = {scale_value(s & 0xffff, p.bf16), scale_value(s >> 16, p.bf16)};
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] = fmaf(scale[i / 2], part[n][i], acc[n][i]), part[n][i] = 0.0f;
      if (D::zeroed && p.zero == FLOATZERO) {
        const unsigned z = pair_of(u.zero, group, lane);
        const float zero[2] = {scale_value(z & 0xffff, p.bf16), scale_value(z >> 16, p.bf16)};
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) acc[n][i] = fmaf(zero[i / 2], sums[n][i], acc[n][i]), sums[n][i] = 0.0f;
      }
    }
  }
}

// The zero point where it does not change: the middle code of symmetric formats, 0 where zeros are floats.
template <class D>
__device__ __forceinline__ void begin_piece(D& d, const PieceView& p, uint64_t block, int lane) {
  d.load(p, block, lane);
  const unsigned z = p.zero == SYM ? half_pair(1u << (p.bits - 1)) : 0;
  if (D::zeroed) d.set_zero(z, z);
}

// Calls f(D{}) for the decoder of a piece's format, out of those that the kernel was built for.
template <class D, class... Rest, class F>
__device__ __forceinline__ void for_decoder(const PieceView& p, F&& f) {
  if (sizeof...(Rest) == 0 || D::reads(p)) return f(D{});
  if constexpr (sizeof...(Rest) > 0) for_decoder<Rest...>(p, f);
}

}  // namespace mxq::cuda
