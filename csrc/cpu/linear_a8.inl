// The integer kernels: codes become bytes, int8 groups of x are multiplied with them, sums are int32 and exact, and one float32
// multiplication and addition per group brings in the scales. Included by linear.inl, before the kernels themselves:
//   linear_gemv8.inl: unpacks in registers, for few rows of x
//   linear_gemm8.inl: unpacks a panel into the L1 cache, then a plain integer matrix kernel
// Here is what both have in common: how each format's codes become bytes, the input, and what a group adds to the output. A row's result does not depend on the
// rows beside it: both kernels round in the same places (row lanes only; lut adds lanes up in gemv).

namespace mxq {
namespace MXQ_TARGET {

// What dot() multiplies is `value + OFFSET`, an unsigned byte, for the sake of vpdpbusd; the groups' sums of x take OFFSET out again. Without
// VNNI bytes of more than 7 bits are multiplied as signed ones, or APART, where x itself takes BIAS out.
static constexpr int BIAS = VNNI || APART ? 128 : 0, OFFSET8 = VNNI ? BIAS : 0;

template <bool SMALL>
MXQ_INLINE W dot_value(W acc, W u, W x) {
  if constexpr (SMALL || VNNI) return dot(acc, u, x);
  else return dot_signed(acc, u, x);
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

}  // namespace MXQ_TARGET
}  // namespace mxq
