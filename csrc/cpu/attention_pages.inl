// Packing and unpacking of one head's page. Included by attention.inl.
// Packing reads each number twice, for the range and for the codes, and writes each word of codes once; both loops run on vectors of 16 lanes. Outliers are found
// before, number by number: a page is packed once and read hundreds of times.

namespace mxq {
namespace MXQ_TARGET {

static constexpr uint16_t HALF_NAN = 0x7e00;

// Of one column in one group: what is stored, and the same as the codes are computed with.
struct Range {
  float inverse, zero;
};
static Range range_of(float least, float most, bool finite, int bits, bool levels, uint16_t* s, uint16_t* z) {
  if (!finite) {
    *s = *z = HALF_NAN;
    return {1.0f, __builtin_inff()};  // below every number: code 0
  }
  least += 0.0f, most += 0.0f;  // which zero is the least of two is nobody's business
  const float step = levels ? 0.5f * most - 0.5f * least : (most - least) / (float)((1 << bits) - 1);
  const float zero = levels ? 0.5f * most + 0.5f * least : least;
  *s = float_to_half(step < MAX_HALF ? step : MAX_HALF);
  *z = float_to_half(zero < -MAX_HALF ? -MAX_HALF : zero > MAX_HALF ? MAX_HALF : zero);
  const float scale = half_to_float(*s);
  return {scale == 0.0f ? 0.0f : 1.0f / scale, half_to_float(*z)};
}

struct Source {
  const void* x;  // [64] tokens at distance `token`
  int type;
  int64_t token;
};
MXQ_INLINE V load_numbers(const Source& x, int64_t t, int64_t d) { return load_any(x.x, t * x.token + d, x.type); }

// Scales and zeros of all groups, and ranges[group][column].
static void pack_params(PageFormat f, bool levels, const Source& x, uint16_t* params, Range* ranges) {
  const int64_t cols = page_cols(f), height = page_group_rows(f), rows = page_rows(f);
  for (int64_t g = 0, r0 = 0; r0 < rows; g++, r0 += height) {
    const int64_t r1 = r0 + height < rows ? r0 + height : rows;
    uint16_t *s = params + 2 * g * cols, *z = s + cols;
    Range* to = ranges + g * cols;
    if (f.side == KEYS) {
      for (int64_t d = 0; d < cols; d += 16) {
        V least = load_numbers(x, r0, d), most = least;
        W size = ints(0);
        for (int64_t t = r0; t < r1; t++) {
          const V v = load_numbers(x, t, d);
          least = smaller(least, v), most = larger(most, v), size = max_bits(size, v);
        }
        float low[16], high[16];
        uint32_t sizes[16];
        store(low, least), store(high, most), store_words(sizes, size);
        for (int64_t i = 0; i < 16; i++) to[d + i] = range_of(low[i], high[i], sizes[i] < 0x7f800000u, f.bits, levels, s + d + i, z + d + i);
      }
    } else {
      for (int64_t t = 0; t < PAGE; t++) {
        V least = load_numbers(x, t, r0), most = least;
        W size = ints(0);
        for (int64_t d = r0; d < r1; d += 16) {
          const V v = load_numbers(x, t, d);
          least = smaller(least, v), most = larger(most, v), size = max_bits(size, v);
        }
        to[t] = range_of(min_of(least), max_of(most), max_lane(size) < 0x7f800000u, f.bits, levels, s + t, z + t);
      }
    }
  }
}

// Which of the page's numbers are outliers: their indices, ascending, behind entries that are not needed. Returns how many of those there are. `x`: [64][head],
// of which each outlier is replaced by a number that is left in its group (0: there is none), so that ranges can be taken of it.
static int64_t take_outliers(PageFormat f, float* x, uint16_t* index) {
  const int64_t d = f.head, cols = page_cols(f), rows = page_rows(f), height = page_group_rows(f);
  const int64_t by_row = f.side == KEYS ? d : 1, by_col = f.side == KEYS ? 1 : d;  // strides in x
  float means[PAGE * MAX_HEAD / 32];  // [group][column], as Range; a NaN where there are no outliers
  for (int64_t r0 = 0, g = 0; r0 < rows; r0 += height, g++) {
    const int64_t r1 = r0 + height < rows ? r0 + height : rows;
    for (int64_t c0 = 0; c0 < cols; c0 += 16) {
      double sum[16] = {0};
      bool odd[16] = {false};
      for (int64_t r = r0; r < r1; r++)
        for (int64_t i = 0; i < 16; i++) {
          const float v = x[r * by_row + (c0 + i) * by_col];
          sum[i] += (double)v, odd[i] |= !(__builtin_fabsf(v) <= MOST_OUTLIER);
        }
      for (int64_t i = 0; i < 16; i++) means[g * cols + c0 + i] = odd[i] ? __builtin_nanf("") : (float)(sum[i] / (double)(r1 - r0));
    }
  }
  int32_t group[MAX_HEAD];  // of each row, where its means begin
  for (int64_t r = 0; r < rows; r++) group[r] = (int32_t)(r / height * cols);
  const auto distance = [&](int64_t token, int64_t channel) MXQ_LAMBDA {  // as bits, which have the order of the numbers; 0: no outlier
    const float mean = f.side == KEYS ? means[group[token] + channel] : means[group[channel] + token];
    const float far = __builtin_fabsf(x[token * d + channel] - mean);
    return far > 0.0f ? float_to_bits(far) : 0u;
  };
  uint32_t words[PAGE * MAX_HEAD];
  const int64_t all = PAGE * d;
  for (int64_t t = 0; t < PAGE; t++)
    for (int64_t c = 0; c < d; c++) words[t * d + c] = distance(t, c);
  const uint32_t least = nth_largest(words, all, f.outliers);
  int64_t equal = least ? f.outliers : 0, count = 0;  // how many with just this distance
  for (int64_t i = 0; i < f.outliers && least; i++) equal -= words[i] > least;
  for (int64_t t = 0; t < PAGE; t++)
    for (int64_t c = 0; c < d; c++) {
      const uint32_t far = distance(t, c);
      if (far > least || (least && far == least && equal-- > 0)) index[count++] = (uint16_t)(OUTLIER_TOKEN * t + c);
    }
  const int64_t none = f.outliers - count;
  memmove(index + none, index, sizeof(uint16_t) * count);
  memset(index, 0, sizeof(uint16_t) * none);

  memset(words, 0, sizeof(uint32_t) * all);
  for (int64_t i = none; i < f.outliers; i++) words[index[i] / OUTLIER_TOKEN * d + index[i] % OUTLIER_TOKEN] = 1;
  for (int64_t i = none; i < f.outliers; i++) {
    const int64_t t = index[i] / OUTLIER_TOKEN, c = index[i] % OUTLIER_TOKEN, row = f.side == KEYS ? t : c, col = f.side == KEYS ? c : t;
    const int64_t r0 = row / height * height, r1 = r0 + height < rows ? r0 + height : rows;
    int64_t r = r0;
    while (r < r1 && words[r * by_row + col * by_col]) r++;
    x[t * d + c] = r < r1 ? x[r * by_row + col * by_col] : 0.0f;
  }
  return none;
}

// What is missing of outliers, whose numbers are in `x`; `ranges` and `params` are those of the whole page, `bounds` as pack_tile has them.
static void put_deltas(PageFormat f, const float* levels, const float* bounds, const Source& x, const Range* ranges, const uint16_t* params, int64_t none,
                       const uint16_t* index, uint16_t* deltas) {
  const int64_t cols = page_cols(f), height = page_group_rows(f);
  const int top = (1 << f.bits) - 1;
  for (int64_t i = 0; i < f.outliers; i++) {
    deltas[i] = 0;
    if (i < none) continue;
    const int64_t t = index[i] / OUTLIER_TOKEN, c = index[i] % OUTLIER_TOKEN, g = (f.side == KEYS ? t : c) / height, col = f.side == KEYS ? c : t;
    const Range r = ranges[g * cols + col];
    const float v = load_one(x.x, t * x.token + c, x.type), steps = (v - r.zero) * r.inverse;
    float level = __builtin_nearbyintf(steps < 0.0f ? 0.0f : steps > (float)top ? (float)top : steps);
    if (levels) {
      int code = 0;
      for (int b = 0; b < top; b++) code += steps > bounds[b];
      level = levels[code];
    }
    deltas[i] = float_to_half(v - (half_to_float(params[2 * g * cols + col]) * level + r.zero) + 0.0f);  // -0 becomes 0
  }
}

// Calls f(row, column, delta) for each outlier of the page whose codes lie at `codes`; those that were not needed have delta 0.
template <class F>
MXQ_INLINE void each_outlier(PageFormat f, const uint8_t* codes, F&& call) {
  const uint16_t *index = (const uint16_t*)(codes + page_code_bytes(f)), *deltas = index + f.outliers;
  for (int64_t i = 0; i < f.outliers; i += 16) {
    float delta[16];
    store(delta, load_half(deltas + i));
    for (int64_t l = 0; l < 16; l++) {
      const int64_t token = index[i + l] / OUTLIER_TOKEN, channel = index[i + l] % OUTLIER_TOKEN;
      if (f.side == KEYS) call(token, channel, delta[l]);
      else call(channel, token, delta[l]);
    }
  }
}

// Columns c0 .. c0+16 of tile `tile` as 16 vectors of its rows.
MXQ_INLINE void load_columns(const Source& x, bool keys, int64_t tile, int64_t c0, V* block) {
  if (keys) {
    unroll<16>([&](auto i) MXQ_LAMBDA { block[decltype(i)::value] = load_numbers(x, tile * 16 + decltype(i)::value, c0); });
    transpose(block);
  } else {
    unroll<16>([&](auto i) MXQ_LAMBDA { block[decltype(i)::value] = load_numbers(x, c0 + decltype(i)::value, tile * 16); });
  }
}

// Code P of the stripe into its words, as formats.h draws it.
template <int BITS, int P>
MXQ_INLINE void put_code(W* words, W code) {
  constexpr int I = P / 4, K = P % 4;
  if constexpr (BITS == 3 && I >= 6) {
    words[I == 6 ? 0 : 2] = either(words[I == 6 ? 0 : 2], shift_left<8 * K + 6>(field<3, 0>(code)));
    words[1] = either(words[1], shift_left<8 * K + I>(shift<2>(code)));
  } else {
    constexpr int PER = quads_per_word(BITS), WORD = I / PER, BIT = 8 * K + BITS * (I % PER);
    words[WORD] = either(words[WORD], shift_left<BIT>(code));
  }
}

// `bounds`: between the levels of a codebook, 2^BITS - 1 numbers; null: codes are numbers.
template <int BITS, bool LEVELS>
static void pack_tile(PageFormat f, const float* bounds, const Source& x, int64_t tile, const Range* ranges, uint8_t* codes) {
  const int64_t cols = page_cols(f);
  const V top = set1((float)((1 << BITS) - 1));
  for (int64_t c0 = 0; c0 < padded_page_cols(f); c0 += STRIPE) {
    W words[BITS];
    unroll<BITS>([&](auto i) MXQ_LAMBDA { words[decltype(i)::value] = ints(0); });
    unroll<2>([&](auto half) MXQ_LAMBDA {
      constexpr int H = decltype(half)::value * 16;
      if (c0 + H >= cols) return;  // padding: code 0
      V block[16];
      load_columns(x, f.side == KEYS, tile, c0 + H, block);
      unroll<16>([&](auto i) MXQ_LAMBDA {
        constexpr int I = decltype(i)::value;
        const Range r = ranges[c0 + H + I];
        const V steps = mul(sub(block[I], set1(r.zero)), set1(r.inverse));
        W code;
        if constexpr (LEVELS) {
          code = ints(0);
          for (int b = 0; b < (1 << BITS) - 1; b++) code = count_above(code, steps, set1(bounds[b]));
        } else {
          code = round_to_ints(smaller(larger(steps, zero()), top));  // 0 for a NaN
        }
        put_code<BITS, H + I>(words, ixor(code, ints(1 << (BITS - 1))));
      });
    });
    unroll<BITS>([&](auto i) MXQ_LAMBDA { store_words(codes + 64 * decltype(i)::value, words[decltype(i)::value]); });
    codes += 64 * BITS;
  }
}

static void pack_halves(PageFormat f, const Source& x, int64_t tile, uint8_t* codes) {
  for (int64_t c0 = 0; c0 < page_cols(f); c0 += 16) {
    V block[16];
    load_columns(x, f.side == KEYS, tile, c0, block);
    for (int i = 0; i < 16; i++, codes += 32) {
      const W size = max_bits(ints(0), block[i]);
      uint16_t halves[16];
      store_half(halves, smaller(set1(MAX_HALF), larger(set1(-MAX_HALF), block[i])));
      if (max_lane(size) >= 0x7f800000u) {  // infinities stay what they are, a NaN becomes the one NaN
        float v[16];
        store(v, block[i]);
        for (int l = 0; l < 16; l++)
          if ((float_to_bits(v[l]) & 0x7fffffff) >= 0x7f800000u) halves[l] = v[l] != v[l] ? HALF_NAN : float_to_half(v[l]);
      }
      memcpy(codes, halves, 32);
    }
  }
}

// The outliers, and the params of what is left. Not inlined: its room on the stack is for pages that have some.
__attribute__((noinline)) static void pack_outliers(PageFormat f, const float* levels, const float* bounds, const Source& x, uint8_t* codes, uint16_t* params,
                                                    Range* ranges) {
  float left[PAGE * MAX_HEAD];
  for (int64_t t = 0; t < PAGE; t++)
    for (int64_t c = 0; c < f.head; c += 16) store(left + t * f.head + c, load_numbers(x, t, c));
  uint16_t *index = (uint16_t*)(codes + page_code_bytes(f)), *deltas = index + f.outliers;
  const int64_t none = take_outliers(f, left, index);
  pack_params(f, levels, {left, F32, f.head}, params, ranges);
  put_deltas(f, levels, bounds, x, ranges, params, none, index, deltas);
}

static void pack_head(PageFormat f, const float* levels, const void* numbers, int type, int64_t token, uint8_t* codes, uint16_t* params) {
  const Source x{numbers, type, token};
  Range ranges[PAGE * MAX_HEAD / 32];  // keys: 2 groups of up to 512 channels; values: up to 16 groups of 64 tokens
  float bounds[16];
  if (levels)
    for (int i = 0; i + 1 < 1 << f.bits; i++) bounds[i] = 0.5f * (levels[i] + levels[i + 1]);
  if (f.outliers) pack_outliers(f, levels, bounds, x, codes, params, ranges);
  else if (has_params(f)) pack_params(f, levels, x, params, ranges);
  const int64_t count = tiles(page_rows(f)), group = page_group_rows(f) / LANES, cols = page_cols(f);
  for (int64_t t = 0; t < count; t++, codes += page_tile_bytes(f)) {
    const Range* r = ranges + t / group * cols;
    switch (f.bits) {
      case 2: levels ? pack_tile<2, true>(f, bounds, x, t, r, codes) : pack_tile<2, false>(f, nullptr, x, t, r, codes); break;
      case 3: levels ? pack_tile<3, true>(f, bounds, x, t, r, codes) : pack_tile<3, false>(f, nullptr, x, t, r, codes); break;
      case 4: levels ? pack_tile<4, true>(f, bounds, x, t, r, codes) : pack_tile<4, false>(f, nullptr, x, t, r, codes); break;
      case 8: pack_tile<8, false>(f, nullptr, x, t, r, codes); break;
      default: pack_halves(f, x, t, codes);
    }
  }
}

// What the codes of pages stand for: number = s (w + centre) + z, with w from the book.
struct Grid {
  Book book;
  bool levels;
  float centre;
};
static Grid grid_of(PageFormat f, const float* levels) {
  if (!has_params(f)) return {book_of({UNIFORM, 8, SYM, 0, 0}), false, 0.0f};  // a book that nobody reads
  if (!levels) return {book_of({UNIFORM, f.bits, SYM, 0, 0}), false, (float)(1 << (f.bits - 1))};
  float table[16];  // by what is stored, the code with its upper bit exchanged
  for (int i = 0; i < 16; i++) table[i] = levels[(i & ((1 << f.bits) - 1)) ^ (1 << (f.bits - 1))];
  return {make_book(load(table)), true, 0.0f};
}

// Calls f with the decoder of such pages.
template <class F>
MXQ_INLINE void with_decoder(int bits, bool levels, F&& f) {
  switch (bits) {
    case 2: return levels ? f(Words<2, false>{}) : f(Words<2, true>{});
    case 3: return levels ? f(Words<3, false>{}) : f(Words<3, true>{});
    case 4: return levels ? f(Words<4, false>{}) : f(Words<4, true>{});
    case 8: return f(Codes8<true>{});
    default: return f(Halves{});
  }
}

// Columns of a tile, back to tokens and channels; s and z of its group; `page`: where the codes of all tiles begin.
template <class D>
static void unpack_tile(PageFormat f, const uint8_t* page, const uint8_t* codes, const Grid& grid, int64_t tile, const uint16_t* s, const uint16_t* z, void* out,
                        int type) {
  const int64_t cols = page_cols(f);
  const V centre = set1(grid.centre);
  float columns[MAX_HEAD * LANES];
  for (int64_t c0 = 0; c0 < padded_page_cols(f); c0 += D::STEP, codes += D::BYTES)
    D::step(codes, grid.book, [&](auto i, V w) MXQ_LAMBDA {
      const int64_t c = c0 + decltype(i)::value;
      if (c >= cols) return;
      if constexpr (D::SCALED) w = add(mul(add(w, centre), set1(half_to_float(s[c]))), set1(half_to_float(z[c])));  // the product is exact
      store(columns + c * LANES, w);
    });
  each_outlier(f, page, [&](int64_t row, int64_t col, float delta) {
    if (row / LANES == tile) columns[col * LANES + row % LANES] += delta;
  });
  for (int64_t c0 = 0; c0 < cols; c0 += 16) {
    V block[16];
    for (int i = 0; i < 16; i++) block[i] = load(columns + (c0 + i) * LANES);
    if (f.side == KEYS) transpose(block);
    for (int i = 0; i < 16; i++) {
      const int64_t t = f.side == KEYS ? tile * 16 + i : c0 + i, d = f.side == KEYS ? c0 : tile * 16;
      store_any(out, t * f.head + d, type, block[i]);
    }
  }
}

static void unpack_head(PageFormat f, const float* levels, const uint8_t* codes, const uint16_t* params, void* out, int type) {
  const int64_t count = tiles(page_rows(f)), group = page_group_rows(f) / LANES, cols = page_cols(f);
  const Grid grid = grid_of(f, levels);
  for (int64_t t = 0; t < count; t++) {
    const uint16_t *s = params + t / group * 2 * cols, *z = s + cols;
    with_decoder(f.bits, grid.levels, [&](auto decoder) { unpack_tile<decltype(decoder)>(f, codes, codes + t * page_tile_bytes(f), grid, t, s, z, out, type); });
  }
}

}  // namespace MXQ_TARGET
}  // namespace mxq
