// Super-tiles on their way from global to shared memory. Each warp of mv has a ring of slots of its own (MvShape in shape.h): it fills one while it
// multiplies with another, by cp.async, which takes neither registers nor barriers. A lane copies the very codes that it reads; scales, zeros and tables are
// shared by the lanes of a warp.
#pragma once

#include "shape.h"
#include "tile.cuh"

namespace mxq::cuda {

// Super-tile `index` of row block `block`. What lies behind the last tile and group becomes 0.
template <class D>
__device__ __forceinline__ void fetch(const PieceView& p, uint64_t block, unsigned index, uint8_t* slot, int lane) {
  constexpr int words = D::bits * D::tiles;
  const uint32_t* base = p.codes + block * (p.code_step / 4) + uint64_t(index) * (words * WARP);
  if ((index + 1) * D::tiles <= p.tiles) {
#pragma unroll
    for (int j = 0; j < words / 4; j++) ptx::cp_async_16(slot + (j * WARP + lane) * 16, base + (j * WARP + lane) * 4);
  } else {  // the tiles after the last full super-tile lie word by word
    const int rest = int(p.tiles - index * D::tiles) * D::bits;
#pragma unroll 1
    for (int i = 0; i < words; i++)
      ptx::cp_async_4(slot + (i / 4 * WARP + lane) * 16 + i % 4 * 4, i < rest ? base + i * WARP + lane : base, i < rest ? 4 : 0);
  }
  uint8_t* to = slot + slot_codes(D::bits) + lane * 16;
  if constexpr (D::scaled) {
    const int groups = slot_groups(D::bits, p.group_shift), first = int(index * (2 * D::tiles) >> p.group_shift), last = int(p.groups) - first;
    const bool pairs = lane / 2 < groups;  // 32 bytes a group
    if (pairs) ptx::cp_async_16(to, p.scales + block * p.scale_step + (lane / 2 < last ? first * 32 + lane * 16 : 0), lane / 2 < last ? 16 : 0);
    if (D::zeroed && p.zero == FLOATZERO && pairs)
      ptx::cp_async_16(to + groups * 32, p.zeros + block * p.zero_step + (lane / 2 < last ? first * 32 + lane * 16 : 0), lane / 2 < last ? 16 : 0);
    if (D::zeroed && p.zero == INT && lane < groups)
      ptx::cp_async_16(to + groups * 32, p.zeros + block * p.zero_step + (lane < last ? (first + lane) * 16 : 0), lane < last ? 16 : 0);
  }
  if constexpr (D::tabled) {
    if (lane < (TILE_ROWS * 2 << D::bits) / 16) ptx::cp_async_16(to, p.scales + block * p.scale_step + lane * 16);
  }
}

// Waits until at most `younger` groups of copies of this lane are on their way, of which there are up to 3.
__device__ __forceinline__ void wait_for_copies(int younger) {
  if (younger == 0) ptx::cp_async_wait<0>();
  else if (younger == 1) ptx::cp_async_wait<1>();
  else if (younger == 2) ptx::cp_async_wait<2>();
  else ptx::cp_async_wait<3>();
}

// acc[n] += W X^T for a super-tile in a slot: 16 rows, all its columns, and 8 * NT rows of x; fragments as `multiply` in tile.cuh has them.
// xs[n] points to the lane's row of x and its first 8 columns of the super-tile. ZERO: the piece's kind of zeros.
template <class D, int NT, int ZERO>
__device__ __forceinline__ void multiply_slot(D& d, const uint8_t* slot, const PieceView& p, const uint16_t* const (&xs)[NT], float (&acc)[NT][4], int lane) {
  constexpr int words = D::bits * D::tiles, halves = 2 * D::tiles;
  constexpr unsigned one = 0x3c003c00u;
  const int g = lane / 4, shift = int(p.group_shift), mask = int((1u << p.group_shift) - 1);
  const uint8_t* scales = slot + slot_codes(D::bits) + g * 4;
  const uint8_t* zeros = slot + slot_codes(D::bits) + slot_groups(D::bits, p.group_shift) * 32 + g * (ZERO == INT ? 2 : 4);
  unsigned w[words];
#pragma unroll
  for (int j = 0; j < words / 4; j++) load_shared_16(w + 4 * j, slot + (j * WARP + lane) * 16);
  if constexpr (D::tabled) d.set_tables(reinterpret_cast<const uint32_t*>(slot + slot_codes(D::bits)), lane);
  float part[NT][4] = {}, sums[NT][4] = {};
#pragma unroll
  for (int half = 0; half < halves; half++) {
    if (ZERO == INT && (half == 0 || (half & mask) == 0)) {
      const unsigned z = *reinterpret_cast<const uint16_t*>(zeros + (half >> shift) * 16);
      d.set_zero_codes(z & 0xff, z >> 8);
    }
    unsigned b[NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++) load_shared_16(b[n], xs[n] + half * 32);
    const unsigned* words_of = w + half / 2 * D::bits;
    unsigned a[2][4];
    if (half % 2 == 0) d.template step<0>(words_of, a[0]), d.template step<1>(words_of, a[1]);
    else d.template step<2>(words_of, a[0]), d.template step<3>(words_of, a[1]);
#pragma unroll
    for (int s = 0; s < 2; s++)
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const unsigned bs[2] = {b[n][2 * s], b[n][2 * s + 1]};
        float(&to)[4] = D::scaled ? part[n] : acc[n];
        ptx::mma_m16n8k16_f16(to, a[s], bs, to);
        if (ZERO == FLOATZERO) {  // the sums of the inputs, in the places where the products are
          const unsigned ones[4] = {one, one, one, one};
          ptx::mma_m16n8k16_f16(sums[n], ones, bs, sums[n]);
        }
      }
    if constexpr (D::scaled) {
      if (half != halves - 1 && ((half + 1) & mask) != 0) continue;  // the group goes on
      const unsigned s = *reinterpret_cast<const uint32_t*>(scales + (half >> shift) * 32);
      const float scale[2] = {scale_value(s & 0xffff, p.bf16), scale_value(s >> 16, p.bf16)};
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] = fmaf(scale[i / 2], part[n][i], acc[n][i]), part[n][i] = 0.0f;
      if (ZERO == FLOATZERO) {
        const unsigned z = *reinterpret_cast<const uint32_t*>(zeros + (half >> shift) * 32);
        const float zero[2] = {scale_value(z & 0xffff, p.bf16), scale_value(z >> 16, p.bf16)};
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) acc[n][i] = fmaf(zero[i / 2], sums[n][i], acc[n][i]), sums[n][i] = 0.0f;
      }
    }
  }
}

}  // namespace mxq::cuda
