// The linear kernels, written once; target_*.cpp include this file with their own instruction set. Reading order:
//   prepare: the input, converted to float32 and laid out for the kernels
//   decoders: how each format's codes become float32 vectors
//   gemv: decode in registers, for few rows of x
//   gemm: decode a panel into the L1 cache, then a plain matrix kernel
//   finish: sparse part, bias, conversion, scatter
// Sums run in an order that depends on the shape alone, never on the threads.

namespace mxq {
namespace MXQ_TARGET {

// ------------------------------------------------------------------------------------------------------------------- prepare

// One row of x, columns c0 .. c0+cols of the permuted weight, as float32 in out[0 .. padded), zeros behind.
MXQ_INLINE void gather_row(const Job& j, int64_t row, const Slot& s, const int32_t* perm, float* out) {
  const int64_t cols = s.c1 - s.c0, base = row * j.ldx;
  int64_t c = 0;
  if (perm) {
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

static void prepare(const Job& j, int64_t block) {
  const Header& h = header(j.blob);
  const int64_t m0 = block_start(j, block), mr = block_start(j, block + 1) - m0;
  const Slot* slots = at<Slot>(j.blob, h.off_slots);
  for (uint32_t i = 0; i < h.slots; i++) {
    const Slot& s = slots[i];
    const int32_t* perm = h.off_perm_cols && s.layout != ORIGINAL ? at<int32_t>(j.blob, h.off_perm_cols) : nullptr;
    float* out = j.xs + s.start * j.m + s.padded * m0;
    if (mr == 1) {  // all layouts agree
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
        if (s.layout == SLICED && !j.gemm) {
          for (int64_t d = 0; d < width; d += 16)
            for (int64_t m = 0; m < mr; m++) store(out + (c + d) * mr + m * 16, load(rows[m] + d));
        } else {
          for (int64_t m = 0; m < mr; m++)
            for (int64_t d = 0; d < width; d++) out[(c + d) * mr + m] = rows[m][d];
        }
      }
    }
    if (s.group) sum_groups(out, s, mr, j.sums + s.sums * j.m + s.groups * m0);
  }
}

// ------------------------------------------------------------------------------------------------------------------ decoders

// A decoder's step() reads BYTES bytes and calls f(Int<i>, vector) for each of STEP columns; STEP divides 32.

template <int BITS, bool SIGNED>
struct Words {  // 2 and 4 bits: one word a step
  static constexpr int STEP = 32 / BITS, BYTES = 64;
  static constexpr bool SCALED = true;
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Book& book, F&& f) {
    const W w = load_words(p);
    unroll<STEP>([&](auto i) MXQ_LAMBDA {
      constexpr int S = BITS * decltype(i)::value;
      if constexpr (SIGNED) f(i, centred<BITS, S>(book, w));
      else f(i, lookup<BITS>(book, shift<S>(w)));
    });
  }
};

template <bool SIGNED>
struct Words<3, SIGNED> {  // 3 bits: a whole stripe, because codes 30 and 31 lie across its words
  static constexpr int STEP = 32, BYTES = 192;
  static constexpr bool SCALED = true;
  template <int S>
  MXQ_INLINE V one(const Book& book, W w) {
    if constexpr (SIGNED) return centred<3, S>(book, w);
    else return lookup<3>(book, shift<S>(w));
  }
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Book& book, F&& f) {
    unroll<3>([&](auto v) MXQ_LAMBDA {
      constexpr int B = 10 * decltype(v)::value;
      const W w = load_words(p + 64 * decltype(v)::value);
      unroll<10>([&](auto i) MXQ_LAMBDA { f(Int<B + decltype(i)::value>{}, one<3 * decltype(i)::value>(book, w)); });
    });
    const W top = load_words(p + 128);
    f(Int<30>{}, one<0>(book, spare<28>(load_words(p), top)));
    f(Int<31>{}, one<0>(book, spare<29>(load_words(p + 64), top)));
  }
};

struct Bytes {  // 8 bits
  static constexpr int STEP = 8, BYTES = 128;
  static constexpr bool SCALED = true;
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Book&, F&& f) {
    unroll<STEP>([&](auto i) MXQ_LAMBDA { f(i, load_s8(p + 16 * decltype(i)::value)); });
  }
};

struct Halves {  // fp16
  static constexpr int STEP = 8, BYTES = 256;
  static constexpr bool SCALED = false;
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Book&, F&& f) {
    unroll<STEP>([&](auto i) MXQ_LAMBDA { f(i, load_half(p + 32 * decltype(i)::value)); });
  }
};

