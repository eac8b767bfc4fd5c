// The constitution: every number format, drawn once. Kernels, packer, tests and docs/formats.md derive from this file.
// The comments that begin with a slash, two stars and "doc" are Markdown; `python docs/make_formats.py` copies them to docs/formats.md.
//
// Included by translation units with different instruction sets, so that everything here has internal linkage (static): a shared
// inline function compiled with AVX-512 could otherwise be the copy that the linker keeps for the code that runs on an old CPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace mxq {

/**doc
# Number formats

A weight `[N, K]` (output rows, input columns) is tiled by rectangles; each rectangle has one format. This page draws every format
twice: the *canonical* layout, which is what a checkpoint stores and never changes, and the *prepacked* layout, which the CPU kernels
read and which is made once at load.

## Names

    w<bits>[g<group>][_asym|_fz][_bf16]    uniform, bits 1 to 6, 8      w4g64  w3g64_asym  w8
    nf4g<group>[_bf16]                     NormalFloat levels            nf4g64
    lut<bits>                              k-means table per output row  lut3
    fp16                                   plain half precision

One bit goes with `_fz` only: weights by their sign are `z = -a`, `s = 2a`.
Groups are 32, 64 or 128 columns, counted from the rectangle's first column; without a `g` the whole row is one group. The last group of
a row may be ragged: it simply covers fewer columns.

## Formulas

`q` is the code of a weight; `s`, `z` are its group's scale and zero.

| format | weight | rounding in float32 |
| --- | --- | --- |
| `w<b>`, symmetric | `s * (q - 2^(b-1))` | exact |
| `w<b>_asym` | `s * (q - z)`, `z` an integer of `b` bits | exact |
| `w<b>_fz` | `s * q + z`, `z` of the scale's type | the sum rounds once |
| `nf4` | `s * level[q]` | the product rounds once |
| `lut<b>` | `table[row][q]`, fp16 | exact |
| `fp16` | the value | exact |

Scales are fp16 (`_bf16`: bfloat16). A kernel that is fed the identity matrix must return these very numbers.
*/
enum Kind : uint8_t { UNIFORM = 0, NF = 1, LUT = 2, FLOAT = 3 };
enum Zero : uint8_t { SYM = 0, INT = 1, FLOATZERO = 2 };

struct Format {
  uint8_t kind;    // Kind
  uint8_t bits;    // code bits: uniform 1 2 3 4 5 6 8, nf 4, lut 2 3 4, float 16
  uint8_t zero;    // Zero; SYM for all but uniform
  uint8_t bf16;    // 1: scales and float zeros are bfloat16, 0: fp16
  uint32_t group;  // columns per scale: 32, 64, 128, or 0 for the whole row
};
static_assert(sizeof(Format) == 8, "Format is stored in the blob");

/**doc
## NF4 levels

Quantiles of the normal distribution scaled to [-1, 1], with an exact zero (Dettmers et al. 2023, QLoRA, appendix E). The index is the code.
The generated table at the end of this page lists them.
*/
static constexpr float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// ---------------------------------------------------------------------------------------------------------------- canonical

/**doc
## Canonical layout (on disk)

A rectangle of `R` rows and `C` columns with `G = ceil(C / group)` groups (1 without a group) stores, in this order:

| tensor | formats | shape and type |
| --- | --- | --- |
| `codes` | all but fp16 | `uint8 [R, ceil(C * bits / 8)]`, bit stream |
| `table` | lut | `fp16 [R, 2^bits]` |
| `scales` | uniform, nf | `fp16` or `bf16 [R, G]` |
| `zeros` | `_asym` | `uint8 [R, ceil(G * bits / 8)]`, bit stream |
| `zeros` | `_fz` | `fp16` or `bf16 [R, G]` |
| `values` | fp16 | `fp16 [R, C]` |

A bit stream has one row of whole bytes per weight row. The code of column `j` occupies bits `[j*bits, (j+1)*bits)` of its row; bit `i` of
the row is bit `i % 8` of byte `i / 8` (least significant first); the bits after the last code are zero. Three bits a code, for example:

    byte        0                       1                       2
    bit         0  1  2  3  4  5  6  7  0  1  2  3  4  5  6  7  0  1  2  3  4  5  6  7
    code       |0      |1      |2          |3      |4      |5          |6      |7      |
*/
static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

static constexpr bool has_scales(Format f) { return f.kind == UNIFORM || f.kind == NF; }
static constexpr int64_t stream_bytes(int bits, int64_t codes) { return ceil_div(codes * bits, 8); }

