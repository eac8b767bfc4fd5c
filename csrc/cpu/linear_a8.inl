// The integer kernels: codes become bytes, int8 groups of x are multiplied with them, sums are int32 and exact, and one float32
// multiplication and addition per group brings in the scales. Included by linear.inl.
//   quads: how each format's codes become bytes
//   gemv8: unpack in registers, for few rows of x
//   gemm8: unpack a panel into the L1 cache, then a plain integer matrix kernel
// A row's result does not depend on the rows beside it: both kernels round in the same places (row lanes only; lut adds lanes up in gemv).

namespace mxq {
namespace MXQ_TARGET {

// ------------------------------------------------------------------------------------------------------------------------ quads

// What dot() multiplies is `value + OFFSET`, an unsigned byte, for the sake of vpdpbusd; the groups' sums of x take OFFSET out again. Without
// VNNI bytes of more than 7 bits are multiplied as signed ones, or APART, where x itself takes BIAS out.
static constexpr int BIAS = VNNI || APART ? 128 : 0, OFFSET8 = VNNI ? BIAS : 0;

template <bool SMALL>
MXQ_INLINE W dot_value(W acc, W u, W x) {
  if constexpr (SMALL || VNNI) return dot(acc, u, x);
  else return dot_signed(acc, u, x);
}

// The same in gemv, which adds products up in 16 bits first where it can, and multiplies bytes of 8 bits as dot_apart() does. Quads that may be added up, if no
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

// The top bits of signed codes in a word, inverted at once where field() would take an operation more for each quad.
template <uint32_t TOPS>
MXQ_INLINE W flipped(W w) { return TERNARY ? w : ixor(w, ints((int32_t)TOPS)); }

// step() reads a stripe and calls f(Int<quad>, Int<S>, bytes): bytes << S of the values of each of the 8 quads. IN_PLACE leaves codes where
// they lie in their byte (S > 0) instead of shifting them down: the sums are shifted once a group instead. It needs VNNI's full unsigned bytes.
template <int BITS, bool IN_PLACE>
struct Quads {  // uniform 1, 2 and 4 bits
  static_assert(BITS > 1 || !IN_PLACE, "SHIFTS knows 2 and 4 bits");
  static constexpr int OFFSET = 1 << (BITS - 1), BYTES = BITS * 64;
  static constexpr int LARGEST = (1 << BITS) - 1;  // byte that step() hands out; 0: bytes of 8 bits
  static constexpr int SHIFTS = !IN_PLACE ? 1 : BITS == 2 ? 0x55 : 0x11;  // bit S: some quad comes shifted by S
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Bytes&, F&& f) {
    constexpr int PER = quads_per_word(BITS);
    constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x01010101u, TOP = (1u << (BITS - 1)) * 0x01010101u, FLIP = TERNARY ? TOP : 0;
    unroll<BITS>([&](auto v) MXQ_LAMBDA {
      const W w = flipped<BITS == 1 ? 0xffffffffu : BITS == 2 ? 0xaaaaaaaau : 0x88888888u>(load_words(p + 64 * decltype(v)::value));
      unroll<PER>([&](auto i) MXQ_LAMBDA {
        constexpr int S = BITS * decltype(i)::value, Q = decltype(v)::value * PER + decltype(i)::value;
        if constexpr (IN_PLACE) f(Int<Q>{}, Int<S>{}, field<(MASK << S), (FLIP << S)>(w));
        else f(Int<Q>{}, Int<0>{}, field<MASK, FLIP>(shift<S>(w)));
      });
    });
  }
};

template <bool IN_PLACE>
struct Quads<3, IN_PLACE> {
  static constexpr int OFFSET = 4, BYTES = 192, LARGEST = 7;
  static constexpr int SHIFTS = IN_PLACE ? 0x9 : 1;
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Bytes&, F&& f) {
    constexpr uint32_t FLIP = TERNARY ? 0x04040404u : 0;
    const W w0 = flipped<0x24242424u>(load_words(p)), w1 = flipped<0xe4e4e4e4u>(load_words(p + 64)), w2 = flipped<0x24242424u>(load_words(p + 128));
    const auto pair = [&](auto v, W w) MXQ_LAMBDA {
      constexpr int Q = 2 * decltype(v)::value;
      f(Int<Q>{}, Int<0>{}, field<0x07070707u, FLIP>(w));
      if constexpr (IN_PLACE) f(Int<Q + 1>{}, Int<3>{}, field<0x38383838u, (FLIP << 3)>(w));
      else f(Int<Q + 1>{}, Int<0>{}, field<0x07070707u, FLIP>(shift<3>(w)));
    };
    pair(Int<0>{}, w0), pair(Int<1>{}, w1), pair(Int<2>{}, w2);
    f(Int<6>{}, Int<0>{}, merge3<TERNARY>(shift<6>(w0), shift<4>(w1)));
    f(Int<7>{}, Int<0>{}, merge3<TERNARY>(shift<6>(w2), shift<5>(w1)));
  }
};