// The table of a uniform or nf format (see formats.h); unused for 8 and 16 bits.
static Book book_of(Format f) {
  float v[16];
  for (int i = 0; i < 16; i++) {
    const int q = i & ((1 << (f.bits & 7)) - 1), half = 1 << ((f.bits - 1) & 7);
    v[i] = f.kind == NF ? NF4_LEVELS[i] : (float)(q < half ? q : q - 2 * half);
  }
  return make_book(load(v));
}

// One tile of 16 rows of a row-lane piece.
struct Tile {
  Format format;
  const uint8_t *codes, *scales, *zeros;
  int64_t padded, width;  // columns; columns of a group
};
MXQ_INLINE Tile tile_of(const uint8_t* blob, const Piece& p, int64_t tile) {
  const int64_t padded = padded_cols(p.format, p.c1 - p.c0);
  return {p.format, blob + p.codes + tile * p.code_step, blob + p.scales + tile * p.scale_step, blob + p.zeros + tile * p.zero_step,
          padded, p.format.group && p.format.group < padded ? p.format.group : padded};
}

// Index of slice p of a stripe or tail of a column-lane row, for the loops that are not worth unrolling.
template <int BITS>
MXQ_INLINE W slice_codes(const uint8_t* words, int p) {
  constexpr int PER = codes_per_word(BITS);
  if (BITS == 3 && p >= 30) {
    const W low = load_words(words + 64 * (p - 30)), top = load_words(words + 128);
    return p == 30 ? spare<28>(low, top) : spare<29>(low, top);
  }
  return shift_by(load_words(words + 64 * (p / PER)), BITS * (p % PER));
}

// ---------------------------------------------------------------------------------------------------------------------- gemv

// Accumulators per row of x: an FMA takes 4 cycles and two start in each, so that about 8 independent sums are needed.
template <int MR>
static constexpr int chains() { return MR == 1 ? GEMV_CHAINS_1 : MR == 2 ? GEMV_CHAINS_2 : MR < GEMV_CHAINS_END ? 2 : 1; }

// Asks for the codes that are due in some 100 ns. The hardware follows a stream by itself, but not across 4 KB pages and not deep enough
// behind this many multiplications: without it M = 4 and 8 take a quarter longer when the weight comes from memory.
static constexpr int AHEAD = 2048;
template <int BYTES>
MXQ_INLINE void prefetch(const uint8_t* codes) {
  unroll<BYTES / 64>([&](auto i) MXQ_LAMBDA { __builtin_prefetch(codes + AHEAD + 64 * decltype(i)::value); });
}

// acc[m][16 rows] += x[m] . tile for MR rows of x, interleaved. With one-hot x the result is the dequantized weight to the last bit:
// s * (d - z*1), where d is a code and everything but the last rounding is exact.
template <class D, int MR>
static void gemv_tile(const Tile& t, const Book& book, const float* x, const float* sums, float* acc) {
  constexpr int U = chains<MR>();
  const uint8_t *codes = t.codes, *scales = t.scales, *zeros = t.zeros;
  V tot[MR];
  unroll<MR>([&](auto m) MXQ_LAMBDA { tot[decltype(m)::value] = load(acc + 16 * decltype(m)::value); });
  for (int64_t c0 = 0; c0 < t.padded; c0 += t.width) {
    const int64_t cols = t.padded - c0 < t.width ? t.padded - c0 : t.width;
    V dot[MR * U];
    unroll<MR * U>([&](auto i) MXQ_LAMBDA { dot[decltype(i)::value] = zero(); });
    for (int64_t c = 0; c < cols; c += D::STEP) {
      prefetch<D::BYTES>(codes);
      D::step(codes, book, [&](auto i, V w) MXQ_LAMBDA {
        constexpr int I = decltype(i)::value;
        unroll<MR>([&](auto m) MXQ_LAMBDA {
          constexpr int A = decltype(m)::value * U + I % U;
          dot[A] = fma(w, set1(x[I * MR + decltype(m)::value]), dot[A]);
        });
      });
      codes += D::BYTES;
      x += D::STEP * MR;
    }
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value * U;
      if constexpr (U == 4) dot[M] = add(add(dot[M], dot[M + 1]), add(dot[M + 2], dot[M + 3]));
      if constexpr (U == 2) dot[M] = add(dot[M], dot[M + 1]);
    });
    if constexpr (!D::SCALED) {
      unroll<MR>([&](auto m) MXQ_LAMBDA { tot[decltype(m)::value] = add(tot[decltype(m)::value], dot[decltype(m)::value * U]); });
    } else {
      const V s = load_scale(scales, t.format.bf16);
      scales += 32;
      if (t.format.zero == INT) {
        const V z = load_s8(zeros);
        zeros += 16;
        unroll<MR>([&](auto m) MXQ_LAMBDA {
          constexpr int M = decltype(m)::value;
          dot[M * U] = fnma(z, set1(sums[M]), dot[M * U]);
        });
        sums += MR;
      } else if (t.format.zero == FLOATZERO) {  // codes are stored centred: put the centre back first
        const V centre = set1((float)(1 << (t.format.bits - 1)));
        unroll<MR>([&](auto m) MXQ_LAMBDA {
          constexpr int M = decltype(m)::value;
          dot[M * U] = fma(centre, set1(sums[M]), dot[M * U]);
        });
      }
      unroll<MR>([&](auto m) MXQ_LAMBDA { tot[decltype(m)::value] = fma(s, dot[decltype(m)::value * U], tot[decltype(m)::value]); });
      if (t.format.zero == FLOATZERO) {
        const V z = load_scale(zeros, t.format.bf16);
        zeros += 32;
        unroll<MR>([&](auto m) MXQ_LAMBDA { tot[decltype(m)::value] = fma(z, set1(sums[decltype(m)::value]), tot[decltype(m)::value]); });
        sums += MR;
      }
    }
  }
  unroll<MR>([&](auto m) MXQ_LAMBDA { store(acc + 16 * decltype(m)::value, tot[decltype(m)::value]); });
}