// Groups in a row of `cols` columns; 0 for formats without scales.
static constexpr int64_t groups(Format f, int64_t cols) { return !has_scales(f) ? 0 : f.group ? ceil_div(cols, f.group) : 1; }
// Bytes of one row of `codes` (of `values` for fp16).
static constexpr int64_t code_row_bytes(Format f, int64_t cols) { return stream_bytes(f.bits, cols); }
// Bytes of one row of `scales`, or of `table` for lut.
static constexpr int64_t scale_row_bytes(Format f, int64_t cols) { return f.kind == LUT ? 2 << f.bits : 2 * groups(f, cols); }
static constexpr int64_t zero_row_bytes(Format f, int64_t cols) {
  return f.zero == INT ? stream_bytes(f.bits, groups(f, cols)) : f.zero == FLOATZERO ? 2 * groups(f, cols) : 0;
}
// All bytes on disk of a rows x cols rectangle.
static constexpr int64_t canonical_nbytes(Format f, int64_t rows, int64_t cols) {
  return rows * (code_row_bytes(f, cols) + scale_row_bytes(f, cols) + zero_row_bytes(f, cols));
}

// Bits per weight at 4096 columns, stated here so that a change of a layout is noticed where it is made.
static constexpr Format W2G64{UNIFORM, 2, SYM, 0, 64}, W3G64_ASYM{UNIFORM, 3, INT, 0, 64}, W4G64{UNIFORM, 4, SYM, 0, 64},
    W4G32_FZ{UNIFORM, 4, FLOATZERO, 0, 32}, W8{UNIFORM, 8, SYM, 0, 0}, NF4G64{NF, 4, SYM, 0, 64}, LUT3{LUT, 3, SYM, 0, 0},
    FP16{FLOAT, 16, SYM, 0, 0};
static_assert(canonical_nbytes(W2G64, 1, 4096) * 8 == 4096 * 2.25, "w2g64: 2 + 16/64");
static_assert(canonical_nbytes(W3G64_ASYM, 1, 4096) * 8 == 4096 * (3 + 19 / 64.0), "w3g64_asym: 3 + (16 + 3)/64");
static_assert(canonical_nbytes(W4G64, 1, 4096) * 8 == 4096 * 4.25, "w4g64: 4 + 16/64");
static_assert(canonical_nbytes(W4G32_FZ, 1, 4096) * 8 == 4096 * 5.0, "w4g32_fz: 4 + 32/32");
static_assert(canonical_nbytes(W8, 1, 4096) * 8 == 4096 * 8 + 16, "w8: 8, and 16 bits a row");
static_assert(canonical_nbytes(NF4G64, 1, 4096) * 8 == 4096 * 4.25, "nf4g64: 4 + 16/64");
static_assert(canonical_nbytes(LUT3, 1, 4096) * 8 == 4096 * 3 + 128, "lut3: 3, and 8 fp16 a row");
static_assert(canonical_nbytes(FP16, 1, 4096) == 8192, "fp16: 16");
static_assert(code_row_bytes(W3G64_ASYM, 577) == 217, "577 codes of 3 bits are 1731 bits: 217 bytes");

// ---------------------------------------------------------------------------------------------------------------- prepacked

