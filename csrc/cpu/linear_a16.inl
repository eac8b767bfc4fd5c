// The float kernels: codes become float32 vectors, products and sums are float32. Included by linear.inl.
//   decoders: how each format's codes become float32 vectors
//   gemv: decode in registers, for few rows of x
//   gemm: decode a panel into the L1 cache, then a plain matrix kernel

namespace mxq {
namespace MXQ_TARGET {

// ------------------------------------------------------------------------------------------------------------------ decoders

// A decoder's step() reads BYTES bytes and calls f(Int<i>, vector) for each of STEP columns; STEP divides 32.

template <int BITS, bool SIGNED>
struct Words {  // 1, 2 and 4 bits: one word a step
  static_assert(BITS == 1 || BITS == 2 || BITS == 4, "others lie across words, or are too many for a table");
  static constexpr int STEP = 32 / BITS, BYTES = 64;
  static constexpr bool SCALED = true;
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Book& book, F&& f) {
    const W w = load_words(p);
    if constexpr (BITS == 2 && PAIRS) {  // one shift for two codes
      const Book upper = upper_code(book);
      unroll<8>([&](auto i) MXQ_LAMBDA {
        constexpr int K = decltype(i)::value % 4, Q = decltype(i)::value / 4 * 2, I = 4 * Q + K;
        const W both = shift<8 * K + 2 * Q>(w);
        f(Int<I>{}, lookup<2>(book, both));
        f(Int<I + 4>{}, lookup<2>(upper, both));
      });
    } else {
      unroll<STEP>([&](auto i) MXQ_LAMBDA {
        constexpr int I = decltype(i)::value, S = 8 * (I % 4) + BITS * (I / 4);
        if constexpr (SIGNED) f(i, centred<BITS, S>(book, w));
        else f(i, lookup<BITS>(book, shift<S>(w)));
      });
    }
  }
};

template <bool SIGNED>
struct Words<3, SIGNED> {  // 3 bits: a whole stripe, because quads 6 and 7 lie across its words
  static constexpr int STEP = 32, BYTES = 192;
  static constexpr bool SCALED = true;
  template <int S>
  MXQ_INLINE V one(const Book& book, W w) {
    if constexpr (SIGNED) return centred<3, S>(book, w);
    else return lookup<3>(book, shift<S>(w));
  }
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Book& book, F&& f) {
    const W w0 = load_words(p), w1 = load_words(p + 64), w2 = load_words(p + 128);
    // Column after column: neighbours go to different sums.
    unroll<8>([&](auto i) MXQ_LAMBDA { f(i, one<8 * (decltype(i)::value % 4) + 3 * (decltype(i)::value / 4)>(book, w0)); });
    unroll<8>([&](auto i) MXQ_LAMBDA { f(Int<decltype(i)::value + 8>{}, one<8 * (decltype(i)::value % 4) + 3 * (decltype(i)::value / 4)>(book, w1)); });
    unroll<8>([&](auto i) MXQ_LAMBDA { f(Int<decltype(i)::value + 16>{}, one<8 * (decltype(i)::value % 4) + 3 * (decltype(i)::value / 4)>(book, w2)); });
    const W q6 = merge3<false>(shift<6>(w0), shift<4>(w1)), q7 = merge3<false>(shift<6>(w2), shift<5>(w1));
    unroll<4>([&](auto k) MXQ_LAMBDA {
      constexpr int K = decltype(k)::value;
      f(Int<24 + K>{}, lookup<3>(book, shift<8 * K>(q6)));
      f(Int<28 + K>{}, lookup<3>(book, shift<8 * K>(q7)));
    });
  }
};