// Slices of x in one round over the 16 rows of a column-lane tile: MR of them fill half of a 48 KB L1 cache, since every row of the tile
// reads all of them again (one full vector for each FMA, unlike row lanes, where one float serves 16 rows).
template <int MR>
static constexpr int64_t slices_per_round() { return 384 / MR / STRIPE * STRIPE; }

// acc[m][r] += x[m] . row r, for `rows` rows of a column-lane piece; x is sliced.
template <int BITS, int MR>
static void gemv_rows(const uint8_t* codes, int64_t step, const uint8_t* tables, int64_t rows, int64_t slices, const float* x, float* acc) {
  constexpr int U = chains<MR>();
  using D = Words<BITS, false>;
  V sums[16 * MR];  // of a row between rounds, lanes not yet added up
  for (int64_t s0 = 0; s0 < slices; s0 += slices_per_round<MR>()) {
    const bool last = s0 + slices_per_round<MR>() >= slices;
    for (int64_t r = 0; r < rows; r++) {
      const Book book = make_book(load_half(tables + 32 * r));
      const uint8_t* p = codes + step * r + s0 / STRIPE * BITS * 64;
      const float* xs = x + s0 * 16 * MR;
      V dot[MR * U];
      unroll<MR * U>([&](auto i) MXQ_LAMBDA {
        constexpr int I = decltype(i)::value;
        dot[I] = s0 && I % U == 0 ? sums[r * MR + I / U] : zero();
      });
      int64_t left = last ? slices - s0 : slices_per_round<MR>();
      for (; left >= D::STEP; left -= D::STEP) {
        prefetch<D::BYTES>(p);
        D::step(p, book, [&](auto i, V w) MXQ_LAMBDA {
          constexpr int I = decltype(i)::value;
          unroll<MR>([&](auto m) MXQ_LAMBDA {
            constexpr int A = decltype(m)::value * U + I % U;
            dot[A] = fma(w, load(xs + 16 * (I * MR + decltype(m)::value)), dot[A]);
          });
        });
        p += D::BYTES;
        xs += D::STEP * 16 * MR;
      }
      for (int i = 0; i < left; i++, xs += 16 * MR) {
        const V w = lookup<BITS>(book, slice_codes<BITS>(p, i));
        unroll<MR>([&](auto m) MXQ_LAMBDA {
          constexpr int M = decltype(m)::value;
          dot[M * U] = fma(w, load(xs + 16 * M), dot[M * U]);
        });
      }
      unroll<MR>([&](auto m) MXQ_LAMBDA {
        constexpr int M = decltype(m)::value;
        V d = dot[M * U];
        if constexpr (U >= 2) d = add(d, dot[M * U + 1]);
        if constexpr (U == 4) d = add(d, add(dot[M * U + 2], dot[M * U + 3]));
        if (last) acc[16 * M + r] += hsum(d);
        else sums[r * MR + M] = d;
      });
    }
  }
}

