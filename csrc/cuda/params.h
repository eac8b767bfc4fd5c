// What a launch hands to the mv and mm kernels: by value, so that the first weights can be fetched without reading a description from memory.
#pragma once

#include "../cuda_layout.h"

namespace mxq::cuda {

enum Type : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

// One rectangle's part in a band.
struct PieceView {
  const uint32_t* codes;
  const uint8_t *scales, *zeros;  // `scales` is the tables for lut
  uint64_t code_step, scale_step, zero_step;  // bytes per row block
  uint32_t c0, cols, tiles, groups;
  uint32_t group_shift;  // half tile `i` belongs to group i >> group_shift; 31 where the row is one group
  uint32_t units;        // super-tiles of a row block
  uint8_t kind, bits, zero, bf16;
};

// Of a piece of a blob; on the host to launch, on the device to read. A template, since constexpr functions, which both may call, cast no addresses.
template <class Piece>
MXQ_INLINE constexpr PieceView view_of(const Piece& p, const uint8_t* blob) {
  const Format f = p.format;
  return {reinterpret_cast<const uint32_t*>(blob + p.codes), blob + p.scales, blob + p.zeros, p.code_step, p.scale_step, p.zero_step, p.c0, p.c1 - p.c0, p.tiles,
          p.groups, group_shift(f), uint32_t(ceil_div(p.tiles, super_tiles(f.bits))), f.kind, f.bits, f.zero, f.bf16};
}

// One band of one weight: rows that are finished by the same blocks. Several weights that read the same x (q, k, v) share a launch.
struct PartView {
  void* y;
  const void* bias;          // or null
  const int32_t* row_map;    // [rows] original row of each stored row, or null: row0 + i
  const int32_t* perm_cols;  // or null
  const int32_t *rowptr, *cols;
  const uint16_t* values;    // CSR of the sparse part; rowptr null: none
  int64_t ldy;               // elements between rows of y
  int32_t bias_type;
  uint32_t row0, rows, first_cta, first_piece, pieces;  // first_cta: mv: the first row block
  uint32_t cost;    // mv: bytes of a row block, what blocks share out evenly
  int32_t restage;  // mv: whether the columns of x are others than those of the part before
};

constexpr int MAX_PARTS = 8, MAX_PIECES = 24;

struct Params {
  const void* x;
  int64_t ldx;
  float* partial;    // [splits][m][ctas * rows of a CTA], or null with one split; mv: rows of all row blocks
  const uint16_t* staged;  // mm: x as fp16 in the order of the weight's columns (mm_stage.cu), `ld_staged` elements between rows
  const float* unscale;    // mm: [m], what a sum is multiplied with; null: 1, and staged is x itself
  int64_t ld_staged;
  int32_t x_type, y_type, m, k, parts, splits, sparse;
  int32_t ctas;      // blocks; mv: row blocks of 16 rows
  uint64_t cost;     // mv: bytes of all row blocks, 0 if each has as many
  uint32_t each, more;  // mv: row blocks of each block, and how many blocks have one more, if all row blocks cost the same
  int32_t blocks, warps, depth, slot, batch, columns;  // mv: blocks for each split, and the sizes of MvShape
  PartView part[MAX_PARTS];
  PieceView piece[MAX_PIECES];
};
static_assert(sizeof(Params) <= 4096, "kernel parameters of all devices");

}  // namespace mxq::cuda