// The BITS bits at bit P of each lane, less the middle of their range; CENTRED: their top bit is stored flipped. With the exponent of 2^(23 - P) set above
// them they are the last bits of a float of that size: two operations, where widening the sign and converting takes three.
template <int BITS, int P, bool CENTRED>
MXQ_INLINE V number(W w) {
  static_assert(P + BITS <= 23, "a float has 23 bits below its exponent");
  constexpr uint32_t MASK = ((1u << BITS) - 1) << P, SET = (150u - P) << 23 | (CENTRED ? 1u << (P + BITS - 1) : 0);
  return sub(as_floats(field<MASK, SET>(w)), set1((float)(1 << (23 - P)) + (float)(1 << (BITS - 1))));
}
// f(Int<byte>, number at bit S of that byte) for the four bytes of a word.
template <int BITS, int S, bool CENTRED, class F>
MXQ_INLINE void four_numbers(W w, F&& f) {
  const W upper = shift<16>(w);
  f(Int<0>{}, number<BITS, S, CENTRED>(w));
  f(Int<1>{}, number<BITS, S + 8, CENTRED>(w));
  f(Int<2>{}, number<BITS, S, CENTRED>(upper));
  f(Int<3>{}, number<BITS, S + 8, CENTRED>(upper));
}

// The quads of 5 and 6 bits that lie across the words of a stripe (formats.h): calls f(Int<quad>, bytes), each code in the upper bits of its byte.
template <int BITS, class F>
MXQ_INLINE void across(const W* w, F&& f) {
  if constexpr (BITS == 5) {
    f(Int<5>{}, merge<0x18181818u>(w[0], shift<2>(w[3])));
    f(Int<6>{}, merge<0x18181818u>(w[1], shift<2>(w[4])));
    f(Int<7>{}, merge<0x08080808u>(merge<0x10101010u>(w[2], shift<3>(w[3])), shift<4>(w[4])));
  } else {
    f(Int<6>{}, merge<0x0c0c0c0cu>(merge<0x30303030u>(w[0], shift<2>(w[1])), shift<4>(w[2])));
    f(Int<7>{}, merge<0x0c0c0c0cu>(merge<0x30303030u>(w[3], shift<2>(w[4])), shift<4>(w[5])));
  }
}

template <int BITS>
struct Stripes {  // 5 and 6 bits
  static constexpr int STEP = 32, BYTES = BITS * 64;
  static constexpr bool SCALED = true;
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Book&, F&& f) {
    W w[BITS];
    unroll<BITS>([&](auto v) MXQ_LAMBDA {
      constexpr int Q = decltype(v)::value;
      w[Q] = load_words(p + 64 * Q);
      four_numbers<BITS, 0, true>(w[Q], [&](auto k, V d) MXQ_LAMBDA { f(Int<4 * Q + decltype(k)::value>{}, d); });
    });
    across<BITS>(w, [&](auto q, W u) MXQ_LAMBDA {
      four_numbers<BITS, 8 - BITS, true>(u, [&](auto k, V d) MXQ_LAMBDA { f(Int<4 * decltype(q)::value + decltype(k)::value>{}, d); });
    });
  }
};