/**doc
## Prepacked layout (CPU kernels)

All CPU targets read the same bytes. The unit is the *stripe*: 32 codes for each of 16 lanes, stored as `bits` vectors of 16 little-endian
32-bit words, lane `l` in word `l`. Codes go by *quads*: codes `4*i .. 4*i+3` of a lane lie at the same bit of the four bytes of one word. So
one mask turns a vector into 64 bytes of codes, which is what the integer kernels multiply; and one shift brings a code to the low bits of
its word, where the float kernels look it up in a table (what is left above it is ignored by the lookup; codes of 5, 6 and 8 bits become the
end of a float instead). Quad `i` (0..7), byte `k` (0..3):

    1 bit    word 0     bit 8*k + i
    2 bits   word i/4   bit 8*k + 2*(i%4)
    4 bits   word i/2   bit 8*k + 4*(i%2)
    8 bits   word i     bit 8*k
    3 bits   word i/2   bit 8*k + 3*(i%2)     for i < 6; the two top bits of each byte hold quads 6 and 7:

             byte k of word 0   |7 6|5 4 3|2 1 0|     quad 6 = word0[7:6] + 4 * word1[6]
             byte k of word 1   |7|6|5 4 3|2 1 0|     quad 7 = word2[7:6] + 4 * word1[7]
             byte k of word 2   |7 6|5 4 3|2 1 0|

    5 bits   word i     bit 8*k               for i < 5; the three top bits of each byte hold quads 5, 6 and 7:

             byte k of word 0   |7 6 5|4 3 2 1 0|     quad 5 = 4 * word0[7:5] + word3[6:5]
             byte k of word 1   |7 6 5|4 3 2 1 0|     quad 6 = 4 * word1[7:5] + word4[6:5]
             byte k of word 2   |7 6 5|4 3 2 1 0|     quad 7 = 4 * word2[7:5] + 2 * word3[7] + word4[7]
             byte k of word 3   |7|6 5|4 3 2 1 0|
             byte k of word 4   |7|6 5|4 3 2 1 0|

    6 bits   word i     bit 8*k               for i < 6; the two top bits of each byte hold quads 6 and 7:

             byte k of word i   |7 6|5 4 3 2 1 0|     quad 6 = 16 * word0[7:6] + 4 * word1[7:6] + word2[7:6]
                                                      quad 7 = 16 * word3[7:6] + 4 * word4[7:6] + word5[7:6]

### Row lanes: uniform, nf, fp16

The 16 lanes are 16 rows. Rows are padded to a multiple of 16 and columns to a multiple of 32 (`Kp`). A tile is 16 rows:

    codes    [tile][Kp / 32]   stripe of `bits` vectors (bits * 64 bytes); stripe t, code p is column 32*t + p
             fp16:             [tile][Kp] vectors of 16 fp16, one per row
    scales   [tile][groups]    16 x fp16 or bf16
    zeros    [tile][groups]    _asym: 16 x int8, z - 2^(bits-1);  _fz: 16 x fp16 or bf16

Uniform codes of less than 8 bits are stored centred: `q - 2^(bits-1)` in two's complement, which is `q` with its top bit flipped. So symmetric
formats need no correction at all in the float kernels. Those of 8 bits are stored as they are: the integer kernels multiply unsigned bytes, and
read these straight from memory. Padding is: code 0, scale 0, zero 0; the padded inputs are zero too.

### Column lanes: lut

Each row has a table of its own, so the 16 lanes are columns of one row. A *slice* is 64 neighbouring columns, one quad of all 16 lanes: lane
`l`, byte `k` is column `4*l + k` of the slice. 8 slices (512 columns) make a stripe. The slices after the last full stripe are stored in as
many vectors as they need (4, 2 or 2 slices each for 2, 3, 4 bits), as a full stripe if that is no larger.

    table    [row]             16 x fp16, the 2^bits entries repeated until 16 are full; the same 16 as int8 in units of their largest
                               magnitude / 127; that unit as float32; 12 bytes of padding
    codes    [row][vectors]    64 bytes each

Codes are stored as they are; columns are padded to a multiple of 64 with code 0.

### Integer activations (a8)

The input is cut into groups of columns: those of the weight's format, or 128 columns where a row has one scale or a table (256 for w8), counted
from the rectangle's first column. Each group of each row of x is rounded to int8 in units of its largest magnitude / 127; nf levels are rounded to
multiples of 1/127, lut tables as above. Products are summed in int32, exactly, and scaled in float32 once a group. fp16 rectangles and the
sparse part read the input unrounded.
*/
static constexpr int LANES = 16;     // lanes of a vector
static constexpr int STRIPE = 32;    // codes per lane in a stripe
static constexpr int SLICE = 64;     // columns of a slice of a lut row
static constexpr int LUT_BYTES = 64; // table, int8 table, its unit, padding

// Columns of x that share a scale in integer mode; at most A8_GROUP.
static constexpr int A8_GROUP = 256;
static constexpr uint32_t a8_group(Format f) { return f.group ? f.group : f.kind == UNIFORM && f.bits == 8 ? A8_GROUP : 128; }

// Quads that one vector holds whole: 8, 4, 2, 2, 1, 1, 1 of 1 to 6 and 8 bits.
static constexpr int quads_per_word(int bits) { return 32 / bits / 4; }
static constexpr bool column_lanes(Format f) { return f.kind == LUT; }
static constexpr int64_t tiles(int64_t rows) { return ceil_div(rows, LANES); }
static constexpr int64_t padded_cols(Format f, int64_t cols) { return round_up(cols, column_lanes(f) ? SLICE : STRIPE); }
// Bytes of the codes of one tile (16 rows) of a row-lane format.
static constexpr int64_t tile_code_bytes(Format f, int64_t cols) { return padded_cols(f, cols) * f.bits * LANES / 8; }
static constexpr int64_t tile_scale_bytes(Format f, int64_t cols) { return groups(f, cols) * LANES * 2; }
static constexpr int64_t tile_zero_bytes(Format f, int64_t cols) {
  return f.zero == INT ? groups(f, cols) * LANES : f.zero == FLOATZERO ? groups(f, cols) * LANES * 2 : 0;
}
// Vectors of 64 bytes that hold the codes of one row of a column-lane format.
static constexpr int64_t row_vectors(int bits, int64_t cols) {
  const int64_t slices = ceil_div(cols, SLICE), rest = ceil_div(slices % 8, quads_per_word(bits));
  return slices / 8 * bits + (rest < bits ? rest : bits);
}

static_assert(tile_code_bytes(W4G64, 33) == 64 * 4 * 16 / 8, "33 columns are padded to 64");
static_assert(row_vectors(3, 512) == 3 && row_vectors(3, 448) == 3 && row_vectors(3, 384) == 3 && row_vectors(3, 256) == 2, "lut3 tails");
static_assert(row_vectors(4, 576) == 5 && row_vectors(2, 576) == 3, "lut4, lut2: one stripe and one slice");

}  // namespace mxq
