// Integer kernels for few rows of x (on AVX2 for any number of them): codes are unpacked in registers, anew for each block of rows. Included by linear.inl.

namespace mxq {
namespace MXQ_TARGET {

// Products are added up in 16 bits first where they can be, and bytes of 8 bits multiplied as dot_apart() does. Quads that may be added up, if no
// byte is larger than `largest` (0: bytes of 8 bits, which may not): see dot_run().
static constexpr int run_of(int largest) {
  constexpr int ROOM = 32767 / (2 * 127);
  return largest * 8 <= ROOM ? 8 : largest * 4 <= ROOM ? 4 : largest * 2 <= ROOM ? 2 : 1;
}
// Adds the Q-th quad of a stripe to `sum`, or to `part` first.
template <int LARGEST, int Q>
MXQ_INLINE void dot_quad(W& sum, W& part, W u, const int8_t* x) {
  if constexpr (VNNI) sum = dot_four(sum, u, x);
  else if constexpr (LARGEST) dot_run<run_of(LARGEST), Q>(sum, part, u, four_bytes(x));
  else if constexpr (APART) sum = dot_apart_four(sum, u, x);
  else sum = dot_signed(sum, u, four_bytes(x));
}

// acc[m][16 rows] += x[m] . tile.
template <class D, int MR>
static void gemv8_tile(const Tile& t, const Bytes& table, const Input8& in, bool late, float* acc) {
  // Sums by shift; the last one for the odd quads that come unshifted, when there are registers for it: a sum takes one addition in 4 cycles.
  constexpr int SLOTS = 9;
  constexpr bool SPLIT = VNNI && (MR < 3 || D::SHIFTS == 1);
  constexpr bool BY_SIGN = APART && !D::LARGEST;
  constexpr int64_t ROW = BY_SIGN ? 2 * STRIPE : STRIPE;  // bytes of a stripe of x
  const int64_t next_row = STRIPED ? ROW : in.stride;
  const uint8_t* codes = t.codes;
  const int8_t* x = BY_SIGN ? in.apart : in.bytes;
  const int offset = D::OFFSET - (t.format.zero == FLOATZERO ? 1 << (t.format.bits - 1) : 0);
  const float unit = t.format.kind == NF ? 1.0f / 127.0f : 1.0f;
  V tot[MR];
  unroll<MR>([&](auto m) MXQ_LAMBDA { tot[decltype(m)::value] = load(acc + 16 * decltype(m)::value); });
  for (int64_t g = 0, c0 = 0; c0 < t.padded; g++, c0 += in.group) {
    const int64_t cols = t.padded - c0 < in.group ? t.padded - c0 : in.group;
    const float* units = in.units + g * in.step;
    const int32_t* sums = in.sums + g * in.step;
    W dots[MR * SLOTS], parts[SHORT ? MR : 1];
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value;
      dots[M * SLOTS] = ints(-offset * sums[M] + (BY_SIGN ? in.negatives[g * in.step + M] : 0));
      unroll<SLOTS - 1>([&](auto s) MXQ_LAMBDA { dots[M * SLOTS + 1 + decltype(s)::value] = ints(0); });
    });
    for (int64_t c = 0; c < cols; c += STRIPE, x += STRIPED ? MR * ROW : ROW, codes += D::BYTES) {
      prefetch<D::BYTES>(codes, t.stop);
      D::step(codes, table, [&](auto q, auto s, W u) MXQ_LAMBDA {
        constexpr int Q = decltype(q)::value, S = decltype(s)::value == 0 && Q % 2 && SPLIT ? 8 : decltype(s)::value;
        unroll<MR>([&](auto m) MXQ_LAMBDA {
          constexpr int M = decltype(m)::value;
          dot_quad<D::LARGEST, Q>(dots[M * SLOTS + S], parts[SHORT ? M : 0], u, x + M * next_row + 4 * Q);
        });
      });
    }
    GroupScale s = group_scale(t, g);
    if (late) s.scale = set1(1.0f);
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value;
      W d = dots[M * SLOTS];
      if constexpr (SPLIT) d = iadd(d, dots[M * SLOTS + 8]);
      unroll<7>([&](auto i) MXQ_LAMBDA {
        constexpr int S = decltype(i)::value + 1;
        if constexpr (D::SHIFTS >> S & 1) d = iadd(d, sra<S>(dots[M * SLOTS + S]));
      });
      tot[M] = add_group(t.format, s, to_float(d), unit * units[M], sums[M], tot[M]);
    });
  }
  const V scale = late ? group_scale(t, 0).scale : set1(1.0f);
  unroll<MR>([&](auto m) MXQ_LAMBDA { store(acc + 16 * decltype(m)::value, mul(scale, tot[decltype(m)::value])); });
}

