// The linear kernels, written once; target_*.cpp include this file with their own instruction set. Reading order:
//   prepare: the input as the kernels want it, in float32 or int8
//   finish: sparse part, bias, conversion, scatter
//   linear_a16.inl, linear_a8.inl with linear_gemv8.inl and linear_gemm8.inl: the kernels proper, for one piece of a weight
//   gemv, gemm: one chunk of row tiles, piece after piece
// Sums run in an order that depends on the shape alone, never on the threads.

namespace mxq {
namespace MXQ_TARGET {

// ------------------------------------------------------------------------------------------------------------------- prepare

// One row of x, columns c0 .. c0+cols of the permuted weight, as float32 in out[0 .. padded), zeros behind.
MXQ_INLINE void gather_row(const Job& j, int64_t row, const Slot& s, const int32_t* perm, float* out) {
  const int64_t cols = s.c1 - s.c0, base = row * j.ldx;
  int64_t c = 0;
  if (perm) {
    if (j.type == F32)
      for (; c + 16 <= cols; c += 16) store(out + c, gather((const float*)j.x + base, (const uint32_t*)perm + s.c0 + c));
    for (; c < cols; c++) out[c] = load_one(j.x, base + perm[s.c0 + c], j.type);
  } else {
    for (; c + 16 <= cols; c += 16) store(out + c, load_any(j.x, base + s.c0 + c, j.type));
    for (; c < cols; c++) out[c] = load_one(j.x, base + s.c0 + c, j.type);
  }
  for (; c < (int64_t)s.padded; c++) out[c] = 0.0f;
}

// Sums of x over each group of columns: sums[g][m] from the interleaved x[column][m].
static void sum_groups(const float* x, const Slot& s, int64_t mr, float* sums) {
  for (uint64_t g = 0; g < s.groups; g++) {
    const int64_t c0 = g * s.group, end = c0 + s.group, c1 = end < (int64_t)s.padded ? end : s.padded;  // all multiples of 32
    if (mr == 1) {
      V a = zero(), b = zero();
      for (int64_t c = c0; c < c1; c += 32) a = add(a, load(x + c)), b = add(b, load(x + c + 16));
      sums[g] = hsum(add(a, b));
    } else {
      float* out = sums + g * mr;
      for (int64_t m = 0; m < mr; m++) out[m] = 0.0f;
      for (int64_t c = c0; c < c1; c++)
        for (int64_t m = 0; m < mr; m++) out[m] += x[c * mr + m];
    }
  }
}

// The float slots of one block of rows of x; all of them, or in integer mode those that it reads.
static void prepare_floats(const Job& j, int64_t m0, int64_t mr) {
  const Header& h = header(j.blob);
  const Slot* slots = at<Slot>(j.blob, h.off_slots);
  for (uint32_t i = 0; i < h.slots; i++) {
    const Slot& s = slots[i];
    if (j.a8 && !s.a8) continue;
    const int32_t* perm = h.off_perm_cols && s.layout != ORIGINAL ? at<int32_t>(j.blob, h.off_perm_cols) : nullptr;
    float* out = j.xs + s.start * j.m + s.padded * m0;
    const bool sliced = s.layout == SLICED && !j.gemm;
    if (mr == 1 && !sliced) {  // one column after the other, however it is looked at
      gather_row(j, m0, s, perm, out);
    } else {
      Slot part = s;  // in pieces, so that the rows being interleaved stay in L1
      float rows[16][256];
      for (uint64_t c = 0; c < s.padded; c += 256) {
        const int64_t width = s.padded - c < 256 ? s.padded - c : 256;
        part.c0 = s.c0 + c < s.c1 ? s.c0 + c : s.c1;
        part.c1 = part.c0 + width < s.c1 ? part.c0 + width : s.c1;
        part.padded = width;
        for (int64_t m = 0; m < mr; m++) gather_row(j, m0 + m, part, perm, rows[m]);
        if (sliced) {
          for (int64_t q = 0; q < width / 16; q++)  // code q of a lane
            for (int64_t m = 0; m < mr; m++)
              for (int64_t l = 0; l < 16; l++) out[(c + q * 16) * mr + m * 16 + l] = rows[m][q / 4 * SLICE + 4 * l + q % 4];
        } else {
          for (int64_t m = 0; m < mr; m++)
            for (int64_t d = 0; d < width; d++) out[(c + d) * mr + m] = rows[m][d];
        }
      }
    }
    if (s.group) sum_groups(out, s, mr, j.sums + s.sums * j.m + s.groups * m0);
  }
}

// One group of one row of x as int8: returns its unit, and the sum of its codes in `sum`. in[width] floats, width a multiple of 16.
// Magnitudes below 2^-100 count as zero, so that the inverse of the unit is finite. Of a group that is not finite the unit says all: what its numbers would be
// rounded to is beyond int8, and the sums of such codes beyond int32.
MXQ_INLINE float round_group(const float* in, int64_t width, int8_t* out, int32_t& sum) {
  W most = ints(0), total = ints(0);
  for (int64_t c = 0; c < width; c += 16) most = max_bits(most, load(in + c));
  const float largest = bits_to_float(max_lane(most));
  if (!(largest <= 0x1.fffffep127f)) {
    memset(out, 0, width);
    sum = 0;
    return largest / 127.0f;
  }
  const float inverse = largest < 0x1p-100f ? 0.0f : 127.0f / largest;
  for (int64_t c = 0; c < width; c += 16) {
    const W q = round_to_ints(mul(load(in + c), set1(inverse)));
    total = iadd(total, q);
    store_s8(out + c, q);
  }
  sum = sum_lanes(total);
  return largest < 0x1p-100f ? 0.0f : largest / 127.0f;
}

// The int8 slots of one block: codes [m][column], by groups for gemm, or STRIPED [column/32][m][32].
static void prepare_bytes(const Job& j, int64_t m0, int64_t mr) {
  const Header& h = header(j.blob);
  const Slot8* slots = at<Slot8>(j.blob, h.off_slots8);
  const int32_t* perm = h.off_perm_cols ? at<int32_t>(j.blob, h.off_perm_cols) : nullptr;
  for (uint32_t i = 0; i < h.slots8; i++) {
    const Slot8& s = slots[i];
    for (uint64_t g = 0; g < s.groups; g++) {
      const int64_t c0 = g * s.group, width = (int64_t)s.padded - c0 < s.group ? s.padded - c0 : s.group;
      Slot part{};
      part.c0 = s.c0 + c0 < s.c1 ? s.c0 + c0 : s.c1;
      part.c1 = part.c0 + width < s.c1 ? part.c0 + width : s.c1;
      part.padded = width;
      for (int64_t m = 0; m < mr; m++) {
        float gathered[A8_GROUP];
        const float* in = gathered;
        if (!perm && j.type == F32 && part.c1 - part.c0 == part.padded) in = (const float*)j.x + (m0 + m) * j.ldx + part.c0;
        else gather_row(j, m0 + m, part, perm, gathered);
        const int64_t index = (s.scales + g) * j.m + m0 + m;
        if constexpr (STRIPED) {
          const int64_t first = s.start * j.m + m0 * s.padded + c0 * mr;
          int8_t codes[A8_GROUP];
          j.units[index] = round_group(in, width, codes, j.byte_sums[index]);
          for (int64_t c = 0; c < width; c += STRIPE) memcpy(j.bytes + first + c * mr + m * STRIPE, codes + c, STRIPE);
          j.negatives[index] = (split_signs(codes, width, j.apart + 2 * (first + m * STRIPE), 2 * mr * STRIPE) - j.byte_sums[index]) / 2;
        } else {
          const int64_t to = j.gemm ? c0 * j.m + (m0 + m) * width : (m0 + m) * s.padded + c0;
          j.units[index] = round_group(in, width, j.bytes + s.start * j.m + to, j.byte_sums[index]);
        }
      }
    }
  }
}

static void prepare(const Job& j, int64_t block) {
  const int64_t m0 = block_start(j, block), mr = block_start(j, block + 1) - m0;
  prepare_floats(j, m0, mr);
  if (j.a8) prepare_bytes(j, m0, mr);
}

// -------------------------------------------------------------------------------------------------------------------- finish

// The steps of the sparse part of a tile, and x as they read it: one block of rows, in the original order of its columns.
template <class Column>
struct SparseTile {
  const SparseStep<Column> *step, *end;
  const float* x;

