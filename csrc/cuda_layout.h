// The layout that the CUDA kernels read, drawn once. Host packer, kernels, tests and docs/formats.md derive from this file; it follows
// formats.h and, like it, has internal linkage throughout. Everything here is constexpr, so that device code may call it (nvcc's
// --expt-relaxed-constexpr) and the compiler checks the drawing.
#pragma once

#include "formats.h"

// A call inside a kernel would spill registers.
#if defined(__CUDACC__)
#define MXQ_INLINE static __forceinline__
#else
#define MXQ_INLINE static
#endif

namespace mxq {

/**doc
# Layout for CUDA

Made once, when a weight moves to a GPU, from the same canonical tensors. The unit is the *tile*: 16 rows x 64 columns = 1024 codes = exactly
`bits` 32-bit words for each of the 32 lanes of a warp. The lanes own the codes that the tensor core instruction m16n8k16 wants of them
(weights are its operand A), so that a lane loads its own words and needs no exchange:

    lane      4*g + t,  g = 0..7, t = 0..3:   rows g and g + 8;  columns 32*h + 8*t + 0..7 of each half h of the tile
    step s    2*h + u,  u = 0..1:             columns k = 32*h + 8*t + 4*u + 0..3, one m16n8k16:
              a0 = (g; k, k+1)    a1 = (g+8; k, k+1)    a2 = (g; k+2, k+3)    a3 = (g+8; k+2, k+3)

The same assignment of columns holds for the inputs (operand B), so a lane reads 8 neighbouring inputs of a row at once. A half tile is 32 columns,
so any group of 32 columns or more ends where a step ends.

### Words of a tile

Uniform codes and fp16 go by pairs: the first code of `a_i` at bit p of a word, the second at bit p + 16, where a mask and an OR with 0x6400 make both
into the halves 1024 + q * 2^p (one bit needs no OR: alone in the exponent of a half it is a power of two):

    1 bit    word 0     p = 4*s + i
    2 bits   word i/2   p = 4*s + 2*(i%2)
    4 bits   word s     p = 4*i
    8 bits   word 2*s + i/2    p = 8*(i%2)
    16 bits  word 4*s + i      p = 0
    3 bits   word s     p = 0, 3, 9, 12 for a0..a3, s = 0..2
             step 3     a0, a1, a2 at p = 6 of words 0, 1, 2; bit b of a3 at p = 15 of word b
    5 bits   word s     p = 0, 5, 10 for a0..a2
             word 4     p = 5*s for a3, s = 0..2;  step 3: bit b of a3 at p = 15 of word b
    6 bits   word 2*s + i/2    p = 10*(i%2), s = 0..2
             step 3     the upper four bits of a_i at p = 6 of word i, the lower two at p = 6 + 2*(i%2) of word 4 + i/2

nf and lut codes go by quads, the columns k..k+3 of one row (r = 0: row g, r = 1: row g + 8), j = 0..3, so that a quad selects bytes of a table:

    2 bits   word s/2   bit 8*j + 4*(s%2) + 2*r
    3 bits   word s/2   bit 16*r + 4*j + 2*(s%2), the low two bits of the code;  word 2  bit 16*r + 4*j + s, its top bit
    4 bits   word s     bit 16*r + 4*j

### Order in memory

Columns are padded to 64 with code 0, rows to 16. A *super-tile* gives a lane 4 to 20 words: 4 tiles up to 5 bits, 2 at 6 and 8, 1 at 16.
Its words go by 16 bytes a lane, `[word / 4][lane][word % 4]`, so that every load of a warp is 512 neighbouring bytes. The tiles after the last full
super-tile go `[word][lane]`.

    codes    [row block of 16][super-tile]   bits * 128 bytes a tile
    scales   [row block][groups]             16 x fp16 or bf16; row r at place 2*(r % 8) + r/8, so that one 32-bit load serves a lane's two rows
    zeros    [row block][groups]             in the same order; _asym: 16 x uint8;  _fz: 16 x fp16 or bf16
    table    [row block][16 rows][2^bits]    lut: fp16

Groups are padded to whole tiles, padding has scale 0 and zero 0. Rectangles are cut into bands and pieces as for the CPU kernels.
*/
static constexpr int TILE_ROWS = 16, TILE_COLS = 64, WARP = 32;

static constexpr bool quad_order(Format f) { return f.kind == LUT || f.kind == NF; }
static constexpr int super_tiles(int bits) { return bits <= 5 ? 4 : 16 / bits; }
static constexpr int super_cols(int bits) { return super_tiles(bits) * TILE_COLS; }
static constexpr int64_t cuda_tiles(int64_t cols) { return ceil_div(cols, TILE_COLS); }
// Groups stored per row: whole tiles of them.
static constexpr int64_t cuda_groups(Format f, int64_t cols) {
  return !has_scales(f) ? 0 : f.group ? ceil_div(cuda_tiles(cols) * TILE_COLS, f.group) : 1;
}
// Half tile `i` belongs to group i >> group_shift; 31 where the row is one group.
static constexpr uint32_t group_shift(Format f) {
  uint32_t shift = f.group ? 0 : 31;
  while (f.group > 32u << shift && shift < 31) shift++;
  return shift;
}
// Bytes of one row block.
static constexpr int64_t cuda_code_bytes(Format f, int64_t cols) { return cuda_tiles(cols) * f.bits * WARP * 4; }
static constexpr int64_t cuda_scale_bytes(Format f, int64_t cols) {
  return f.kind == LUT ? TILE_ROWS * (2 << f.bits) : cuda_groups(f, cols) * TILE_ROWS * 2;
}
static constexpr int64_t cuda_zero_bytes(Format f, int64_t cols) {
  return f.zero == SYM ? 0 : cuda_groups(f, cols) * TILE_ROWS * (f.zero == INT ? 1 : 2);
}
// Place of row r of a row block among the 16 numbers of a group.
static constexpr int pair_place(int r) { return 2 * (r % 8) + r / 8; }

// Where a code lies in a tile: `low` bits of it in one word, and the rest, if any, elsewhere (3, 5 and 6 bits).
struct CodePlace {
  int lane, word, bit;  // the low `low` bits of the code
  int low;
  int high_word, high_bit, high_step, bit_step = 0;  // code bit low + i is at bit high_bit + i * bit_step of word high_word + i * high_step
};

MXQ_INLINE constexpr CodePlace code_place(int bits, bool quads, int r, int k) {
  const int g = r % 8, r8 = r / 8, t = k % 32 / 8, s = 2 * (k / 32) + k % 8 / 4, j = k % 4;
  const int i = r8 + 2 * (j / 2), e = 16 * (j % 2), lane = 4 * g + t;
  if (quads) {
    if (bits == 2) return {lane, s / 2, 8 * j + 4 * (s % 2) + 2 * r8, 2, 0, 0, 0};
    if (bits == 3) return {lane, s / 2, 16 * r8 + 4 * j + 2 * (s % 2), 2, 2, 16 * r8 + 4 * j + s, 0};
    return {lane, s, 16 * r8 + 4 * j, 4, 0, 0, 0};
  }
  if (bits == 1) return {lane, 0, e + 4 * s + i, 1, 0, 0, 0};
  if (bits == 2) return {lane, i / 2, e + 4 * s + 2 * (i % 2), 2, 0, 0, 0};
  if (bits == 4) return {lane, s, e + 4 * i, 4, 0, 0, 0};
  if (bits == 8) return {lane, 2 * s + i / 2, e + 8 * (i % 2), 8, 0, 0, 0};
  if (bits == 16) return {lane, 4 * s + i, e, 16, 0, 0, 0};
  if (bits == 6) {
    if (s < 3) return {lane, 2 * s + i / 2, e + 10 * (i % 2), 6, 0, 0, 0};
    return {lane, 4 + i / 2, e + 6 + 2 * (i % 2), 2, i, e + 6, 0, 1};
  }
  if (bits == 5 && i < 3) return {lane, s, e + 5 * i, 5, 0, 0, 0};
  if (bits == 5 && s < 3) return {lane, 4, e + 5 * s, 5, 0, 0, 0};
  if (bits == 5) return {lane, 0, e + 15, 0, 0, e + 15, 1};
  if (s < 3) return {lane, s, e + (i == 0 ? 0 : i == 1 ? 3 : i == 2 ? 9 : 12), 3, 0, 0, 0};
  if (i < 3) return {lane, i, e + 6, 3, 0, 0, 0};
  return {lane, 0, e + 15, 0, 0, e + 15, 1};
}

// Index, in units of 32-bit words from the start of a row block's codes, of word `word` of lane `lane` of tile `tile` of `tiles`.
MXQ_INLINE constexpr int64_t word_index(int bits, int64_t tile, int64_t tiles, int word, int lane) {
  const int per = super_tiles(bits);
  const int64_t base = tile / per * per * bits * WARP, w = tile % per * bits + word;
  return tile / per * per + per <= tiles ? base + (w / 4 * WARP + lane) * 4 + w % 4 : base + w * WARP + lane;
}

// The code of row r (0..15) and column `col` of a row block; `tiles` is cuda_tiles() of the piece.
MXQ_INLINE constexpr uint32_t read_code(const uint32_t* words, int bits, bool quads, int64_t tiles, int r, int64_t col) {
  const CodePlace p = code_place(bits, quads, r, int(col % TILE_COLS));
  const int64_t tile = col / TILE_COLS;
  uint32_t code = p.low ? words[word_index(bits, tile, tiles, p.word, p.lane)] >> p.bit & ((1u << p.low) - 1) : 0;
  int word = p.high_word, bit = p.high_bit;
  for (int b = p.low; b < bits; b++, word += p.high_step, bit += p.bit_step)
    code |= (words[word_index(bits, tile, tiles, word, p.lane)] >> bit & 1) << b;
  return code;
}
static constexpr void write_code(uint32_t* words, int bits, bool quads, int64_t tiles, int r, int64_t col, uint32_t code) {  // into zeroed words
  const CodePlace p = code_place(bits, quads, r, int(col % TILE_COLS));
  const int64_t tile = col / TILE_COLS;
  if (p.low) words[word_index(bits, tile, tiles, p.word, p.lane)] |= (code & ((1u << p.low) - 1)) << p.bit;
  int word = p.high_word, bit = p.high_bit;
  for (int b = p.low; b < bits; b++, word += p.high_step, bit += p.bit_step) words[word_index(bits, tile, tiles, word, p.lane)] |= (code >> b & 1) << bit;
}

static_assert(cuda_code_bytes(W3G64_ASYM, 4096) * 8 == 16 * 4096 * 3, "no bit is wasted where columns are a multiple of 64");
static_assert(cuda_groups(W4G32_FZ, 20) == 2 && cuda_groups(W4G64, 65) == 2 && cuda_groups(W8, 65) == 1, "groups of whole tiles");
static_assert(super_tiles(1) == 4 && super_tiles(2) * 2 % 4 == 0 && super_tiles(3) * 3 == 12 && super_tiles(5) * 5 == 20 && super_tiles(6) * 6 == 12 &&
                  super_tiles(8) * 8 == 16 && super_tiles(16) * 16 == 16, "vectors of 4 words");

// Every bit of a tile belongs to exactly one code: 1024 codes mark 32 * bits words completely.
static constexpr bool tile_is_full(int bits, bool quads) {
  uint32_t words[16 * WARP] = {};
  for (int r = 0; r < TILE_ROWS; r++)
    for (int k = 0; k < TILE_COLS; k++) {
      const CodePlace p = code_place(bits, quads, r, k);
      for (int b = 0; b < bits; b++) {
        const bool low = b < p.low;
        const int word = low ? p.word : p.high_word + (b - p.low) * p.high_step, bit = low ? p.bit + b : p.high_bit + (b - p.low) * p.bit_step;
        uint32_t& w = words[word * WARP + p.lane];
        if (w >> bit & 1) return false;
        w |= 1u << bit;
      }
    }
  for (int i = 0; i < bits * WARP; i++)
    if (words[i] != ~0u) return false;
  return true;
}
static_assert(tile_is_full(1, false) && tile_is_full(2, false) && tile_is_full(3, false) && tile_is_full(4, false), "places of uniform codes");
static_assert(tile_is_full(2, true) && tile_is_full(3, true) && tile_is_full(4, true), "places of table codes");
static_assert(tile_is_full(5, false) && tile_is_full(6, false), "places of codes that cross words");
static_assert(tile_is_full(8, false) && tile_is_full(16, false), "places of 8-bit codes and fp16");

// ------------------------------------------------------------------------------------------------------------------ the blob

/**doc
### The block of bytes

    CudaHead | CudaBand[] | CudaPiece[] | Rect[] | permutations | sparse part | data of each piece

The part before the data (`head_nbytes`) is kept in host memory as well: launches are planned from it, without reading the device.
*/
static constexpr uint64_t CUDA_MAGIC = 0x31445543'5851584dull;  // "MXQXCUD1"

struct CudaPiece {
  uint32_t rect, c0, c1;
  Format format;
  uint32_t tiles, groups, pad;
  uint64_t codes, scales, zeros;              // offsets in the blob; `scales` is the tables for lut
  uint64_t code_step, scale_step, zero_step;  // bytes per row block
};

struct CudaBand {
  uint32_t r0, r1;  // rows of the permuted weight
  uint32_t first_piece, pieces;
};

struct CudaHead {
  uint64_t magic, nbytes, head_nbytes;
  uint32_t n, k;
  uint32_t bands, pieces, rects, pad;
  uint64_t off_bands, off_pieces, off_rects;
  uint64_t off_perm_rows, off_row_of, off_perm_cols, off_col_of;  // int32[]; 0: none. perm_*[i]: original place of stored i; *_of: inverse
  uint64_t off_rowptr, off_cols, off_values, nnz;     // CSR in original coordinates; off_rowptr 0: none
};

// No byte of them is left to chance: equal weights give equal blobs.
static_assert(sizeof(CudaPiece) == 80 && sizeof(CudaBand) == 16 && sizeof(CudaHead) == 136, "no padding that is not a field");

}  // namespace mxq