// out[16 * 16 * m] = x[m] times one row of a column-lane piece, in 16 parts, to be added up and multiplied with the row's unit; the table's BIAS
// is still in it, or the negatives are missing. A group is two quads. Several sums take turns, since each takes one group in 4 cycles.
template <int BITS, int MR>
static void gemv8_row(const uint8_t* p, const uint8_t* row, const Input8& in, const uint8_t* stop, float* out) {
  static_assert(a8_group({LUT, 4, SYM, 0, 0}) == 2 * SLICE, "a group is two quads");
  constexpr int TURNS = MR > 2 ? 1 : MR == 2 ? 2 : 4;
  using D = LutQuads<BITS>;
  constexpr int64_t ROW = APART ? 2 * STRIPE : STRIPE, STEP = STRIPED ? MR * ROW : ROW, QUAD = SLICE / STRIPE * STEP;  // bytes of x
  const int64_t next_row = STRIPED ? ROW : in.stride;
  const D table = D::of(row);
  const int8_t* x = APART ? in.apart : in.bytes;
  const float* units = in.units;
  RowFloats tot[MR * TURNS];
  RowInts d[MR];
  unroll<MR * TURNS>([&](auto i) MXQ_LAMBDA { tot[decltype(i)::value] = row_floats(); });
  const auto add_quad = [&](auto first, W u, const int8_t* xq) MXQ_LAMBDA {
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value;
      const int8_t* const xm = xq + M * next_row;
      if constexpr (APART) dot_apart<decltype(first)::value>(d[M], u, xm, STEP);
      else d[M] = dot_value<false>(decltype(first)::value ? ints(0) : d[M], u, load_words(xm));
    });
  };
  const auto end = [&](auto turn, int64_t g) MXQ_LAMBDA {
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value, T = M * TURNS + decltype(turn)::value;
      tot[T] = row_fma(d[M], units[g * in.step + M], tot[T]);
    });
  };
  int64_t left = in.stride / SLICE;
  for (; left >= 8; left -= 8, x += 8 * QUAD, units += 4 * in.step, p += D::BYTES) {
    prefetch<D::BYTES>(p, stop);
    D::step(table, p, [&](auto q, W u) MXQ_LAMBDA {
      constexpr int Q = decltype(q)::value;
      add_quad(Int<Q % 2 == 0>{}, u, x + QUAD * Q);
      if constexpr (Q % 2) end(Int<Q / 2 % TURNS>{}, Q / 2);
    });
  }
  if (left) {
    const Bytes plain = lut_table(row);
    for (int i = 0; i < left; i++) {
      const W u = lookup_bytes(plain, lut_quad<BITS>(p, i));
      if (i % 2) add_quad(Int<0>{}, u, x + QUAD * i);
      else add_quad(Int<1>{}, u, x + QUAD * i);
      if (i % 2 || i + 1 == left) end(Int<0>{}, i / 2);
    }
  }
  unroll<MR>([&](auto m) MXQ_LAMBDA {
    constexpr int M = decltype(m)::value;
    V sums[TURNS];
    unroll<TURNS>([&](auto t) MXQ_LAMBDA { sums[decltype(t)::value] = as_vector(tot[M * TURNS + decltype(t)::value]); });
    store(out + 256 * M, sum_of<TURNS>(sums));
  });
}