template <int BITS, bool IN_PLACE>
struct StripeQuads {  // uniform 5 and 6 bits
  static constexpr int OFFSET = 1 << (BITS - 1), BYTES = BITS * 64, ABOVE = 8 - BITS, LARGEST = (1 << BITS) - 1;
  static constexpr int SHIFTS = IN_PLACE ? 1 | 1 << ABOVE : 1;
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Bytes&, F&& f) {
    constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x01010101u, FLIP = (1u << (BITS - 1)) * 0x01010101u;
    W w[BITS];
    unroll<BITS>([&](auto v) MXQ_LAMBDA {
      w[decltype(v)::value] = load_words(p + 64 * decltype(v)::value);
      f(v, Int<0>{}, field<MASK, FLIP>(w[decltype(v)::value]));
    });
    across<BITS>(w, [&](auto q, W u) MXQ_LAMBDA {
      if constexpr (IN_PLACE) f(q, Int<ABOVE>{}, field<(MASK << ABOVE), (FLIP << ABOVE)>(u));
      else f(q, Int<0>{}, field<MASK, FLIP>(shift<ABOVE>(u)));
    });
  }
};
template <bool IN_PLACE>
struct Quads<5, IN_PLACE> : StripeQuads<5, IN_PLACE> {};
template <bool IN_PLACE>
struct Quads<6, IN_PLACE> : StripeQuads<6, IN_PLACE> {};

template <bool IN_PLACE>
struct Quads<8, IN_PLACE> {
  static constexpr int OFFSET = OFFSET8, BYTES = 512, LARGEST = 0;
  static constexpr int SHIFTS = 1;
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Bytes&, F&& f) {
    unroll<8>([&](auto v) MXQ_LAMBDA {
      f(v, Int<0>{}, field<0xffffffffu, (128 - BIAS) * 0x01010101u>(load_words(p + 64 * decltype(v)::value)));
    });
  }
};

// Bytes as dot() wants them, of a tile that was unpacked.
struct UnpackedQuads {
  static constexpr int OFFSET = OFFSET8, BYTES = 512, LARGEST = 0;
  static constexpr int SHIFTS = 1;
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Bytes&, F&& f) {
    unroll<8>([&](auto v) MXQ_LAMBDA { f(v, Int<0>{}, load_words(p + 64 * decltype(v)::value)); });
  }
};

// nf4: the table holds 127 * level + BIAS.
struct NfQuads {
  static constexpr int OFFSET = OFFSET8, BYTES = 256, LARGEST = 0;
  static constexpr int SHIFTS = 1;
  template <class F>
  MXQ_INLINE void step(const uint8_t* p, const Bytes& table, F&& f) {
    unroll<4>([&](auto v) MXQ_LAMBDA {
      constexpr int Q = 2 * decltype(v)::value;
      const W w = load_words(p + 64 * decltype(v)::value);
      f(Int<Q>{}, Int<0>{}, lookup_bytes(table, field<0x0f0f0f0fu, 0>(w)));
      f(Int<Q + 1>{}, Int<0>{}, lookup_bytes(table, field<0x0f0f0f0fu, 0>(shift<4>(w))));
    });
  }
};

