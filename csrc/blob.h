// The prepacked weight: one block of bytes that describes itself and can be moved (all references are offsets from its start).
//
//   Header | Band[] | Piece[] | Rect[] | Slot[] | Slot8[] | permutations | sparse part | data of each piece
//
// It is made by prepack() at load and lives in a torch uint8 tensor, so that deepcopy, pickle and shared memory work. It is never read
// from a file: native code may trust what it says.
//
// Rectangles are cut at every row where any rectangle begins or ends. What lies between two cuts is a band, a rectangle's part in a band
// is a piece. So all pieces of a band share their row tiles, and a tile of outputs is finished in one pass over its pieces, in a fixed order.
#pragma once

#include "formats.h"

namespace mxq {

static constexpr uint64_t BLOB_MAGIC = 0x32424f4c4251584dull;  // "MXQBLOB2"

enum SlotLayout : uint32_t {
  INTERLEAVED = 0,  // [column][m]            for row lanes: m inputs of one column lie side by side
  SLICED = 1,       // [slice][k][m][lane]    for column lanes (gemv only): column 64*slice + 4*lane + k
  ORIGINAL = 2,     // [column][m], columns in their original order: the sparse part reads it
};

// One float32 copy of (part of) the input, made once per call and shared by all pieces that read the same columns in the same layout.
struct Slot {
  uint32_t c0, c1;   // columns of the permuted weight
  uint32_t layout;   // SlotLayout
  uint32_t group;    // columns per sum of inputs (0: no sums); a whole row counts as `padded` columns
  uint64_t padded;   // columns stored
  uint64_t start;    // first float per input row: slot data of a block of M rows begins at start * M
  uint64_t groups;   // sums per input row
  uint64_t sums;     // first sum per input row, likewise
  uint32_t a8;       // 1: the integer kernels read it too (fp16 pieces, the sparse part)
  uint32_t pad;
};

// One int8 copy of the input for the integer kernels, with a scale and a sum of codes for each group of columns. For a block of rows:
// gemv [m][column], or [column / 32][m][32] on AVX2 (simd.h, STRIPED); gemm [group][m][column]. Scales and sums: [group][all m].
struct Slot8 {
  uint32_t c0, c1;
  uint32_t group;    // columns per scale
  uint32_t pad;
  uint64_t padded;   // columns stored, a multiple of 64
  uint64_t start;    // first byte per input row
  uint64_t groups;
  uint64_t scales;   // first scale per input row
};

// The sparse part for the kernels: one value of each of a tile's 16 rows, as many of these as its longest row has values (the shorter ones are
// filled up with zeros at column 0). with_columns() says of which type its columns are.
template <class Column>
struct SparseStep {
  Column column[16];
  uint16_t value[16];  // fp16
};
// f of a zero of the type of a sparse step's columns: uint16_t where those of a weight of k columns fit, which makes a step a line of cache, else uint32_t.
template <class F>
static inline auto with_columns(uint64_t k, F&& f) {
  return k <= 65536 ? f(uint16_t{}) : f(uint32_t{});
}

struct Rect {
  uint32_t r0, r1, c0, c1;
  Format format;
};

struct Piece {
  uint32_t rect, slot;
  uint32_t slot8, pad;  // slot8 of no meaning for fp16
  uint32_t c0, c1;
  Format format;
  uint64_t groups;
  uint64_t codes, scales, zeros;                    // offsets in the blob; `scales` is the tables for lut
  uint64_t code_step, scale_step, zero_step;        // bytes per tile of 16 rows (per row for lut)
};

struct Band {
  uint32_t r0, r1;             // rows of the permuted weight
  uint32_t first_tile;         // number of row tiles in the bands before
  uint32_t first_piece, pieces;
  uint32_t pad;
};

struct Header {
  uint64_t magic, nbytes;
  uint32_t n, k;
  uint32_t bands, pieces, rects, slots;
  uint32_t tiles;              // of all bands
  uint32_t slots8;
  uint64_t slot_floats, slot_sums;    // per input row, over all slots
  uint64_t slot8_bytes, slot8_scales;
  uint64_t work;               // bytes of codes: what one pass over the weight reads
  uint64_t off_bands, off_pieces, off_rects, off_slots, off_slots8;
  uint64_t off_perm_rows, off_row_of, off_perm_cols;  // int32[]; 0: none. perm_rows[i]: original row of row i; row_of is its inverse
  uint64_t off_rowptr, off_cols, off_values, nnz;     // CSR in original coordinates; off_rowptr 0: none
  uint64_t off_sparse_tiles, off_sparse;              // the same for the kernels: uint32[tiles + 1] first step of a tile, SparseStep<>[]
};

static inline const Header& header(const uint8_t* blob) { return *reinterpret_cast<const Header*>(blob); }
template <class T>
static inline const T* at(const uint8_t* blob, uint64_t offset) {
  return reinterpret_cast<const T*>(blob + offset);
}

}  // namespace mxq