template <bool CENTRED>
struct Codes8 {  // 8 bits; those of weights are not centred in memory, those of pages are
  static constexpr int STEP = 4, BYTES = 64;
  static constexpr bool SCALED = true;
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Book&, F&& f) {
    four_numbers<8, 0, CENTRED>(load_words(p), f);
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

// The table of a uniform or nf format (see formats.h); unused for more than 4 bits. Constants: a piece of a mixed weight may be a tile of few columns.
static constexpr float CENTRED_1[16] = {0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1};
static constexpr float CENTRED_2[16] = {0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1};
static constexpr float CENTRED_3[16] = {0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1};
static constexpr float CENTRED_4[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
MXQ_INLINE Book book_of(Format f) {
  return make_book(load(f.kind == NF ? NF4_LEVELS : f.bits == 1 ? CENTRED_1 : f.bits == 2 ? CENTRED_2 : f.bits == 3 ? CENTRED_3 : CENTRED_4));
}

// One tile of 16 rows of a row-lane piece.
struct Tile {
  Format format;
  const uint8_t *codes, *scales, *zeros;
  int64_t padded, width;  // columns; columns of a group
  const uint8_t* stop;    // what lies behind is not worth a prefetch
};
MXQ_INLINE Tile tile_of(const uint8_t* blob, const Piece& p, int64_t tile, const uint8_t* stop = nullptr) {
  const int64_t padded = padded_cols(p.format, p.c1 - p.c0);
  return {p.format, blob + p.codes + tile * p.code_step, blob + p.scales + tile * p.scale_step, blob + p.zeros + tile * p.zero_step,
          padded, p.format.group && p.format.group < padded ? p.format.group : padded, stop};
}
// Where the codes of tile `end` would begin.
MXQ_INLINE const uint8_t* codes_end(const Job& j, const Piece& p, int64_t end) {
  return j.blob + p.codes + end * (column_lanes(p.format) ? 16 : 1) * (int64_t)p.code_step;
}

// Index (in the low bits) of code p of a stripe or tail of a column-lane row, for the loops that are not worth unrolling.
template <int BITS>
MXQ_INLINE W stripe_code(const uint8_t* words, int p) {
  const int i = p / 4, k = p % 4;
  if (BITS == 3 && i >= 6) return shift_by(merge3<false>(shift<6>(load_words(words + (i == 6 ? 0 : 128))), shift_by(load_words(words + 64), i - 2)), 8 * k);
  constexpr int PER = quads_per_word(BITS);
  return shift_by(load_words(words + 64 * (i / PER)), 8 * k + BITS * (i % PER));
}

// ---------------------------------------------------------------------------------------------------------------------- gemv

// Accumulators per row of x: an FMA takes 4 cycles and two start in each, so that about 8 independent sums are needed.
template <int MR>
static constexpr int chains() { return MR == 1 ? GEMV_CHAINS_1 : MR == 2 ? GEMV_CHAINS_2 : MR < GEMV_CHAINS_END ? 2 : 1; }

// Sum of U vectors, U a power of two.
template <int U>
MXQ_INLINE V sum_of(const V* v) {
  if constexpr (U == 1) return v[0];
  else return add(sum_of<U / 2>(v), sum_of<U / 2>(v + U / 2));
}

// Asks for the codes that are due in some 300 ns. The hardware follows a stream by itself, but not across 4 KB pages and not deep enough: at
// 4096 x 4096 on Zen 5 w4g128 a8 M = 1 takes 0.23 ms without it or 2 KB ahead, 0.22 at 4 KB, 0.19 from 8 KB on; w2g128 0.14, 0.12, 0.10, and 0.085 at 16 KB.
// Into L2: an L1 of 32 KB has no room for them beside x and the codes at hand. On Zen 4 w2g128 takes 0.8, column bands with a sparse part 0.65 of the
// time that they take with the same distance into L1; wide codes take 0.93 to 0.97 at half the distance.
template <int BYTES>
static constexpr int ahead_of() { return BYTES < 256 ? 16384 : 8192; }
// Nothing from `stop` on, where another thread's tiles or another layer's bytes begin.
template <int BYTES>
MXQ_INLINE void prefetch(const uint8_t* codes, const uint8_t* stop) {
  constexpr int AHEAD = ahead_of<BYTES>();
  if (codes + AHEAD >= stop) return;
  unroll<BYTES / 64>([&](auto i) MXQ_LAMBDA { __builtin_prefetch(codes + AHEAD + 64 * decltype(i)::value, 0, 2); });
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
      prefetch<D::BYTES>(codes, t.stop);
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
      dot[M] = sum_of<U>(dot + M);
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

// Codes of a lane in one round over the 16 rows of a column-lane tile: MR vectors of x each fill half of a 48 KB L1 cache, since every row of the tile
// reads all of them again (one full vector for each FMA, unlike row lanes, where one float serves 16 rows).
template <int MR>
static constexpr int64_t codes_per_round() { return 384 / MR / STRIPE * STRIPE; }

// acc[m][r] += x[m] . row r, for `rows` rows of a column-lane piece of `codes` codes a lane; x is sliced.
template <int BITS, int MR>
static void gemv_rows(const uint8_t* words, int64_t step, const uint8_t* tables, int64_t rows, int64_t codes, const uint8_t* stop, const float* x, float* acc) {
  constexpr int U = chains<MR>();
  using D = Words<BITS, false>;
  V sums[16 * MR];  // of a row between rounds, lanes not yet added up
  for (int64_t s0 = 0; s0 < codes; s0 += codes_per_round<MR>()) {
    const bool last = s0 + codes_per_round<MR>() >= codes;
    for (int64_t r = 0; r < rows; r++) {
      const Book book = make_book(load_half(tables + LUT_BYTES * r));
      const uint8_t* p = words + step * r + s0 / STRIPE * BITS * 64;
      const float* xs = x + s0 * 16 * MR;
      V dot[MR * U];
      unroll<MR * U>([&](auto i) MXQ_LAMBDA {
        constexpr int I = decltype(i)::value;
        dot[I] = s0 && I % U == 0 ? sums[r * MR + I / U] : zero();
      });
      int64_t left = last ? codes - s0 : codes_per_round<MR>();
      for (; left >= D::STEP; left -= D::STEP) {
        prefetch<D::BYTES>(p, stop);
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
        const V w = lookup<BITS>(book, stripe_code<BITS>(p, i));
        unroll<MR>([&](auto m) MXQ_LAMBDA {
          constexpr int M = decltype(m)::value;
          dot[M * U] = fma(w, load(xs + 16 * M), dot[M * U]);
        });
      }
      unroll<MR>([&](auto m) MXQ_LAMBDA {
        constexpr int M = decltype(m)::value;
        const V d = sum_of<U>(dot + M * U);
        if (last) acc[16 * M + r] += hsum(d);
        else sums[r * MR + M] = d;
      });
    }
  }
}

// acc += x block . tile `tile` of a piece, whatever its format; the chunk goes on to tile `end`.
template <int MR>
static void gemv_piece(const Job& j, const Piece& p, int64_t tile, int64_t end, int64_t rows, int64_t m0, float* acc) {
  const Slot& s = at<Slot>(j.blob, header(j.blob).off_slots)[p.slot];
  const float* x = j.xs + s.start * j.m + s.padded * m0;
  if (p.format.kind == LUT) {
    const uint8_t *codes = j.blob + p.codes + tile * 16 * p.code_step, *tables = j.blob + p.scales + tile * 16 * p.scale_step;
    const int64_t lane_codes = s.padded / LANES;
    switch (p.format.bits) {
      case 2: return gemv_rows<2, MR>(codes, p.code_step, tables, rows, lane_codes, codes_end(j, p, end), x, acc);
      case 3: return gemv_rows<3, MR>(codes, p.code_step, tables, rows, lane_codes, codes_end(j, p, end), x, acc);
      default: return gemv_rows<4, MR>(codes, p.code_step, tables, rows, lane_codes, codes_end(j, p, end), x, acc);
    }
  }
  const Tile t = tile_of(j.blob, p, tile, codes_end(j, p, end));
  const float* sums = j.sums + s.sums * j.m + s.groups * m0;
  const Book book = book_of(p.format);
  switch (p.format.kind == NF ? 0 : p.format.bits) {
    case 0: return gemv_tile<Words<4, false>, MR>(t, book, x, sums, acc);
    case 1: return gemv_tile<Words<1, true>, MR>(t, book, x, sums, acc);
    case 2: return gemv_tile<Words<2, true>, MR>(t, book, x, sums, acc);
    case 3: return gemv_tile<Words<3, true>, MR>(t, book, x, sums, acc);
    case 4: return gemv_tile<Words<4, true>, MR>(t, book, x, sums, acc);
    case 5: return gemv_tile<Stripes<5>, MR>(t, book, x, sums, acc);
    case 6: return gemv_tile<Stripes<6>, MR>(t, book, x, sums, acc);
    case 8: return gemv_tile<Codes8<false>, MR>(t, book, x, sums, acc);
    default: return gemv_tile<Halves, MR>(t, book, x, sums, acc);
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
static void decode_rows(const uint8_t* words, int64_t step, const uint8_t* tables, int64_t rows, int64_t c0, int64_t c1, float* panel) {
  V block[16];
  for (int i = 0; i < 16; i++) block[i] = zero();
  for (int64_t q = c0 / 16; q < c1 / 16; q++) {  // code q of a lane: slice q/4, byte q%4
    for (int64_t r = 0; r < rows; r++)
      block[r] = lookup<BITS>(make_book(load_half(tables + LUT_BYTES * r)), stripe_code<BITS>(words + step * r + q / STRIPE * BITS * 64, (int)(q % STRIPE)));
    for (int64_t r = rows; r < 16; r++) block[r] = zero();
    transpose(block);
    for (int i = 0; i < 16; i++) store(panel + (q / 4 * SLICE + 4 * i + q % 4 - c0) * LDP, block[i]);
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
    case 1: return decode_tile<Words<1, true>>(t, book, c0, c1, panel);
    case 2: return decode_tile<Words<2, true>>(t, book, c0, c1, panel);
    case 3: return decode_tile<Words<3, true>>(t, book, c0, c1, panel);
    case 4: return decode_tile<Words<4, true>>(t, book, c0, c1, panel);
    case 5: return decode_tile<Stripes<5>>(t, book, c0, c1, panel);
    case 6: return decode_tile<Stripes<6>>(t, book, c0, c1, panel);
    case 8: return decode_tile<Codes8<false>>(t, book, c0, c1, panel);
    default: return decode_tile<Halves>(t, book, c0, c1, panel);
  }
}

// acc[m][lda] += sum over `depth` columns of x[column][m] * panel[column][...], for MR rows of x and NV vectors of 16 rows.
template <int NV, int MR>
static void gemm_block(const float* panel, const float* x, int64_t depth, float* acc, int64_t lda) {
  V c[MR * NV];
  unroll<MR * NV>([&](auto i) MXQ_LAMBDA {
    constexpr int I = decltype(i)::value;
    c[I] = load(acc + I / NV * lda + I % NV * 16);
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
    store(acc + I / NV * lda + I % NV * 16, c[I]);
  });
}

template <int NV>
static void gemm_all_blocks(const Job& j, const float* panel, const float* x, int64_t padded, int64_t c0, int64_t depth, float* acc, int64_t lda) {
  for (int64_t b = 0; b < j.blocks; b++) {
    const int64_t m0 = block_start(j, b), mr = block_start(j, b + 1) - m0;
    const float* xb = x + padded * m0 + c0 * mr;
    unroll<GEMM_BLOCK>([&](auto m) MXQ_LAMBDA {
      if (mr == decltype(m)::value + 1) gemm_block<NV, decltype(m)::value + 1>(panel, xb, depth, acc + m0 * lda, lda);
    });
  }
}

// acc[m][lda] += x . the `count` row tiles (at most GEMM_TILES) of a piece from `first`; `rows` rows of the weight are left from there on.
static void gemm_piece(const Job& j, const Piece& p, int64_t first, int64_t count, int64_t rows, float* panel, float* acc, int64_t lda) {
  const Slot& s = at<Slot>(j.blob, header(j.blob).off_slots)[p.slot];
  const float* x = j.xs + s.start * j.m;
  for (int64_t c0 = 0; c0 < (int64_t)s.padded; c0 += DEPTH) {
    const int64_t c1 = c0 + DEPTH < (int64_t)s.padded ? c0 + DEPTH : s.padded;
    for (int64_t t = 0; t < count; t++) {
      const int64_t tile_rows = rows - 16 * t < 16 ? rows - 16 * t : 16;
      decode_panel(j, p, first + t, tile_rows, c0, c1, panel + 16 * t);
    }
    if (count == GEMM_TILES) gemm_all_blocks<GEMM_TILES>(j, panel, x, s.padded, c0, c1 - c0, acc, lda);
    else gemm_all_blocks<1>(j, panel, x, s.padded, c0, c1 - c0, acc, lda);
  }
}

}  // namespace MXQ_TARGET
}  // namespace mxq