// NF4_LEVELS * 127, rounded.
static constexpr int8_t NF_BYTES[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};
MXQ_INLINE Bytes nf_table() {
  uint8_t t[16];
  for (int i = 0; i < 16; i++) t[i] = (uint8_t)(NF_BYTES[i] + BIAS);
  return load_bytes(t);
}

// The table of one lut row, biased.
MXQ_INLINE Bytes lut_table(const uint8_t* row) {
  uint8_t t[16];
  for (int i = 0; i < 16; i++) t[i] = (uint8_t)(row[32 + i] + BIAS);
  return load_bytes(t);
}
MXQ_INLINE float lut_unit(const uint8_t* row) { float u; memcpy(&u, row + 48, 4); return u; }

// lut: calls f(Int<quad>, bytes of the table) for each quad of a stripe.
template <int BITS>
struct LutQuads {
  static constexpr int BYTES = BITS * 64;
  Bytes table;
  MXQ_INLINE LutQuads of(const uint8_t* row) { return {lut_table(row)}; }
  template <class F>
  MXQ_INLINE void step(const LutQuads& t, const uint8_t* p, F&& f) {
    constexpr int PER = quads_per_word(BITS);
    unroll<BITS>([&](auto v) MXQ_LAMBDA {
      const W w = load_words(p + 64 * decltype(v)::value);
      unroll<PER>([&](auto i) MXQ_LAMBDA {
        f(Int<decltype(v)::value * PER + decltype(i)::value>{}, lookup_bytes(t.table, field<0x0f0f0f0fu, 0>(shift<BITS * decltype(i)::value>(w))));
      });
    });
  }
};