  SparseTile(const Job& j, int64_t tile, int64_t m0) {
    const Header& h = header(j.blob);
    const Slot& s = at<Slot>(j.blob, h.off_slots)[h.slots - 1];  // the ORIGINAL one is always last
    const uint32_t* first = at<uint32_t>(j.blob, h.off_sparse_tiles) + tile;
    x = j.xs + s.start * j.m + s.padded * m0;
    step = at<SparseStep<Column>>(j.blob, h.off_sparse) + first[0], end = at<SparseStep<Column>>(j.blob, h.off_sparse) + first[1];
  }
};

// acc[m * lda + row] += the sparse part of tile `tile` for mr rows of x from m0. What is read behind the mr-th row is not used.
template <class Column>
static void add_sparse_of(const Job& j, int64_t tile, int64_t m0, int64_t mr, float* acc, int64_t lda) {
  V sum[16];  // [row][m]: the rows of x lie side by side
  unroll<16>([&](auto r) MXQ_LAMBDA { sum[decltype(r)::value] = zero(); });
  for (SparseTile<Column> t(j, tile, m0); t.step < t.end; t.step++) {
    float value[16];
    store(value, load_half(t.step->value));
    unroll<16>([&](auto r) MXQ_LAMBDA {
      constexpr int R = decltype(r)::value;
      sum[R] = fma(set1(value[R]), load(t.x + t.step->column[R] * mr), sum[R]);
    });
  }
  float sums[16][16];
  unroll<16>([&](auto r) MXQ_LAMBDA { store(sums[decltype(r)::value], sum[decltype(r)::value]); });
  for (int64_t m = 0; m < mr; m++)
    for (int r = 0; r < 16; r++) acc[m * lda + r] += sums[r][m];
}
static void add_sparse(const Job& j, int64_t tile, int64_t m0, int64_t mr, float* acc, int64_t lda) {
  with_columns(header(j.blob).k, [&](auto c) MXQ_LAMBDA { add_sparse_of<decltype(c)>(j, tile, m0, mr, acc, lda); });
}

// Tiles whose sparse part is added up before their codes are read, for one row of x: a tile's codes drive x out of an L1 cache of 32 KB, and what is
// gathered from all over x would come from L2 again for each tile.
static constexpr int64_t SPARSE_TILES = 8;

// Asks for the steps of a tile.
template <class Column>
MXQ_INLINE void fetch_sparse_of(const Job& j, int64_t tile) {
  const SparseTile<Column> t(j, tile, 0);
  for (const char* line = (const char*)t.step; line < (const char*)t.end; line += 64) __builtin_prefetch(line, 0, 2);
}
MXQ_INLINE void fetch_sparse(const Job& j, int64_t tile) {
  with_columns(header(j.blob).k, [&](auto c) MXQ_LAMBDA { fetch_sparse_of<decltype(c)>(j, tile); });
}

// out[tile][16 rows] = the sparse part of `count` tiles from `tile` for the only row of x. `ahead()` is called before each step, to ask for codes: the
// steps themselves have been fetched, and memory would be idle.
template <class Column, class F>
static void sum_sparse_of(const Job& j, int64_t tile, int64_t count, float* out, F&& ahead) {
  for (int64_t i = 0; i < count; i++) {
    V sum = zero();
    for (SparseTile<Column> t(j, tile + i, 0); t.step < t.end; t.step++) {
      ahead();
      sum = fma(load_half(t.step->value), gather(t.x, t.step->column), sum);
    }
    store(out + 16 * i, sum);
  }
}
template <class F>
static void sum_sparse(const Job& j, int64_t tile, int64_t count, float* out, F&& ahead) {
  with_columns(header(j.blob).k, [&](auto c) MXQ_LAMBDA { sum_sparse_of<decltype(c)>(j, tile, count, out, ahead); });
}

// y = acc + bias for `rows` rows of the weight from row0 (permuted) and mr rows of x from m0; acc[m * lda + row].
// If `scales` is not null, the sums are to be multiplied with these 16 first.
static void finish(const Job& j, int64_t row0, int64_t rows, int64_t m0, int64_t mr, const float* scales, float* acc, int64_t lda) {
  const Header& h = header(j.blob);
  const int32_t* perm = h.off_perm_rows ? at<int32_t>(j.blob, h.off_perm_rows) + row0 : nullptr;
  if (!perm && rows == 16) {
    const V bias = j.bias ? load_any(j.bias, row0, j.bias_type) : zero(), scale = scales ? load(scales) : set1(1.0f);
    for (int64_t m = 0; m < mr; m++) store_any(j.y, (m0 + m) * h.n + row0, j.type, add(mul(scale, load(acc + m * lda)), bias));
  } else {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = perm ? perm[r] : row0 + r;
      const float bias = j.bias ? load_one(j.bias, row, j.bias_type) : 0.0f, scale = scales ? scales[r] : 1.0f;
      for (int64_t m = 0; m < mr; m++) store_one(j.y, (m0 + m) * h.n + row, j.type, scale * acc[m * lda + r] + bias);
    }
  }
}

// A chunk of gemm: tiles of one band, and the sums of all rows of x by its rows.
struct GemmChunk {
  const Piece* pieces;
  int64_t tile0;         // of the weight
  int64_t first, count;  // tiles within the band
  int64_t row0, rows;    // of the permuted weight
  float* acc;            // [m][lda]
  int64_t lda;
};

// The outputs of one block of rows of x; block by block, since the rows of y are far apart, each in a page of its own. scales: [count][16] or null.
static void finish_block(const Job& j, const GemmChunk& k, int64_t m0, int64_t mr, const float* scales) {
  for (int64_t t = 0; t < k.count; t++) {
    const int64_t tile_rows = k.rows - 16 * t < 16 ? k.rows - 16 * t : 16;
    float* acc = k.acc + m0 * k.lda + 16 * t;
    if (header(j.blob).off_rowptr) add_sparse(j, k.tile0 + t, m0, mr, acc, k.lda);
    finish(j, k.row0 + 16 * t, tile_rows, m0, mr, scales ? scales + 16 * t : nullptr, acc, k.lda);
  }
}

}  // namespace MXQ_TARGET
}  // namespace mxq

