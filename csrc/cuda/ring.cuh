// Super-tiles on their way from global to shared memory. Each warp of mv has a ring of slots of its own (MvShape in shape.h): it fills one while it
// multiplies with another, by cp.async, which takes neither registers nor barriers. A lane copies the very codes that it reads; scales, zeros and tables are
// shared by the lanes of a warp.
#pragma once

#include "shape.h"
#include "tile.cuh"

namespace mxq::cuda {

__device__ constexpr float power_of_2_float(int exponent) {  // -24 .. 24
  float f = 1.0f;
  for (; exponent > 0; exponent--) f *= 2.0f;
  for (; exponent < 0; exponent++) f *= 0.5f;
  return f;
}

// What the places of codes in their halves (raw_step() in decode.cuh) mean for sums of rows g and g + 8.
struct Places {
  float unit[2], back[2];  // what a code of 1 is in the operand, and its inverse
  float lift[2];           // brings the sums of `other` steps to that
};
template <class D>
__device__ constexpr Places places_of() {
  if constexpr (D::zeroed) {
    const int first = D::place(false, false), second = D::place(true, false);
    return {{power_of_2_float(first - 24), power_of_2_float(second - 24)},
            {power_of_2_float(24 - first), power_of_2_float(24 - second)},
            {power_of_2_float(first - D::place(false, true)), power_of_2_float(second - D::place(true, true))}};
  } else {
    return {{1.0f, 1.0f}, {1.0f, 1.0f}, {1.0f, 1.0f}};
  }
}

// What a lane copies of one row block: the addresses of its 16 bytes, of the first super-tile, scale or zero.
struct RowBlock {
  const uint8_t *codes, *scales, *zeros;
};

// Super-tile `index` of a row block; `codes` has come to it already. What lies behind the last tile and group becomes 0.
template <class D>
__device__ __forceinline__ void fetch(const PieceView& p, const RowBlock& from, unsigned index, uint8_t* slot, int lane) {
  constexpr int words = D::bits * D::tiles;
  uint8_t* to = slot + lane * 16;
  if ((index + 1) * D::tiles <= p.tiles) {
#pragma unroll
    for (int j = 0; j < words / 4; j++) ptx::cp_async_16(to + j * WARP * 16, from.codes + j * WARP * 16);
  } else {  // the tiles after the last full super-tile lie word by word
    const uint8_t* base = from.codes - lane * 12;
    const int rest = int(p.tiles - index * D::tiles) * D::bits;
#pragma unroll 1
    for (int i = 0; i < words; i++) ptx::cp_async_4(to + i / 4 * WARP * 16 + i % 4 * 4, i < rest ? base + i * WARP * 4 : base, i < rest ? 4 : 0);
  }
  to += slot_codes(D::bits);
  if constexpr (D::scaled) {
    const int groups = slot_groups(D::bits, p.group_shift), first = int(index * (2 * D::tiles) >> p.group_shift), last = int(p.groups) - first;
    if (lane / 2 < groups) {  // 32 bytes a group
      const int offset = lane / 2 < last ? first * 32 : 0, take = lane / 2 < last ? 16 : 0;
      ptx::cp_async_16(to, from.scales + offset, take);
      if (D::zeroed && p.zero == FLOATZERO) ptx::cp_async_16(to + groups * 32, from.zeros + offset, take);
      if (D::zeroed && p.zero == INT && lane < groups) ptx::cp_async_16(to + groups * 32, from.zeros + (lane < last ? first * 16 : 0), lane < last ? 16 : 0);
    }
  }
  if constexpr (D::tabled) {
    if (lane < (TILE_ROWS * 2 << D::bits) / 16) ptx::cp_async_16(to, from.scales);
  }
}

// Waits until at most `younger` groups of copies of this lane are on their way, of which there are up to 3.
__device__ __forceinline__ void wait_for_copies(int younger) {
  if (younger == 0) ptx::cp_async_wait<0>();
  else if (younger == 1) ptx::cp_async_wait<1>();
  else if (younger == 2) ptx::cp_async_wait<2>();
  else ptx::cp_async_wait<3>();
}

// Running sums of x over the half tiles of 256 columns, for the zeros: of rows 8n + 2t and the next, up to and with a half tile.
// A super-tile of half the width may begin in the middle of them.
struct RunningSums {
  const float* at;  // of the super-tile's first half tile, at the lane's rows
  bool middle;
};

// acc[n] += W X^T for a super-tile in a slot: 16 rows, all its columns, and 8 * NT rows of x; thread fragments as m16n8k16
// has them: acc[n][0], [1]: row g, rows 8n + 2t and the next of x; [2], [3]: row g + 8.
// xs[n] points to the lane's row of x and its first 8 columns of the super-tile. For uniform formats acc is in units of 2^(24 - place) of each row's
// codes, see Places. FOLD: half tiles to a group, or to the super-tile if its group is larger; 0: see piece. ZERO: kind of zeros, where FOLD is not 0.
template <class D, int NT, int FOLD, int ZERO>
__device__ __forceinline__ void multiply_slot(const D& d, const uint8_t* slot, const PieceView& p, const uint16_t* const (&xs)[NT], const RunningSums& x_sums,
                                              float (&acc)[NT][4], int lane) {
  constexpr int words = D::bits * D::tiles, halves = 2 * D::tiles;
  constexpr Places places = places_of<D>();
  const int g = lane / 4, shift = int(p.group_shift), mask = int((1u << p.group_shift) - 1);
  const uint8_t* scales = slot + slot_codes(D::bits) + g * 4;
  unsigned w[words];
#pragma unroll
  for (int j = 0; j < words / 4; j++) load_shared_16(w + 4 * j, slot + (j * WARP + lane) * 16);
  float part[NT][4] = {}, other[NT][4] = {};
  float2 before[NT];
#pragma unroll
  for (int n = 0; n < NT; n++) {
    before[n] = make_float2(0.0f, 0.0f);
    if (D::zeroed && halves < 8 && x_sums.middle) before[n] = *reinterpret_cast<const float2*>(x_sums.at - 8 * NT + 8 * n);
  }
#pragma unroll
  for (int half = 0; half < halves; half++) {
    unsigned b[NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++) load_shared_16(b[n], xs[n] + half * 32);
    const unsigned* words_of = w + half / 2 * D::bits;
    unsigned a[2][4];
    if constexpr (D::zeroed) {
      if (half % 2 == 0) d.template raw_step<0>(words_of, a[0]), d.template raw_step<1>(words_of, a[1]);
      else d.template raw_step<2>(words_of, a[0]), d.template raw_step<3>(words_of, a[1]);
    } else {
      if (half % 2 == 0) d.template step<0>(words_of, a[0]), d.template step<1>(words_of, a[1]);
      else d.template step<2>(words_of, a[0]), d.template step<3>(words_of, a[1]);
    }
#pragma unroll
    for (int s = 0; s < 2; s++)
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const unsigned bs[2] = {b[n][2 * s], b[n][2 * s + 1]};
        float(&to)[4] = !D::scaled ? acc[n] : D::other(half % 2 * 2 + s) ? other[n] : part[n];
        ptx::mma_m16n8k16_f16(to, a[s], bs, to);
      }
    if constexpr (D::scaled) {
      if (half != halves - 1 && (FOLD ? (half + 1) % (FOLD ? FOLD : 1) != 0 : ((half + 1) & mask) != 0)) continue;  // the group goes on
      const int group = FOLD ? half / (FOLD ? FOLD : 1) : half >> shift;
      const int kind = FOLD ? ZERO : int(p.zero);
      const unsigned pair = *reinterpret_cast<const uint32_t*>(scales + group * 32);
      const float scale[2] = {scale_value(pair & 0xffff, p.bf16), scale_value(pair >> 16, p.bf16)};
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if constexpr (D::others) part[n][i] = fmaf(other[n][i], places.lift[i / 2], part[n][i]), other[n][i] = 0.0f;
          acc[n][i] = fmaf(scale[i / 2], part[n][i], acc[n][i]), part[n][i] = 0.0f;
        }
      if constexpr (D::zeroed) {
        const uint8_t* zeros = slot + slot_codes(D::bits) + (FOLD ? halves / (FOLD ? FOLD : 1) : slot_groups(D::bits, p.group_shift)) * 32;
        float zero[2];  // what a sum of x is multiplied by
        if (kind == FLOATZERO) {
          const unsigned z = *reinterpret_cast<const uint32_t*>(zeros + group * 32 + g * 4);
          zero[0] = scale_value(z & 0xffff, p.bf16) * places.unit[0], zero[1] = scale_value(z >> 16, p.bf16) * places.unit[1];
        } else if (kind == INT) {
          const unsigned z = *reinterpret_cast<const uint16_t*>(zeros + group * 16 + g * 2);
          zero[0] = scale[0] * (float(z & 0xff) * -places.unit[0]), zero[1] = scale[1] * (float(z >> 8) * -places.unit[1]);
        } else {
          constexpr float middle = float(1 << (D::bits - 1));
          zero[0] = scale[0] * (-middle * places.unit[0]), zero[1] = scale[1] * (-middle * places.unit[1]);
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const float2 now = *reinterpret_cast<const float2*>(x_sums.at + half * 8 * NT + 8 * n);
          const float sum[2] = {now.x - before[n].x, now.y - before[n].y};
          before[n] = now;
#pragma unroll
          for (int i = 0; i < 4; i++) acc[n][i] = fmaf(zero[i / 2], sum[i % 2], acc[n][i]);
        }
      }
    }
  }
}

}  // namespace mxq::cuda