// acc[m][16] += x[m] . `rows` rows from row 16 * tile.
template <int BITS, int MR>
static void gemv8_lut(const Job& j, const Piece& p, int64_t tile, int64_t end, int64_t rows, const Input8& in, float* acc) {
  const uint8_t *words = j.blob + p.codes + tile * 16 * p.code_step, *tables = j.blob + p.scales + tile * 16 * p.scale_step;
  const uint8_t* stop = codes_end(j, p, end);
  float parts[MR * 256], unit[16] = {0};
  for (int64_t r = 0; r < rows; r++) {
    gemv8_row<BITS, MR>(words + r * p.code_step, tables + r * LUT_BYTES, in, stop, parts + 16 * r);
    unit[r] = lut_unit(tables + r * LUT_BYTES);
  }
  for (int m = 0; m < MR; m++) {
    float bias = 0.0f;  // what every row has too little
    for (int64_t g = 0; BIAS && g < in.groups; g++)
      bias += in.units[g * in.step + m] * (float)(APART ? in.negatives[g * in.step + m] : -OFFSET8 * in.sums[g * in.step + m]);
    V t[16];
    for (int64_t r = 0; r < 16; r++) t[r] = r < rows ? load(parts + 256 * m + 16 * r) : zero();
    transpose(t);
    store(acc + 16 * m, fma(add(sum_of<16>(t), set1(bias)), load(unit), load(acc + 16 * m)));
  }
}

// Tables for many rows of x, where SHORT says that a row's own kernel is slow: a tile is unpacked to bytes once, with a row to a lane, and then is one of
// 8-bit codes for every block. In memory: the units of the 16 rows, then the bytes.
static int64_t unpacked_floats(const Piece& p) { return 16 + 16 * padded_cols(p.format, p.c1 - p.c0) / 4; }
static void unpack_lut(const Job& j, const Piece& p, int64_t tile, int64_t end, int64_t rows, float* out) {
  const uint8_t *words = j.blob + p.codes + tile * 16 * p.code_step, *tables = j.blob + p.scales + tile * 16 * p.scale_step;
  const uint8_t* next = words + (tile + 1 < end ? 16 * (int64_t)p.code_step : 0);
  for (int64_t r = 0; r < 16; r++) out[r] = r < rows ? lut_unit(tables + r * p.scale_step) : 0.0f;
  unpack_rows(p.format.bits, words, p.code_step, tables, rows, 0, padded_cols(p.format, p.c1 - p.c0), next, (uint8_t*)(out + 16));
}
template <int MR>
static void gemv8_unpacked(const Job& j, const Piece& p, const float* unpacked, int64_t m0, float* acc) {
  static constexpr uint16_t ONE = 0x3c00, ones[16] = {ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE};
  const int64_t padded = padded_cols(p.format, p.c1 - p.c0);
  const Tile t{{UNIFORM, 8, SYM, 0, 0}, (const uint8_t*)(unpacked + 16), (const uint8_t*)ones, nullptr, padded, padded, nullptr};
  float sums[16 * MR] = {0};
  gemv8_tile<UnpackedQuads, MR>(t, nf_table(), input8(j, p, m0), false, sums);
  for (int m = 0; m < MR; m++) store(acc + 16 * m, fma(load(sums + 16 * m), load(unpacked), load(acc + 16 * m)));
}

template <int MR>
static void gemv8_piece(const Job& j, const Piece& p, int64_t pieces, int64_t tile, int64_t end, int64_t rows, int64_t m0, float* acc) {
  const Input8 in = input8(j, p, m0);
  if (p.format.kind == LUT) {
    switch (p.format.bits) {
      case 2: return gemv8_lut<2, MR>(j, p, tile, end, rows, in, acc);
      case 3: return gemv8_lut<3, MR>(j, p, tile, end, rows, in, acc);
      default: return gemv8_lut<4, MR>(j, p, tile, end, rows, in, acc);
    }
  }
  const Tile t = tile_of(j.blob, p, tile, codes_end(j, p, end));
  const Bytes table = nf_table();
  const bool late = scales_late(j, p.format, pieces);
  switch (p.format.kind == NF ? 0 : p.format.bits) {
    case 0: return gemv8_tile<NfQuads, MR>(t, table, in, late, acc);
    case 1: return gemv8_tile<Quads<1, false>, MR>(t, table, in, late, acc);  // in place there would be eight sums
    case 2: return gemv8_tile<Quads<2, VNNI>, MR>(t, table, in, late, acc);
    case 3: return gemv8_tile<Quads<3, VNNI>, MR>(t, table, in, late, acc);
    case 4: return gemv8_tile<Quads<4, VNNI>, MR>(t, table, in, late, acc);
    case 5: return gemv8_tile<Quads<5, VNNI>, MR>(t, table, in, late, acc);
    case 6: return gemv8_tile<Quads<6, VNNI>, MR>(t, table, in, late, acc);
    default: return gemv8_tile<Quads<8, VNNI>, MR>(t, table, in, late, acc);
  }
}

}  // namespace MXQ_TARGET
}  // namespace mxq