#include "linear_a16.inl"
#include "linear_a8.inl"
#include "linear_gemv8.inl"
#include "linear_gemm8.inl"

namespace mxq {
namespace MXQ_TARGET {

// ------------------------------------------------------------------------------------------------------------- gemv and gemm

// What finish() will read some tiles later: a line a tile, too seldom for the hardware to see a stream in it.
MXQ_INLINE void fetch_ends(const Job& j, int64_t row0) {
  constexpr int64_t ROWS = 8 * 16;
  const Header& h = header(j.blob);
  if (h.off_perm_rows) __builtin_prefetch(at<int32_t>(j.blob, h.off_perm_rows) + row0 + ROWS);
  else if (j.bias) __builtin_prefetch((const char*)j.bias + (row0 + ROWS) * (j.bias_type == F32 ? 4 : 2));
}

// Scales, zeros and tables about as far ahead as prefetch() is with codes: short runs, a tile apart, that the hardware does not follow.
MXQ_INLINE void fetch_scales_ahead(const Job& j, const Piece& p, int64_t tile, int64_t end) {
  const int64_t steps = column_lanes(p.format) ? 16 : 1;  // to a tile
  tile += 1 + ahead_of<0>() / (steps * (int64_t)p.code_step + 1);
  if (tile >= end) return;
  const uint8_t* scales = j.blob + p.scales + tile * steps * p.scale_step;
  for (int64_t i = 0; i < steps * (int64_t)p.scale_step; i += 64) __builtin_prefetch(scales + i, 0, 2);
  for (int64_t i = 0; i < (int64_t)p.zero_step; i += 64) __builtin_prefetch(j.blob + p.zeros + tile * p.zero_step + i, 0, 2);
}

// The n-th few lines behind those codes that the kernels will have asked for when they come to `tile`.
MXQ_INLINE void fetch_codes(const Job& j, const Piece& p, int64_t tile, int64_t end, int64_t n) {
  constexpr int BYTES = 4 * 64;
  const int64_t step = (column_lanes(p.format) ? 16 : 1) * (int64_t)p.code_step, from = tile * step + ahead_of<0>() + n * BYTES;
  if (from + BYTES > end * step) return;
  unroll<BYTES / 64>([&](auto i) MXQ_LAMBDA { __builtin_prefetch(j.blob + p.codes + from + 64 * decltype(i)::value, 0, 2); });
}

// Whether gemv unpacks the column-lane pieces of a tile before all blocks pass by it.
static bool gemv_unpacks(const Job& j) { return SHORT && j.a8 && j.m > GEMV8_ROWS; }

// Floats for what it unpacks: the column-lane pieces of a band, in their order.
static int64_t gemv_scratch(const Job& j) {
  if (!gemv_unpacks(j)) return 0;
  const Header& h = header(j.blob);
  const Band* bands = at<Band>(j.blob, h.off_bands);
  int64_t most = 0;
  for (uint32_t b = 0; b < h.bands; b++) {
    int64_t floats = 0;
    for (uint32_t i = 0; i < bands[b].pieces; i++) {
      const Piece& p = at<Piece>(j.blob, h.off_pieces)[bands[b].first_piece + i];
      if (column_lanes(p.format)) floats += unpacked_floats(p);
    }
    most = floats > most ? floats : most;
  }
  return most;
}

// Blocks b0 .. b1-1 of x times tiles tile0 .. tile1-1.
static void gemv_blocks(const Job& j, int64_t tile0, int64_t tile1, int64_t b0, int64_t b1, float* scratch) {
  const TileRun run = find_tiles(j.blob, tile0, tile1);
  const int64_t end = tiles(run.band->r1 - run.band->r0);  // prefetching goes on beyond tile1: the next chunk is mostly this thread's as well
  const Piece* pieces = at<Piece>(j.blob, header(j.blob).off_pieces) + run.band->first_piece;
  const bool sparse = header(j.blob).off_rowptr, unpacked = gemv_unpacks(j);
  float sums[SPARSE_TILES * 16];
  for (int64_t i = 0; i < run.count; i++) {
    const int64_t tile = run.first + i, row0 = run.band->r0 + tile * 16, left = run.band->r1 - row0, rows = left < 16 ? left : 16;
    if (sparse && j.m == 1 && i % SPARSE_TILES == 0) {
      const int64_t count = run.count - i < SPARSE_TILES ? run.count - i : SPARSE_TILES;
      uint32_t piece = 0, round = 0;  // a step asks for lines of one piece, the next step for lines of the next
      sum_sparse(j, tile0 + i, count, sums, [&]() MXQ_LAMBDA {
        fetch_codes(j, pieces[piece], tile, end, round);
        if (++piece == run.band->pieces) piece = 0, round++;
      });
    }
    fetch_ends(j, row0);
    if (sparse && j.m == 1 && tile + SPARSE_TILES < end) fetch_sparse(j, tile0 + i + SPARSE_TILES);
    for (uint32_t p = 0; p < run.band->pieces; p++) fetch_scales_ahead(j, pieces[p], tile, end);
    float* to = scratch;
    for (uint32_t p = 0; unpacked && p < run.band->pieces; p++) {
      if (!column_lanes(pieces[p].format)) continue;
      unpack_lut(j, pieces[p], tile, end, rows, to);
      to += unpacked_floats(pieces[p]);
    }
    for (int64_t b = b0; b < b1; b++) {
      const int64_t m0 = block_start(j, b), mr = block_start(j, b + 1) - m0;
      float acc[GEMV_BLOCK * 16] = {0};
      const float* from = scratch;
      for (uint32_t piece = 0; piece < run.band->pieces; piece++) {
        const Piece& p = pieces[piece];
        unroll<GEMV_BLOCK>([&](auto m) MXQ_LAMBDA {
          constexpr int MR = decltype(m)::value + 1;
          if (mr != MR) return;
          if constexpr (SHORT && MR <= GEMV8_BLOCK) {
            if (unpacked && column_lanes(p.format)) {
              gemv8_unpacked<MR>(j, p, from, m0, acc);
              from += unpacked_floats(p);
              return;
            }
          }
          if constexpr (MR <= GEMV8_BLOCK) {
            if (j.a8 && p.format.kind != FLOAT) return gemv8_piece<MR>(j, p, run.band->pieces, tile, end, rows, m0, acc);
          }
          gemv_piece<MR>(j, p, tile, end, rows, m0, acc);
        });
      }
      if (sparse && j.m == 1) store(acc, add(load(acc), load(sums + i % SPARSE_TILES * 16)));
      else if (sparse) add_sparse(j, tile0 + i, m0, mr, acc, 16);
      finish(j, row0, rows, m0, mr, nullptr, acc, 16);
    }
  }
}

// Blocks of x that share a tile's codes while they are in L1 or L2. All of these blocks pass by every tile, so they have to be in L2 themselves.
static int64_t gemv_pass(const Job& j) {
  if (!j.a8) return j.blocks;
  constexpr int64_t BYTES = 256 << 10;
  const int64_t pass = BYTES / ((int64_t)header(j.blob).k * GEMV8_BLOCK);  // not a8 without columns
  return pass < 1 ? 1 : pass;
}

static void gemv(const Job& j, int64_t tile0, int64_t tile1, float* scratch) {
  const int64_t pass = gemv_pass(j);
  for (int64_t b = 0; b < j.blocks; b += pass) gemv_blocks(j, tile0, tile1, b, b + pass < j.blocks ? b + pass : j.blocks, scratch);
}

static int64_t scratch_floats(const Job& j) {
  if (!j.gemm) return gemv_scratch(j);
  return (int64_t)DEPTH * LDP + j.m * 16 * (j.a8 ? GEMM8_TILES : GEMM_TILES) + (j.a8 ? PANEL8 / 4 : 0);
}

static void gemm(const Job& j, int64_t tile0, int64_t tile1, float* scratch) {
  const TileRun run = find_tiles(j.blob, tile0, tile1);
  const Piece* pieces = at<Piece>(j.blob, header(j.blob).off_pieces) + run.band->first_piece;
  const int64_t row0 = run.band->r0 + run.first * 16, left = run.band->r1 - row0, rows = left < run.count * 16 ? left : run.count * 16;
  const int64_t lda = 16 * (j.a8 ? GEMM8_TILES : GEMM_TILES);
  float *panel = scratch, *acc = panel + (int64_t)DEPTH * LDP, *panel8 = acc + j.m * lda;
  const GemmChunk chunk{pieces, tile0, run.first, run.count, row0, rows, acc, lda};
  const auto integer = [&](uint32_t i) MXQ_LAMBDA { return j.a8 && pieces[i].format.kind != FLOAT; };
  if (!integer(0)) memset(acc, 0, sizeof(float) * j.m * lda);  // gemm8 begins sums itself
  for (uint32_t i = 0; i < run.band->pieces; i++) {
    if (integer(i)) {
      if constexpr (GEMV8_MOST < INT64_MAX) gemm8_piece(j, chunk, i, run.band->pieces, (uint8_t*)panel8);
    } else {
      for (int64_t t = 0; t < run.count; t += GEMM_TILES) {
        const int64_t count = run.count - t < GEMM_TILES ? run.count - t : GEMM_TILES;
        if (count == GEMM_TILES) gemm_piece(j, pieces[i], run.first + t, count, rows - 16 * t, panel, acc + 16 * t, lda);
        else for (int64_t u = t; u < t + count; u++) gemm_piece(j, pieces[i], run.first + u, 1, rows - 16 * u, panel, acc + 16 * u, lda);
      }
    }
  }
  if (integer(run.band->pieces - 1)) return;  // gemm8 ends them, too
  for (int64_t b = 0; b < j.blocks; b++) finish_block(j, chunk, block_start(j, b), block_start(j, b + 1) - block_start(j, b), nullptr);
}

}  // namespace MXQ_TARGET

extern const Target MXQ_TARGET_TABLE = {MXQ_TARGET_NAME, {MXQ_TARGET::GEMV_BLOCK, MXQ_TARGET::GEMM_BLOCK, MXQ_TARGET::GEMM_TILES},
                                        {MXQ_TARGET::GEMV8_BLOCK, MXQ_TARGET::GEMM8_BLOCK, MXQ_TARGET::GEMM8_TILES}, MXQ_TARGET::GEMV8_MOST, MXQ_TARGET::VNNI, MXQ_TARGET::APART,
                                        MXQ_TARGET::prepare, MXQ_TARGET::gemv, MXQ_TARGET::gemm, MXQ_TARGET::scratch_floats};

}  // namespace mxq
