// Sizes of the blocks of mv and mm, which launch.cpp needs without the kernels.
#pragma once

#include "../cuda_layout.h"

namespace mxq::cuda {

constexpr int SUM_STRIDE = TILE_ROWS + 4;  // floats of 16 rows: the lanes of a warp, with 4 rows of x, meet no bank twice
constexpr int STAGE_PAD = 32;  // halves behind each staged row: rows begin 16 banks apart, so that 8 lanes (2 rows) read without conflict

// An mv block has up to MV_WARPS warps, fewer where registers (16 rows of x; all decoders in one kernel) or shared memory are short.
constexpr int MV_WARPS = 16, MV_WIDE_WARPS = 12, MV_MIXED_WARPS = 8;
constexpr int mv_warps(int tiles, bool mixed) { return mixed ? MV_MIXED_WARPS : tiles > 1 ? MV_WIDE_WARPS : MV_WARPS; }

// Bytes of a super-tile on its way: codes, then scales, then zeros, of all groups that it has columns of; lut: codes, then the tables of the 16 rows.
static constexpr int slot_groups(int bits, uint32_t group_shift) { return ((2 * super_tiles(bits) - 1) >> group_shift) + 1; }
static constexpr int slot_codes(int bits) { return super_tiles(bits) * bits * WARP * 4; }
static constexpr int slot_bytes(int kind, int bits, int zero, uint32_t group_shift) {  // before it is rounded up to whole lines of 128
  const int groups = slot_groups(bits, group_shift), numbers = groups * TILE_ROWS * 2;
  if (kind == LUT) return slot_codes(bits) + (TILE_ROWS * 2 << bits);
  if (kind == NF) return slot_codes(bits) + numbers;
  if (kind == UNIFORM) return slot_codes(bits) + numbers + (zero == FLOATZERO ? numbers : zero == INT ? groups * TILE_ROWS : 0);
  return slot_codes(bits);
}

// Shared memory of an mv block, in this order: sums [row blocks of a batch][warps][m][SUM_STRIDE], factors of the rows of x [16], two ints [4], the largest numbers that each
// warp found [16 warps][16], sums of the sparse part [m][rows of a batch], super-tiles on their way [warps][depth][slot], x [m][columns + STAGE_PAD],
// its running sums [columns / 32][8 * tiles].
struct MvShape {
  int warps, batch, m, depth, slot, columns, sparse;
  constexpr int tiles() const { return m <= 8 ? 1 : 2; }
  constexpr int sums() const { return batch * warps * m * SUM_STRIDE; }  // floats
  constexpr int factors() const { return sums(); }
  constexpr int range() const { return factors() + 16; }
  constexpr int largest() const { return range() + 4; }
  constexpr int extra() const { return largest() + 256; }
  // Bytes from here on. The ring and its slots begin at multiples of 128: where the 32 bytes of a sector come from do not go to 32 such bytes, cp.async
  // takes the sector twice (measured on an H100: with the ring 16 bytes off, all weights were read from L2 twice).
  constexpr int ring() const { return ((extra() + (sparse ? m * batch * TILE_ROWS : 0)) * 4 + 127) / 128 * 128; }
  constexpr int x() const { return ring() + warps * depth * slot; }
  constexpr int x_sums() const { return x() + m * (columns + STAGE_PAD) * 2; }
  constexpr int nbytes() const { return x_sums() + columns * tiles(); }
};

// An mm block: MM_ROWS_W rows of W by 8 * mm_tiles() rows of x, MM_TILES tiles of columns in each of two buffers. Splits begin at super-tiles, MM_SPLIT tiles.
constexpr int MM_WARPS = 4, MM_THREADS = MM_WARPS * WARP, MM_ROWS_W = MM_WARPS * TILE_ROWS, MM_TILES = 2, MM_SPLIT = 4;
constexpr int MM_STRIDE = MM_TILES * TILE_COLS + STAGE_PAD;
static constexpr int mm_tiles(int64_t m, bool mixed) { return m <= 32 || mixed ? 4 : 8; }  // with all decoders and 8 of them the assembler spills
static constexpr int mm_smem(int nt) { return 2 * 8 * nt * MM_STRIDE * 2; }
static_assert(mm_smem(8) <= 48 * 1024 && mm_smem(4) >= 32 * MM_ROWS_W * 4, "fits every device, and the sums fit where x was");

}  // namespace mxq::cuda