template <>
struct LutQuads<2> {  // a lookup has room for two codes: one table reads the low one, another the high one, and half of the shifts fall away
  static constexpr int BYTES = 128;
  Bytes low, high;
  MXQ_INLINE LutQuads of(const uint8_t* row) {
    static constexpr uint8_t second[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const Bytes table = lut_table(row);
    return {table, reordered(table, load_bytes(second))};
  }
  template <class F>
  MXQ_INLINE void step(const LutQuads& t, const uint8_t* p, F&& f) {
    unroll<2>([&](auto v) MXQ_LAMBDA {
      constexpr int Q = 4 * decltype(v)::value;
      const W w = load_words(p + 64 * decltype(v)::value), a = field<0x0f0f0f0fu, 0>(w), b = field<0x0f0f0f0fu, 0>(shift<4>(w));
      f(Int<Q>{}, lookup_bytes(t.low, a));
      f(Int<Q + 1>{}, lookup_bytes(t.high, a));
      f(Int<Q + 2>{}, lookup_bytes(t.low, b));
      f(Int<Q + 3>{}, lookup_bytes(t.high, b));
    });
  }
};

template <>
struct LutQuads<3> {
  static constexpr int BYTES = 192;
  Bytes table;
  MXQ_INLINE LutQuads of(const uint8_t* row) { return {lut_table(row)}; }
  template <class F>
  MXQ_INLINE void step(const LutQuads& t, const uint8_t* p, F&& f) {
    const W w0 = load_words(p), w1 = load_words(p + 64), w2 = load_words(p + 128);
    const auto pair = [&](auto v, W w) MXQ_LAMBDA {
      constexpr int Q = 2 * decltype(v)::value;
      f(Int<Q>{}, lookup_bytes(t.table, field<0x0f0f0f0fu, 0>(w)));  // the bit above the code is ignored: the table repeats itself
      f(Int<Q + 1>{}, lookup_bytes(t.table, field<0x0f0f0f0fu, 0>(shift<3>(w))));
    };
    pair(Int<0>{}, w0), pair(Int<1>{}, w1), pair(Int<2>{}, w2);
    f(Int<6>{}, lookup_bytes(t.table, merge3<false>(shift<6>(w0), shift<4>(w1))));
    f(Int<7>{}, lookup_bytes(t.table, merge3<false>(shift<6>(w2), shift<5>(w1))));
  }
};

// Table indices of one quad, for tails shorter than a stripe and for panels.
template <int BITS>
MXQ_INLINE W lut_quad(const uint8_t* p, int i) {
  if (BITS == 3 && i >= 6) return merge3<false>(shift<6>(load_words(p + (i == 6 ? 0 : 128))), shift_by(load_words(p + 64), i - 2));
  constexpr int PER = quads_per_word(BITS);
  return field<0x0f0f0f0fu, 0>(shift_by(load_words(p + 64 * (i / PER)), BITS * (i % PER)));
}

// The int8 input of a piece for the block of rows from m0: codes as prepare_bytes() lays them, units and sums [group][step]; and if APART, magnitudes and signs
// instead of codes, negatives [group][step].
struct Input8 {
  const int8_t *bytes, *apart;
  const float* units;
  const int32_t *sums, *negatives;
  int64_t stride, step, groups, group;
};
MXQ_INLINE Input8 input8(const Job& j, const Piece& p, int64_t m0) {
  const Slot8& s = at<Slot8>(j.blob, header(j.blob).off_slots8)[p.slot8];
  const int64_t codes = s.start * j.m + m0 * s.padded, first = s.scales * j.m + m0;
  return {j.bytes + codes, APART ? j.apart + 2 * codes : nullptr, j.units + first, j.byte_sums + first, APART ? j.negatives + first : nullptr,
          (int64_t)s.padded, j.m, (int64_t)s.groups, s.group};
}

// Scales and zeros of group g of a tile.
struct GroupScale {
  V scale, zero;
};
MXQ_INLINE GroupScale group_scale(const Tile& t, int64_t g) {
  if (!t.format.group) g = 0;
  const bool fz = t.format.zero == FLOATZERO;
  return {load_scale(t.scales + 32 * g, t.format.bf16), t.format.zero == INT ? load_s8(t.zeros + 16 * g) : fz ? load_scale(t.zeros + 32 * g, t.format.bf16) : zero()};
}
// What a group adds to the output: one place, so that gemv and gemm round alike. d = sum of value * x, unit and sum those of x.
MXQ_INLINE V add_group(Format f, const GroupScale& s, V d, float unit, int32_t sum, V total) {
  if (f.zero == INT) d = fnma(s.zero, set1((float)sum), d);
  total = fma(mul(s.scale, set1(unit)), d, total);
  if (f.zero == FLOATZERO) total = fma(mul(s.zero, set1(unit)), set1((float)sum), total);
  return total;
}

// Whether the scale of a row waits until its sum is complete: it has one scale, and nothing else adds to the sum. gemv and gemm do the same.
MXQ_INLINE bool scales_late(const Job& j, Format f, int64_t pieces) {
  return pieces == 1 && !header(j.blob).off_rowptr && !f.group && f.zero == SYM;
}

// ------------------------------------------------------------------------------------------------------------------------ gemv8

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

// Columns c0 .. c1 of `rows` rows of a column-lane piece as bytes, [column/4][16 rows][4], a slice of 64 columns at a time: a transpose of words brings rows into the
// lanes. `next`: codes to prefetch, a row's each `step` bytes.
template <int BITS>
static void unpack_rows(const uint8_t* words, int64_t step, const uint8_t* tables, int64_t rows, int64_t c0, int64_t c1, const uint8_t* next, uint8_t* out) {
  Bytes table[16];
  for (int64_t r = 0; r < rows; r++) {
    table[r] = lut_table(tables + LUT_BYTES * r);
    __builtin_prefetch(next + step * r, 0, 2), __builtin_prefetch(next + step * r + 64, 0, 2);
  }
  for (int64_t s = c0 / SLICE; s < c1 / SLICE; s++, out += 16 * 64) {
    V block[16];
    for (int64_t r = 0; r < 16; r++)
      block[r] = r < rows ? as_floats(lookup_bytes(table[r], lut_quad<BITS>(words + step * r + s / 8 * BITS * 64, (int)(s % 8)))) : zero();
    transpose(block);
    for (int i = 0; i < 16; i++) store_words(out + 64 * i, as_words(block[i]));
  }
}

static void unpack_rows(int bits, const uint8_t* words, int64_t step, const uint8_t* tables, int64_t rows, int64_t c0, int64_t c1, const uint8_t* next, uint8_t* out) {
  switch (bits) {
    case 2: return unpack_rows<2>(words, step, tables, rows, c0, c1, next, out);
    case 3: return unpack_rows<3>(words, step, tables, rows, c0, c1, next, out);
    default: return unpack_rows<4>(words, step, tables, rows, c0, c1, next, out);
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

// ------------------------------------------------------------------------------------------------------------------------ gemm8

// Panel: DEPTH8 columns of GEMM8_TILES row tiles as bytes, [tile][column/4][row][4].
// Codes of 8 bits lie like that in memory already, and are read from there (direct8). 256 x 64 bytes are 16 KB: it stays in L1 beside the block of
// x and the sums of one block, while all rows of x pass by it.
static constexpr int DEPTH8 = 256;
static constexpr int TILE8 = DEPTH8 * 16;                 // bytes of a tile in the panel
static constexpr int PANEL8 = GEMM8_TILES * TILE8;

// Columns c0 .. c1 of a tile as bytes. A small integer zero is taken out here already: value - zero + 2^bits lies in 1 .. 2^(bits+1) - 1.
template <class D>
static void unpack_tile(const Tile& t, const Bytes& table, int64_t group, int64_t c0, int64_t c1, uint8_t* out) {
  const bool fold = D::LARGEST && t.format.zero == INT;
  W moved = ints(0);
  for (int64_t c = c0; c < c1; c += STRIPE, out += 512) {
    if (fold && (c == c0 || c % group == 0)) {  // code + (2^(bits-1) - stored zero): both below 2^bits
      int32_t v[16];
      const uint8_t* z = t.zeros + (t.format.group ? c / group : 0) * 16;
      for (int i = 0; i < 16; i++) v[i] = ((1 << (t.format.bits - 1)) - (int8_t)z[i]) * 0x01010101;
      moved = load_words(v);
    }
    D::step(t.codes + c / STRIPE * D::BYTES, table, [&](auto q, auto, W u) MXQ_LAMBDA { store_words(out + 64 * decltype(q)::value, iadd(u, moved)); });
  }
}

// The codes that the next panel will take from the place of `tile`: the same tile's next columns, or the next chunk's first ones. (At the very
// end that is no weight at all; it is only prefetched.)
static const uint8_t* next_codes(const Job& j, const Piece& p, int64_t tile, int64_t c0) {
  const int64_t lanes = column_lanes(p.format) ? 1 : 16, step = (int64_t)p.code_step * (16 / lanes), end = c0 + DEPTH8;
  const bool last = end >= padded_cols(p.format, p.c1 - p.c0);
  return j.blob + p.codes + tile * step + (last ? GEMM8_TILES * step : end * p.format.bits / 8 * lanes);
}

// The same for scales and zeros: those of the group at column c of the tile, or, if c is negative, the first ones of the next chunk.
static void fetch_scales(const Job& j, const Piece& p, int64_t tile, int64_t c) {
  if (c < 0) tile += GEMM8_TILES;
  const int64_t g = c < 0 || !p.format.group ? 0 : c / p.format.group;
  const uint8_t* scales = j.blob + p.scales + tile * p.scale_step + 32 * g;
  const int64_t bytes = p.format.group ? 32 * DEPTH8 / p.format.group : 32;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(scales + i);
  if (p.format.zero != SYM) __builtin_prefetch(j.blob + p.zeros + tile * p.zero_step + (p.format.zero == INT ? 16 : 32) * g);
}

static void unpack_panel(const Job& j, const Piece& p, int64_t tile, int64_t rows, int64_t group, int64_t c0, int64_t c1, uint8_t* out) {
  const int64_t unit = column_lanes(p.format) ? 16 : 1;  // steps per tile
  const uint8_t *words = j.blob + p.codes + tile * unit * p.code_step, *tables = j.blob + p.scales + tile * unit * p.scale_step;
  const uint8_t* next = next_codes(j, p, tile, c0);
  if (p.format.kind == LUT) return unpack_rows(p.format.bits, words, p.code_step, tables, rows, c0, c1, next, out);
  const Tile t = tile_of(j.blob, p, tile);
  if (c1 > t.padded) c1 = t.padded;  // x is padded further; what is behind the tile's last column is multiplied by its zeros
  const Bytes table = nf_table();
  switch (p.format.kind == NF ? 0 : p.format.bits) {
    case 0: return unpack_tile<NfQuads>(t, table, group, c0, c1, out);
    case 1: return unpack_tile<Quads<1, false>>(t, table, group, c0, c1, out);
    case 2: return unpack_tile<Quads<2, false>>(t, table, group, c0, c1, out);
    case 3: return unpack_tile<Quads<3, false>>(t, table, group, c0, c1, out);
    case 4: return unpack_tile<Quads<4, false>>(t, table, group, c0, c1, out);
    case 5: return unpack_tile<Quads<5, false>>(t, table, group, c0, c1, out);
    case 6: return unpack_tile<Quads<6, false>>(t, table, group, c0, c1, out);
    default: return unpack_tile<Quads<8, false>>(t, table, group, c0, c1, out);
  }
}

// How the panel of a piece is to be read.
struct Reading {
  Format format;  // zero: INT only if it has not been folded into the bytes
  int offset;
  bool small;
  float unit;     // 1/127 for nf
  bool late;      // scales_late()
};
static Reading reading(Format f, bool late) {
  const bool small = f.kind == UNIFORM && f.bits < 8, fold = small && f.zero == INT;
  Reading r{f, small ? 1 << (f.bits - 1) : OFFSET8, small, f.kind == NF ? 1.0f / 127.0f : 1.0f, late};
  if (fold) r.format.zero = SYM, r.offset = 1 << f.bits;
  if (f.zero == FLOATZERO) r.offset -= 1 << (f.bits - 1);
  return r;
}

// acc[m][lda] += one group, or = if it is the `first`: `quads` quads of NV tiles times MR rows of x, `stride` bytes apart. Meanwhile the codes at `next` and `other`,
// if not null, are prefetched, 64 bytes of each a quad: as one burst while unpacking they would overrun the queue of outstanding loads, and the
// next panel would wait for memory. A block that is ALONE has no other to share that with: it also fetches what lies `third` bytes behind each of the two.
template <int NV, int MR, bool SMALL, bool ALONE>
static void gemm8_block(const uint8_t* panel, int64_t tile_step, const int8_t* x, int64_t stride, int64_t quads, Reading how, const GroupScale* scales, const float* units,
                        const int32_t* sums, bool first, float* acc, int64_t lda, const uint8_t* next, const uint8_t* other, int64_t third) {
  W d[MR * NV];
  unroll<MR>([&](auto m) MXQ_LAMBDA {
    const W start = ints(-how.offset * sums[decltype(m)::value]);
    unroll<NV>([&](auto v) MXQ_LAMBDA { d[decltype(m)::value * NV + decltype(v)::value] = start; });
  });
  // Four quads a turn: the end of a loop of 64 turns is not foreseen, that of one of 16 is.
  for (int64_t q = 0; q < quads; q += 4, panel += 256, x += 16) {
    if (next) {
      unroll<4>([&](auto i) MXQ_LAMBDA {
        __builtin_prefetch(next + 64 * decltype(i)::value, 0, 2);
        __builtin_prefetch(other + 64 * decltype(i)::value, 0, 2);
        if constexpr (ALONE) {
          __builtin_prefetch(next + third + 64 * decltype(i)::value, 0, 2);
          __builtin_prefetch(other + third + 64 * decltype(i)::value, 0, 2);
        }
      });
      next += 256, other += 256;
    }
    unroll<4>([&](auto i) MXQ_LAMBDA {
      constexpr int I = decltype(i)::value;
      W u[NV];
      unroll<NV>([&](auto v) MXQ_LAMBDA { u[decltype(v)::value] = load_words(panel + tile_step * decltype(v)::value + 64 * I); });
      unroll<MR>([&](auto m) MXQ_LAMBDA {
        constexpr int M = decltype(m)::value;
        W b = four_bytes(x + M * stride + 4 * I);
        if constexpr (NV > 1) pin(b);  // one load for all tiles
        unroll<NV>([&](auto v) MXQ_LAMBDA {
          constexpr int D = M * NV + decltype(v)::value;
          d[D] = dot_value<SMALL>(d[D], u[decltype(v)::value], b);
        });
      });
    });
  }
  // The common cases without a question per vector.
  const auto add = [&](Format f, auto late, auto begin) MXQ_LAMBDA {
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value;
      const float unit = how.unit * units[M];
      const int32_t sum = sums[M];
      unroll<NV>([&](auto v) MXQ_LAMBDA {
        constexpr int N = decltype(v)::value;
        float* to = acc + M * lda + 16 * N;
        GroupScale s = scales[N];
        if constexpr (decltype(late)::value) s.scale = set1(1.0f);
        store(to, add_group(f, s, to_float(d[M * NV + N]), unit, sum, decltype(begin)::value ? zero() : load(to)));
      });
    });
  };
  Format symmetric = how.format;
  symmetric.zero = SYM;
  if (how.format.zero != SYM) {
    if (first) add(how.format, Int<0>{}, Int<1>{});
    else add(how.format, Int<0>{}, Int<0>{});
  } else if (how.late) {
    if (first) add(symmetric, Int<1>{}, Int<1>{});
    else add(symmetric, Int<1>{}, Int<0>{});
  } else {
    if (first) add(symmetric, Int<0>{}, Int<1>{});
    else add(symmetric, Int<0>{}, Int<0>{});
  }
}

// All blocks of x times the panel of columns c0 .. c1.
struct PanelJob {
  const uint8_t* panel;
  int64_t tile_step;  // bytes from tile to tile
  const int8_t* x;
  int64_t c0, c1;
  Reading how;
  Input8 in;
  const GroupScale* scales;
  const uint8_t* next[GEMM8_TILES];  // where each tile goes on
  int64_t next_bytes;                // of each of them
  bool first, last;                  // of the sums' panels
  const float* late;                 // what the sums are multiplied with at their end, or null
};

template <int NV, bool SMALL>
static void gemm8_all_blocks(const Job& j, const GemmChunk& k, const PanelJob& a) {
  // No division in here: a micro-kernel takes some 400 cycles, and its addresses would wait for one.
  const Input8& in = a.in;
  const int64_t size = j.m / j.blocks, larger = j.m % j.blocks, first = a.c0 / in.group;
  int64_t tile = a.next_bytes ? 0 : NV, fetched = 0;
  for (int64_t b = 0, m0 = 0, mr; b < j.blocks; b++, m0 += mr) {
    mr = size + (b < larger);
    const float* units = in.units + first * in.step + m0;
    const int32_t* sums = in.sums + first * in.step + m0;
    const GroupScale* scales = a.scales;
    float* acc = k.acc + m0 * k.lda;
    bool begin = a.first;
    for (int64_t c = a.c0; c < a.c1; c += in.group, begin = false) {  // the groups of the panel, while the sums are in L1
      const int64_t width = a.c1 - c < in.group ? a.c1 - c : in.group, full = in.stride - c < in.group ? in.stride - c : in.group;
      const int8_t* x = a.x + c * j.m + m0 * full;
      const uint8_t* panel = a.panel + (c - a.c0) * 16;
      const uint8_t* next = tile < NV ? a.next[tile] + fetched : nullptr;  // two tiles at a time
      const uint8_t* other = tile + 1 < NV ? a.next[tile + 1] + fetched : next;
      unroll<GEMM8_BLOCK>([&](auto m) MXQ_LAMBDA {
        constexpr int MR = decltype(m)::value + 1;
        if (mr != MR) return;
        if constexpr (NV == 4) {
          if (next && j.blocks == 1)
            return gemm8_block<NV, MR, SMALL, true>(panel, a.tile_step, x, full, width / 4, a.how, scales, units, sums, begin, acc, k.lda, next, other, a.next[2] - a.next[0]);
        }
        gemm8_block<NV, MR, SMALL, false>(panel, a.tile_step, x, full, width / 4, a.how, scales, units, sums, begin, acc, k.lda, next, other, 0);
      });
      units += in.step, sums += in.step, scales += GEMM8_TILES;
      fetched += width / 4 * 64;
      if (fetched >= a.next_bytes) tile += 2, fetched = 0;
    }
    if (a.last) finish_block(j, k, m0, mr, a.late);  // now, while its sums are in L1
  }
}

// What piece `index` of `pieces` adds to the sums of a chunk; the first piece begins them, the last one writes y.
static void gemm8_piece(const Job& j, const GemmChunk& k, uint32_t index, uint32_t pieces, uint8_t* panel) {
  const Piece& p = k.pieces[index];
  const Input8 in = input8(j, p, 0);
  const int64_t padded = padded_cols(p.format, p.c1 - p.c0);
  GroupScale scales[DEPTH8 / 32 * GEMM8_TILES];
  float late[16 * GEMM8_TILES];
  const int64_t next_bytes = column_lanes(p.format) ? 0 : DEPTH8 * 16 * p.format.bits / 8;  // the rows of a lut tile lie apart: see unpack_rows
  const bool direct = VNNI && p.format.kind == UNIFORM && p.format.bits == 8;  // lie in memory as in a panel
  PanelJob a{panel, direct ? (int64_t)p.code_step : TILE8, in.bytes, 0, 0, reading(p.format, scales_late(j, p.format, pieces)), in, scales, {}, next_bytes, false, false, nullptr};
  for (int64_t c0 = 0; c0 < padded; c0 += DEPTH8) {
    const int64_t c1 = c0 + DEPTH8 < padded ? c0 + DEPTH8 : padded;
    a.c0 = c0, a.c1 = c1, a.first = index == 0 && c0 == 0, a.last = index + 1 == pieces && c1 == padded;
    if (direct) a.panel = j.blob + p.codes + k.first * p.code_step + 16 * c0;
    for (int64_t t = 0; t < k.count; t++) {
      const int64_t tile = k.first + t, tile_rows = k.rows - 16 * t < 16 ? k.rows - 16 * t : 16;
      a.next[t] = next_codes(j, p, tile, c0);
      fetch_scales(j, p, tile, c1 < padded ? c1 : -1);
      if (!direct) unpack_panel(j, p, tile, tile_rows, in.group, c0, c1, panel + TILE8 * t);
      for (int64_t c = c0, i = 0; c < c1; c += in.group, i++) {
        GroupScale& to = scales[i * GEMM8_TILES + t];
        if (p.format.kind != LUT) {
          to = group_scale(tile_of(j.blob, p, tile), c / in.group);
        } else {
          float unit[16] = {0};
          for (int64_t r = 0; r < tile_rows; r++) unit[r] = lut_unit(j.blob + p.scales + (tile * 16 + r) * p.scale_step);
          to = {load(unit), zero()};
        }
      }
    }
    if (a.last && a.how.late) {
      for (int64_t t = 0; t < k.count; t++) store(late + 16 * t, scales[t].scale);
      a.late = late;
    }
    unroll<GEMM8_TILES>([&](auto n) MXQ_LAMBDA {
      constexpr int NV = decltype(n)::value + 1;
      if (k.count != NV) return;
      if (a.how.small) gemm8_all_blocks<NV, true>(j, k, a);
      else gemm8_all_blocks<NV, VNNI>(j, k, a);
    });
  }
}

}  // namespace MXQ_TARGET
}  // namespace mxq