// acc += x block . tile `tile` of a piece, whatever its format.
template <int MR>
static void gemv_piece(const Job& j, const Piece& p, int64_t tile, int64_t rows, int64_t m0, float* acc) {
  const Slot& s = at<Slot>(j.blob, header(j.blob).off_slots)[p.slot];
  const float* x = j.xs + s.start * j.m + s.padded * m0;
  if (p.format.kind == LUT) {
    const uint8_t *codes = j.blob + p.codes + tile * 16 * p.code_step, *tables = j.blob + p.scales + tile * 16 * p.scale_step;
    const int64_t slices = s.padded / SLICE;
    switch (p.format.bits) {
      case 2: return gemv_rows<2, MR>(codes, p.code_step, tables, rows, slices, x, acc);
      case 3: return gemv_rows<3, MR>(codes, p.code_step, tables, rows, slices, x, acc);
      default: return gemv_rows<4, MR>(codes, p.code_step, tables, rows, slices, x, acc);
    }
  }
  const Tile t = tile_of(j.blob, p, tile);
  const float* sums = j.sums + s.sums * j.m + s.groups * m0;
  const Book book = book_of(p.format);
  switch (p.format.kind == NF ? 0 : p.format.bits) {
    case 0: return gemv_tile<Words<4, false>, MR>(t, book, x, sums, acc);
    case 2: return gemv_tile<Words<2, true>, MR>(t, book, x, sums, acc);
    case 3: return gemv_tile<Words<3, true>, MR>(t, book, x, sums, acc);
    case 4: return gemv_tile<Words<4, true>, MR>(t, book, x, sums, acc);
    case 8: return gemv_tile<Bytes, MR>(t, book, x, sums, acc);
    default: return gemv_tile<Halves, MR>(t, book, x, sums, acc);
  }
}

// -------------------------------------------------------------------------------------------------------------------- finish

// y = acc + sparse + bias for `rows` rows of the weight from row0 (permuted) and mr rows of x from m0; acc[m * lda + row].
static void finish(const Job& j, int64_t row0, int64_t rows, int64_t m0, int64_t mr, float* acc, int64_t lda) {
  const Header& h = header(j.blob);
  const int32_t* perm = h.off_perm_rows ? at<int32_t>(j.blob, h.off_perm_rows) + row0 : nullptr;
  if (h.off_rowptr) {
    const Slot& s = at<Slot>(j.blob, h.off_slots)[h.slots - 1];  // the ORIGINAL one is always last
    const float* x = j.xs + s.start * j.m + s.padded * m0;
    const int32_t *ptr = at<int32_t>(j.blob, h.off_rowptr), *cols = at<int32_t>(j.blob, h.off_cols);
    const uint16_t* values = at<uint16_t>(j.blob, h.off_values);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = perm ? perm[r] : row0 + r;
      for (int64_t m = 0; m < mr && ptr[row] < ptr[row + 1]; m++) {
        float sum = 0.0f;
        for (int64_t i = ptr[row]; i < ptr[row + 1]; i++) sum += half_to_float(values[i]) * x[cols[i] * mr + m];
        acc[m * lda + r] += sum;
      }
    }
  }
  if (!perm && rows == 16) {
    const V bias = j.bias ? load_any(j.bias, row0, j.bias_type) : zero();
    for (int64_t m = 0; m < mr; m++) store_any(j.y, (m0 + m) * h.n + row0, j.type, add(load(acc + m * lda), bias));
  } else {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = perm ? perm[r] : row0 + r;
      const float bias = j.bias ? load_one(j.bias, row, j.bias_type) : 0.0f;
      for (int64_t m = 0; m < mr; m++) store_one(j.y, (m0 + m) * h.n + row, j.type, acc[m * lda + r] + bias);
    }
  }
}

