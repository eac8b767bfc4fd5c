// What the kernels that decode tiles share: fetching the words, scales and zeros of a lane, and choosing a decoder.
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