static void gemv(const Job& j, int64_t tile0, int64_t tile1, float*) {
  const TileRun run = find_tiles(j.blob, tile0, tile1);
  const Piece* pieces = at<Piece>(j.blob, header(j.blob).off_pieces) + run.band->first_piece;
  for (int64_t tile = run.first; tile < run.first + run.count; tile++) {
    const int64_t row0 = run.band->r0 + tile * 16, left = run.band->r1 - row0, rows = left < 16 ? left : 16;
    for (int64_t b = 0; b < j.blocks; b++) {
      const int64_t m0 = block_start(j, b), mr = block_start(j, b + 1) - m0;
      float acc[GEMV_BLOCK * 16] = {0};
      for (uint32_t i = 0; i < run.band->pieces; i++)
        unroll<GEMV_BLOCK>([&](auto m) MXQ_LAMBDA {
          if (mr == decltype(m)::value + 1) gemv_piece<decltype(m)::value + 1>(j, pieces[i], tile, rows, m0, acc);
        });
      finish(j, row0, rows, m0, mr, acc, 16);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------- gemm

// Panel: DEPTH columns of GEMM_TILES row tiles as float32, [column][row]. 256 x 32 floats are 32 KB: it stays in L1 (48 KB) or at worst
// in L2 while all rows of x pass by it, so that a weight is decoded once per MAX_ROWS rows.
static constexpr int DEPTH = 256;
static constexpr int LDP = GEMM_TILES * 16;

// Columns c0 .. c1 of a tile, dequantized exactly as QTensor.dequantize does, to panel[column - c0][LDP].
template <class D>
static void decode_tile(const Tile& t, const Book& book, int64_t c0, int64_t c1, float* panel) {
  const V centre = set1((float)(1 << ((t.format.bits - 1) & 7)));
  for (int64_t c = c0; c < c1;) {
    const int64_t g = c / t.width, end = (g + 1) * t.width < c1 ? (g + 1) * t.width : c1;
    V s = zero(), z = zero();
    if constexpr (D::SCALED) {
      s = load_scale(t.scales + 32 * g, t.format.bf16);
      z = t.format.zero == INT ? load_s8(t.zeros + 16 * g) : t.format.zero == FLOATZERO ? load_scale(t.zeros + 32 * g, t.format.bf16) : z;
    }
    const bool fz = t.format.zero == FLOATZERO;
    for (; c < end; c += D::STEP)
      D::step(t.codes + c / D::STEP * D::BYTES, book, [&](auto i, V w) MXQ_LAMBDA {
        if constexpr (D::SCALED) w = fz ? fma(s, add(w, centre), z) : mul(s, sub(w, z));
        store(panel + (c - c0 + decltype(i)::value) * LDP, w);
      });
  }
}

// The same for `rows` rows of a column-lane piece: 16 columns of 16 rows at a time, turned by a transpose.
template <int BITS>
static void decode_rows(const uint8_t* codes, int64_t step, const uint8_t* tables, int64_t rows, int64_t c0, int64_t c1, float* panel) {
  V block[16];
  for (int i = 0; i < 16; i++) block[i] = zero();
  for (int64_t c = c0; c < c1; c += 16) {
    const int64_t stripe = c / 16 / STRIPE, p = c / 16 % STRIPE;
    for (int64_t r = 0; r < rows; r++)
      block[r] = lookup<BITS>(make_book(load_half(tables + 32 * r)), slice_codes<BITS>(codes + step * r + stripe * BITS * 64, (int)p));
    for (int64_t r = rows; r < 16; r++) block[r] = zero();
    transpose(block);
    for (int i = 0; i < 16; i++) store(panel + (c - c0 + i) * LDP, block[i]);
  }
}

static void decode_panel(const Job& j, const Piece& p, int64_t tile, int64_t rows, int64_t c0, int64_t c1, float* panel) {
  if (p.format.kind == LUT) {
    const uint8_t *codes = j.blob + p.codes + tile * 16 * p.code_step, *tables = j.blob + p.scales + tile * 16 * p.scale_step;
    switch (p.format.bits) {
      case 2: return decode_rows<2>(codes, p.code_step, tables, rows, c0, c1, panel);
      case 3: return decode_rows<3>(codes, p.code_step, tables, rows, c0, c1, panel);
      default: return decode_rows<4>(codes, p.code_step, tables, rows, c0, c1, panel);
    }
  }
  const Tile t = tile_of(j.blob, p, tile);
  const Book book = book_of(p.format);
  switch (p.format.kind == NF ? 0 : p.format.bits) {
    case 0: return decode_tile<Words<4, false>>(t, book, c0, c1, panel);
    case 2: return decode_tile<Words<2, true>>(t, book, c0, c1, panel);
    case 3: return decode_tile<Words<3, true>>(t, book, c0, c1, panel);
    case 4: return decode_tile<Words<4, true>>(t, book, c0, c1, panel);
    case 8: return decode_tile<Bytes>(t, book, c0, c1, panel);
    default: return decode_tile<Halves>(t, book, c0, c1, panel);
  }
}

// acc[m][LDP] += sum over `depth` columns of x[column][m] * panel[column][...], for MR rows of x and NV vectors of 16 rows.
template <int NV, int MR>
static void gemm_block(const float* panel, const float* x, int64_t depth, float* acc) {
  V c[MR * NV];
  unroll<MR * NV>([&](auto i) MXQ_LAMBDA {
    constexpr int I = decltype(i)::value;
    c[I] = load(acc + I / NV * LDP + I % NV * 16);
  });
  for (int64_t d = 0; d < depth; d++, panel += LDP, x += MR) {
    V w[NV];
    unroll<NV>([&](auto v) MXQ_LAMBDA { w[decltype(v)::value] = load(panel + 16 * decltype(v)::value); });
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value;
      const V b = set1(x[M]);
      unroll<NV>([&](auto v) MXQ_LAMBDA { c[M * NV + decltype(v)::value] = fma(w[decltype(v)::value], b, c[M * NV + decltype(v)::value]); });
    });
  }
  unroll<MR * NV>([&](auto i) MXQ_LAMBDA {
    constexpr int I = decltype(i)::value;
    store(acc + I / NV * LDP + I % NV * 16, c[I]);
  });
}

template <int NV>
static void gemm_all_blocks(const Job& j, const float* panel, const float* x, int64_t padded, int64_t c0, int64_t depth, float* acc) {
  for (int64_t b = 0; b < j.blocks; b++) {
    const int64_t m0 = block_start(j, b), mr = block_start(j, b + 1) - m0;
    const float* xb = x + padded * m0 + c0 * mr;
    unroll<GEMM_BLOCK>([&](auto m) MXQ_LAMBDA {
      if (mr == decltype(m)::value + 1) gemm_block<NV, decltype(m)::value + 1>(panel, xb, depth, acc + m0 * LDP);
    });
  }
}

static int64_t gemm_scratch(int64_t m) { return (int64_t)DEPTH * LDP + m * LDP; }

static void gemm(const Job& j, int64_t tile0, int64_t tile1, float* scratch) {
  const TileRun run = find_tiles(j.blob, tile0, tile1);
  const Header& h = header(j.blob);
  const Piece* pieces = at<Piece>(j.blob, h.off_pieces) + run.band->first_piece;
  const Slot* slots = at<Slot>(j.blob, h.off_slots);
  const int64_t row0 = run.band->r0 + run.first * 16, left = run.band->r1 - row0, rows = left < run.count * 16 ? left : run.count * 16;
  float *panel = scratch, *acc = scratch + (int64_t)DEPTH * LDP;
  memset(acc, 0, sizeof(float) * j.m * LDP);
  for (uint32_t i = 0; i < run.band->pieces; i++) {
    const Piece& p = pieces[i];
    const Slot& s = slots[p.slot];
    const float* x = j.xs + s.start * j.m;
    for (int64_t c0 = 0; c0 < (int64_t)s.padded; c0 += DEPTH) {
      const int64_t c1 = c0 + DEPTH < (int64_t)s.padded ? c0 + DEPTH : s.padded;
      for (int64_t t = 0; t < run.count; t++) {
        const int64_t tile_rows = rows - 16 * t < 16 ? rows - 16 * t : 16;
        decode_panel(j, p, run.first + t, tile_rows, c0, c1, panel + 16 * t);
      }
      if (run.count == GEMM_TILES) gemm_all_blocks<GEMM_TILES>(j, panel, x, s.padded, c0, c1 - c0, acc);
      else gemm_all_blocks<1>(j, panel, x, s.padded, c0, c1 - c0, acc);
    }
  }
  for (int64_t b = 0; b < j.blocks; b++) {  // block by block: the rows of y are far apart, each in a page of its own
    const int64_t m0 = block_start(j, b), mr = block_start(j, b + 1) - m0;
    for (int64_t t = 0; t < run.count; t++) {
      const int64_t tile_rows = rows - 16 * t < 16 ? rows - 16 * t : 16;
      finish(j, row0 + 16 * t, tile_rows, m0, mr, acc + m0 * LDP + 16 * t, LDP);
    }
  }
}

}  // namespace MXQ_TARGET

extern const Target MXQ_TARGET_TABLE = {MXQ_TARGET_NAME, MXQ_TARGET::GEMV_BLOCK, MXQ_TARGET::GEMM_BLOCK, MXQ_TARGET::GEMM_TILES,
                                        MXQ_TARGET::prepare, MXQ_TARGET::gemv, MXQ_TARGET::gemm, MXQ_TARGET::gemm_scratch};

}  // namespace mxq
