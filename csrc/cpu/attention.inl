// Attention over packed pages, written once; target_*.cpp include this file behind linear.inl, whose decoders it uses. Reading order:
//   attention_pages.inl: packing and unpacking
//   few rows (decoding): codes are decoded in registers and multiplied there, as gemv does
//   many rows (prefill): codes are decoded into a panel that stays in L1, as gemm does
//   keys before their rotary embedding: the same, and turned there
//   softmax: scores of a chunk to probabilities, online
//   attend: one run of chunks for one block of query rows
//   merge: the runs of a block, in order
//
// What bounds decoding. A page is read once for all query heads of its kv head; each of its codes is decoded once (a shift and a lookup for 16 of
// them) and multiplied `group` times. With 4 query heads a kv head, 16 codes take 4 FMAs, 2 cycles at two FMAs a cycle, beside which the decoding runs on
// other ports: 4-bit pages pass at 4 bytes a cycle, less than what memory gives to one core, so that FMAs bound it. With one head, or with 16-bit
// pages, memory does. Everything else - scales, softmax, rescaling - is some 15 % of the FMAs at D = 128.
#include "attention.h"
#include "attention_simd.h"

#include "attention_pages.inl"

namespace mxq {
namespace MXQ_TARGET {

// One side of a chunk that is a page.
struct PageView {
  PageFormat format;
  Grid grid;
  const uint8_t* codes;
  const uint16_t* params;
  int64_t codes_ahead, params_ahead;  // bytes from here to what is due in some 300 ns, see ahead_of; 0: nothing
};

MXQ_INLINE void prefetch_lines(const void* p, int64_t ahead, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + ahead + i);
}

// ------------------------------------------------------------------------------------------------------------------- folding

// For N of 4 rows of v: x = v * s, and in bias[4] what the zeros (and the centre of the codes) add to each row.
template <int N>
static void fold_rows(const uint16_t* s, const uint16_t* z, float centre, int64_t cols, const float* v, float* x, float* bias) {
  V sum[4];
  unroll<4>([&](auto m) MXQ_LAMBDA { sum[decltype(m)::value] = zero(); });
  for (int64_t c = 0; c < cols; c += 16) {
    const V scale = load_half(s + c), offset = fma(set1(centre), scale, load_half(z + c));
    unroll<N>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value;
      const V one = load(v + M * LDX + c);
      store(x + M * LDX + c, mul(one, scale));
      sum[M] = fma(one, offset, sum[M]);
    });
  }
  for (int64_t c = cols; c % STRIPE; c += 16) unroll<N>([&](auto m) MXQ_LAMBDA { store(x + decltype(m)::value * LDX + c, zero()); });  // padding
  sum4(sum, bias);
}

// The vectors that group g of the page's rows is multiplied by, and their bias.
static const float* fold(const PageView& p, int64_t g, int64_t rows, const float* v, float* x, float* bias) {
  if (!has_params(p.format)) {
    for (int64_t m = 0; m < rows; m++) bias[m] = 0.0f;
    return v;
  }
  const int64_t cols = page_cols(p.format);
  const uint16_t *s = p.params + 2 * g * cols, *z = s + cols;
  prefetch_lines(s, p.params_ahead, 4 * cols);
  const float centre = p.grid.centre;
  for (int64_t m = 0; m < rows; m += 4)
    unroll<4>([&](auto i) MXQ_LAMBDA {
      constexpr int N = decltype(i)::value + 1;
      if (N == 4 ? rows - m >= 4 : rows - m == N) fold_rows<N>(s, z, centre, cols, v + m * LDX, x + m * LDX, bias + m);
    });
  return x;
}

// ------------------------------------------------------------------------------------------------------------------ few rows

// out[m] of `count` tiles = codes . x[m] + bias[m], added to keep[m] * out[m] if there is a keep.
template <class D, int MR>
static void dot_tiles(const uint8_t* codes, int64_t ahead, const Book& book, int64_t count, int64_t cols, const float* x, const float* bias,
                      const float* keep, float* out) {
  constexpr int U = chains<MR>();
  for (int64_t t = 0; t < count; t++, out += LANES) {
    V dot[MR * U];
    unroll<MR * U>([&](auto i) MXQ_LAMBDA { dot[decltype(i)::value] = zero(); });
    const float* xc = x;
    for (int64_t c = 0; c < cols; c += D::STEP) {
      unroll<D::BYTES / 64>([&](auto i) MXQ_LAMBDA { __builtin_prefetch(codes + ahead + 64 * decltype(i)::value); });
      D::step(codes, book, [&](auto i, V w) MXQ_LAMBDA {
        constexpr int I = decltype(i)::value;
        unroll<MR>([&](auto m) MXQ_LAMBDA {
          constexpr int A = decltype(m)::value * U + I % U;
          dot[A] = fma(w, set1(xc[decltype(m)::value * LDX + I]), dot[A]);
        });
      });
      codes += D::BYTES;
      xc += D::STEP;
    }
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value;
      V v = add(sum_of<U>(dot + M * U), set1(bias[M]));
      if (keep) v = fma(load(out + M * LDX), set1(keep[M]), v);
      store(out + M * LDX, v);
    });
  }
}

// Calls f(first row, Int<rows>) for blocks of nearly equal size.
template <int MAX, class F>
MXQ_INLINE void row_blocks(int64_t rows, F&& f) {
  const int64_t blocks = rows <= MAX ? 1 : ceil_div(rows, MAX), size = rows <= MAX ? rows : rows / blocks, larger = rows - blocks * size;
  for (int64_t b = 0, m0 = 0, mr; b < blocks; b++, m0 += mr) {
    mr = size + (b < larger);
    unroll<MAX>([&](auto i) MXQ_LAMBDA {
      if (mr == decltype(i)::value + 1) f(m0, Int<decltype(i)::value + 1>{});
    });
  }
}

template <class D>
static void few_rows(const PageView& p, const uint8_t* codes, int64_t count, int64_t rows, const float* x, const float* bias, const float* keep, float* out) {
  row_blocks<GEMV_BLOCK>(rows, [&](int64_t m0, auto mr) MXQ_LAMBDA {
    dot_tiles<D, decltype(mr)::value>(codes, p.codes_ahead, p.grid.book, count, padded_page_cols(p.format), x + m0 * LDX, bias + m0, keep ? keep + m0 : nullptr,
                                      out + m0 * LDX);
  });
}

// ----------------------------------------------------------------------------------------------------------------- many rows

// Floats between the columns of a panel (a name of its own: LDP is linear's).
static constexpr int PANEL = GEMM_TILES * LANES;

template <class D>
static void decode_to_panel(const uint8_t* codes, int64_t ahead, const Book& book, int64_t cols, float* panel) {
  for (int64_t c = 0; c < cols; c += D::STEP) {
    unroll<D::BYTES / 64>([&](auto i) MXQ_LAMBDA { __builtin_prefetch(codes + ahead + 64 * decltype(i)::value); });
    D::step(codes, book, [&](auto i, V w) MXQ_LAMBDA { store(panel + decltype(i)::value * PANEL, w); });
    codes += D::BYTES;
    panel += D::STEP * PANEL;
  }
}

// out[m] of NV tiles = panel . x[m] + bias[m], as in dot_tiles.
template <int NV, int MR>
static void dot_panel(const float* panel, int64_t cols, const float* x, const float* bias, const float* keep, float* out) {
  V dot[MR * NV];
  unroll<MR * NV>([&](auto i) MXQ_LAMBDA { dot[decltype(i)::value] = zero(); });
  for (int64_t c = 0; c < cols; c++, panel += PANEL, x++) {
    V w[NV];
    unroll<NV>([&](auto v) MXQ_LAMBDA { w[decltype(v)::value] = load(panel + 16 * decltype(v)::value); });
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value;
      const V b = set1(x[M * LDX]);
      unroll<NV>([&](auto v) MXQ_LAMBDA { dot[M * NV + decltype(v)::value] = fma(w[decltype(v)::value], b, dot[M * NV + decltype(v)::value]); });
    });
  }
  unroll<MR * NV>([&](auto i) MXQ_LAMBDA {
    constexpr int M = decltype(i)::value / NV, N = decltype(i)::value % NV;
    float* to = out + M * LDX + 16 * N;
    V v = add(dot[M * NV + N], set1(bias[M]));
    if (keep) v = fma(load(to), set1(keep[M]), v);
    store(to, v);
  });
}

static void many_rows(const float* panel, int64_t tiles, int64_t cols, int64_t rows, const float* x, const float* bias, const float* keep, float* out) {
  row_blocks<GEMM_BLOCK>(rows, [&](int64_t m0, auto mr) MXQ_LAMBDA {
    constexpr int MR = decltype(mr)::value;
    const float* kept = keep ? keep + m0 : nullptr;
    if (tiles == GEMM_TILES) dot_panel<GEMM_TILES, MR>(panel, cols, x + m0 * LDX, bias + m0, kept, out + m0 * LDX);
    else dot_panel<1, MR>(panel, cols, x + m0 * LDX, bias + m0, kept, out + m0 * LDX);
  });
}

// ------------------------------------------------------------------------------------------------- products with a page

struct Room {
  float *q, *x, *scores, *sums, *panel, *floats;
  explicit Room(float* p)
      : q(p), x(q + BLOCK_ROWS * LDX), scores(x + BLOCK_ROWS * LDX), sums(scores + BLOCK_ROWS * LDX), panel(sums + BLOCK_ROWS * LDX),
        floats(panel + MAX_HEAD * 2 * LANES) {}
};

// out[m][row] = page . v[m], added to keep[m] * out[m] if there is a keep: scores from queries, or sums from probabilities.
template <class D>
static void page_product(const PageView& p, bool panels, int64_t rows, const float* v, const float* keep, float* out, const Room& s) {
  const int64_t all = tiles(page_rows(p.format)), step = page_tile_bytes(p.format), cols = padded_page_cols(p.format);
  const int64_t group = has_params(p.format) ? page_group_rows(p.format) / LANES : all;  // in tiles
  float bias[BLOCK_ROWS];
  for (int64_t t0 = 0, g = 0; t0 < all; t0 += group, g++) {
    const int64_t t1 = t0 + group < all ? t0 + group : all;
    const float* x = fold(p, g, rows, v, s.x, bias);
    if (!panels) {
      few_rows<D>(p, p.codes + t0 * step, t1 - t0, rows, x, bias, keep, out + t0 * LANES);
    } else {
      for (int64_t t = t0; t < t1;) {
        const int64_t count = t + GEMM_TILES <= t1 ? GEMM_TILES : 1;
        for (int64_t i = 0; i < count; i++) decode_to_panel<D>(p.codes + (t + i) * step, p.codes_ahead, p.grid.book, cols, s.panel + LANES * i);
        many_rows(s.panel, count, cols, rows, x, bias, keep, out + t * LANES);
        t += count;
      }
    }
  }
}

// The outliers' part of a product with a page: a number for each outlier and row, of which there are few beside the codes.
static void add_outliers(const PageView& p, int64_t rows, const float* v, float* out) {
  prefetch_lines(p.codes + page_code_bytes(p.format), p.codes_ahead, OUTLIER_BYTES * p.format.outliers);
  each_outlier(p.format, p.codes, [&](int64_t row, int64_t col, float delta) MXQ_LAMBDA {
    for (int64_t m = 0; m < rows; m++) out[m * LDX + row] += delta * v[m * LDX + col];
  });
}

static void multiply_page(const PageView& p, bool panels, int64_t rows, const float* v, const float* keep, float* out, const Room& s) {
  with_decoder(p.format.bits, p.grid.levels, [&](auto decoder) { page_product<decltype(decoder)>(p, panels, rows, v, keep, out, s); });
  if (p.format.outliers) add_outliers(p, rows, v, out);
}

// ------------------------------------------------------------------------- keys that were stored before their rotary embedding

// A query that is turned back by the position p of the page's first token sees the page as if that were 0,
//     q . R(p + t) k = (R(-p) q) . R(t) k,
// so that one table of 64 positions, which stays in the cache, turns all pages. Scales cannot be folded into the query, whose channels are mixed by the
// turn: keys are dequantized and turned in a panel, 6 operations for 32 numbers, 16 tokens of both channels of a pair.
static void turn_back(const float* cos, int64_t half, int64_t d, int64_t rows, const float* q, float* x) {
  const float* sin = cos + half;
  for (int64_t m = 0; m < rows; m++, q += LDX, x += LDX) {
    for (int64_t c = 0; c < half; c++) {
      const float a = q[c], b = q[c + half];
      x[c] = a * cos[c] + b * sin[c];
      x[c + half] = b * cos[c] - a * sin[c];
    }
    for (int64_t c = 2 * half; c < d; c++) x[c] = q[c];
  }
}

// One tile in the panel: codes become keys, keys are turned. number = scale * w + offset, channel by channel; null: w is the number.
static void turn_tile(const float* tokens, int64_t half, int64_t d, const float* scale, const float* offset, float* panel) {
  const auto number = [&](int64_t c) MXQ_LAMBDA {
    const V w = load(panel + c * PANEL);
    return scale ? fma(w, set1(scale[c]), set1(offset[c])) : w;
  };
  for (int64_t c = 0; c < half; c++, tokens += 2 * LANES) {
    const V a = number(c), b = number(c + half), cos = load(tokens), sin = load(tokens + LANES);
    store(panel + c * PANEL, fnma(b, sin, mul(a, cos)));
    store(panel + (c + half) * PANEL, fma(a, sin, mul(b, cos)));
  }
  for (int64_t c = 2 * half; c < d; c++) store(panel + c * PANEL, number(c));
}

// Outliers are turned by themselves and added to keys that are: those from the `i`-th on whose tokens are in the panel, of `count` tiles from `first` on. Returns
// the next one.
static int64_t turn_outliers(const PageView& p, const Turns& turns, int64_t i, int64_t first, int64_t count, float* panel) {
  const int64_t half = turns.half;
  const uint16_t *index = (const uint16_t*)(p.codes + page_code_bytes(p.format)), *deltas = index + p.format.outliers;
  for (; i < p.format.outliers && index[i] < (first + count) * LANES * OUTLIER_TOKEN; i++) {
    const int64_t token = index[i] / OUTLIER_TOKEN, channel = index[i] % OUTLIER_TOKEN, tile = token / LANES, lane = token % LANES;
    const float delta = half_to_float(deltas[i]);
    float* at = panel + (tile - first) * LANES + lane;
    if (channel >= 2 * half) {
      at[channel * PANEL] += delta;
      continue;
    }
    const int64_t c = channel < half ? channel : channel - half;
    const float* turn = turns.tokens + (tile * half + c) * 2 * LANES + lane;
    const float cos = turn[0] * delta, sin = turn[LANES] * delta;
    at[c * PANEL] += channel < half ? cos : -sin;
    at[(c + half) * PANEL] += channel < half ? sin : cos;
  }
  return i;
}

static void multiply_turned(const PageView& p, const Turns& turns, int64_t page, int64_t rows, const float* q, float* out, const Room& s) {
  const int64_t d = p.format.head, step = page_tile_bytes(p.format), all = tiles(PAGE);
  const int64_t group = has_params(p.format) ? page_group_rows(p.format) / LANES : all;  // in tiles
  const float none[BLOCK_ROWS] = {0};
  float *const scales = has_params(p.format) ? s.floats : nullptr, *const offsets = s.floats + 2 * MAX_HEAD;  // [group][channel]
  for (int64_t g = 0; g < page_groups(p.format); g++)
    for (int64_t c = 0; c < d; c += 16) {
      const V scale = load_half(p.params + 2 * g * d + c);
      store(scales + g * MAX_HEAD + c, scale);
      store(offsets + g * MAX_HEAD + c, fma(set1(p.grid.centre), scale, load_half(p.params + (2 * g + 1) * d + c)));
    }
  turn_back(turns.pages + page * 2 * turns.half, turns.half, d, rows, q, s.x);
  prefetch_lines(p.params, p.params_ahead, 2 * page_params(p.format));
  prefetch_lines(p.codes + page_code_bytes(p.format), p.codes_ahead, OUTLIER_BYTES * p.format.outliers);
  for (int64_t t = 0, outlier = 0; t < all;) {
    const int64_t count = t + GEMM_TILES <= all ? GEMM_TILES : 1;
    for (int64_t i = t; i < t + count; i++) {
      float* panel = s.panel + LANES * (i - t);
      with_decoder(p.format.bits, p.grid.levels, [&](auto decoder) {
        decode_to_panel<decltype(decoder)>(p.codes + i * step, p.codes_ahead, p.grid.book, padded_page_cols(p.format), panel);
      });
      const int64_t of_group = i / group * MAX_HEAD;
      turn_tile(turns.tokens + i * turns.half * 2 * LANES, turns.half, d, scales ? scales + of_group : nullptr, offsets + of_group, panel);
    }
    if (p.format.outliers) outlier = turn_outliers(p, turns, outlier, t, count, s.panel);
    many_rows(s.panel, count, d, rows, s.x, none, nullptr, out + t * LANES);
    t += count;
  }
}

// ------------------------------------------------------------------------------------- products with tokens in floating point

// n tokens of one head as float32: where they lie if they are that already, else a copy.
struct Floats {
  const float* data;
  int64_t stride;
};
static Floats as_float(const Rows& r, int64_t batch, int64_t head, int64_t token, int64_t n, int64_t d, float* copy) {
  const int64_t at = batch * r.batch + head * r.head + token * r.token;
  if (r.type == F32) return {(const float*)r.data + at, r.token};
  for (int64_t t = 0; t < n; t++)
    for (int64_t c = 0; c < d; c += 16) store(copy + t * d + c, load_any(r.data, at + t * r.token + c, r.type));
  return {copy, d};
}

// Scores of few rows: 16 tokens at a time, whose sums across lanes are formed together.
static void plain_scores(Floats k, int64_t n, int64_t d, int64_t rows, const float* q, float* out) {
  for (int64_t m = 0; m < rows; m++, q += LDX, out += LDX) {
    int64_t t = 0;
    for (; t + 16 <= n; t += 16) {
      V sums[16];
      unroll<16 / GEMV_BLOCK>([&](auto part) MXQ_LAMBDA {  // as many tokens as there are registers
        constexpr int P = decltype(part)::value * GEMV_BLOCK;
        const float* row = k.data + (t + P) * k.stride;
        V dot[GEMV_BLOCK];
        unroll<GEMV_BLOCK>([&](auto i) MXQ_LAMBDA { dot[decltype(i)::value] = zero(); });
        for (int64_t c = 0; c < d; c += 16) {
          const V one = load(q + c);
          unroll<GEMV_BLOCK>([&](auto i) MXQ_LAMBDA {
            constexpr int I = decltype(i)::value;
            dot[I] = fma(load(row + I * k.stride + c), one, dot[I]);
          });
        }
        unroll<GEMV_BLOCK>([&](auto i) MXQ_LAMBDA { sums[P + decltype(i)::value] = dot[decltype(i)::value]; });
      });
      store(out + t, sum16(sums));
    }
    for (; t < n; t++) {
      V dot = zero();
      for (int64_t c = 0; c < d; c += 16) dot = fma(load(k.data + t * k.stride + c), load(q + c), dot);
      out[t] = hsum(dot);
    }
  }
}

template <int MR>
static void plain_sums(Floats v, int64_t n, int64_t d, const float* p, const float* keep, float* out) {
  constexpr int U = chains<MR>();
  for (int64_t c = 0; c < d; c += 16) {
    V dot[MR * U];
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value;
      dot[M * U] = mul(load(out + M * LDX + c), set1(keep[M]));
      unroll<U - 1>([&](auto i) MXQ_LAMBDA { dot[M * U + 1 + decltype(i)::value] = zero(); });
    });
    const float* row = v.data + c;
    int64_t t = 0;
    for (; t + U <= n; t += U) {
      unroll<U>([&](auto i) MXQ_LAMBDA {
        const V one = load(row);
        row += v.stride;
        unroll<MR>([&](auto m) MXQ_LAMBDA {
          constexpr int M = decltype(m)::value, A = M * U + decltype(i)::value;
          dot[A] = fma(one, set1(p[M * LDX + t + decltype(i)::value]), dot[A]);
        });
      });
    }
    for (; t < n; t++, row += v.stride) {
      const V one = load(row);
      unroll<MR>([&](auto m) MXQ_LAMBDA { dot[decltype(m)::value * U] = fma(one, set1(p[decltype(m)::value * LDX + t]), dot[decltype(m)::value * U]); });
    }
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value;
      store(out + M * LDX + c, sum_of<U>(dot + M * U));
    });
  }
}

static void multiply_keys(Floats k, int64_t n, int64_t d, bool panels, int64_t rows, const float* q, float* out, const Room& s) {
  if (!panels) return plain_scores(k, n, d, rows, q, out);
  const float none[BLOCK_ROWS] = {0};
  V block[16];
  for (int64_t t = 0; t < n; t += PANEL) {  // panels of up to PANEL tokens, turned
    const int64_t left = n - t, count = left > PANEL - LANES ? GEMM_TILES : 1, end = left < PANEL ? left : PANEL;
    for (int64_t i = 0; i < count * LANES; i += LANES)
      for (int64_t c = 0; c < d; c += 16) {
        unroll<16>([&](auto l) MXQ_LAMBDA {
          constexpr int L = decltype(l)::value;
          block[L] = i + L < end ? load(k.data + (t + i + L) * k.stride + c) : zero();
        });
        transpose(block);
        for (int j = 0; j < 16; j++) store(s.panel + (c + j) * PANEL + i, block[j]);
      }
    many_rows(s.panel, count, d, rows, q, none, nullptr, out + t);
  }
}

static void multiply_values(Floats v, int64_t n, int64_t d, bool panels, int64_t rows, const float* p, const float* keep, float* out, const Room& s) {
  if (!panels)
    return row_blocks<GEMV_BLOCK>(rows, [&](int64_t m0, auto mr) MXQ_LAMBDA { plain_sums<decltype(mr)::value>(v, n, d, p + m0 * LDX, keep + m0, out + m0 * LDX); });
  const float none[BLOCK_ROWS] = {0};
  for (int64_t c = 0; c < d;) {
    const int64_t count = c + PANEL <= d ? GEMM_TILES : 1;
    for (int64_t t = 0; t < n; t++)
      for (int64_t i = 0; i < count; i++) store(s.panel + t * PANEL + LANES * i, load(v.data + t * v.stride + c + LANES * i));
    many_rows(s.panel, count, n, rows, p, none, keep, out + c);
    c += count * LANES;
  }
}

// ------------------------------------------------------------------------------------------------------------------- softmax

// Rows r0 .. r0 + rows of (batch, kv head) `pair`, and the state of their softmax.
struct Block {
  int64_t pair, r0, rows;
  Span oldest, newest;      // of its first and last query
  float most[BLOCK_ROWS];   // largest score so far, in units of ln 2
  float total[BLOCK_ROWS];  // sum of the probabilities so far, in units of 2^most
  float keep[BLOCK_ROWS];   // what earlier sums are to be multiplied by
};

static Block block_of(const Attend& a, int64_t item) {
  Block b{};
  const int64_t i = item % a.blocks;
  b.pair = item / a.blocks;
  b.r0 = part_start(a.rows, a.blocks, i);
  b.rows = part_start(a.rows, a.blocks, i + 1) - b.r0;
  b.oldest = span_of(a, b.r0 / a.group);
  b.newest = span_of(a, (b.r0 + b.rows - 1) / a.group);
  return b;
}

static constexpr float LOWEST = -3.4028235e38f;  // and not minus infinity: differences with it are numbers

// Scores of n keys from `start` on: capped, then minus infinity where they are hidden, up to 64. `mask`: of the keys from `start`, or null.
static void finish_scores(const Attend& a, const Block& b, int64_t start, int64_t n, const uint8_t* mask, float* scores) {
  if (a.cap) {
    const V unit = set1(a.cap * 1.44269504f);
    for (int64_t m = 0; m < b.rows; m++)
      for (int64_t t = 0; t < n; t += 16) store(scores + m * LDX + t, mul(tanhv(load(scores + m * LDX + t)), unit));
  }
  if (!mask && n == PAGE && b.newest.first <= start && start + n <= b.oldest.end) return;
  for (int64_t m = 0; m < b.rows; m++) {
    const int64_t query = (b.r0 + m) / a.group;
    const Span seen = span_of(a, query);
    const uint8_t* row = mask ? mask + query * a.mask_query : nullptr;
    for (int64_t t = 0; t < PAGE; t++)
      if (t >= n || start + t < seen.first || start + t >= seen.end || (row && !row[t])) scores[m * LDX + t] = -__builtin_inff();
  }
}

// The scores of `chunks` chunks become probabilities in units of the largest score so far. Several chunks together, because a row's largest score, its
// exponentials and their sum wait for each other: the latencies of one chunk would not be hidden.
static void soften(Block& b, int64_t chunks, float* scores) {
  const int64_t keys = PAGE * chunks;
  float before[BLOCK_ROWS];
  for (int64_t m = 0; m < b.rows; m++) {
    const float* s = scores + m * LDX;
    V most[4];
    unroll<4>([&](auto i) MXQ_LAMBDA { most[decltype(i)::value] = load(s + 16 * decltype(i)::value); });
    for (int64_t t = PAGE; t < keys; t += PAGE)
      unroll<4>([&](auto i) MXQ_LAMBDA { most[decltype(i)::value] = larger(most[decltype(i)::value], load(s + t + 16 * decltype(i)::value)); });
    const float top = max_of(larger(larger(most[0], most[1]), larger(most[2], most[3])));
    before[m] = b.most[m];
    b.most[m] = top > before[m] ? top : before[m];
  }
  for (int64_t m = 0; m < b.rows; m += 16) store(b.keep + m, exp2v(sub(load(before + m), load(b.most + m))));  // reads to a multiple of 16
  for (int64_t m = 0; m < b.rows; m++) {
    float* s = scores + m * LDX;
    const V most = set1(b.most[m]);
    V sum[4];
    unroll<4>([&](auto i) MXQ_LAMBDA { sum[decltype(i)::value] = zero(); });
    for (int64_t t = 0; t < keys; t += PAGE)
      unroll<4>([&](auto i) MXQ_LAMBDA {
        constexpr int I = decltype(i)::value;
        const V p = exp2v(sub(load(s + t + 16 * I), most));
        store(s + t + 16 * I, p);
        sum[I] = add(sum[I], p);
      });
    b.total[m] = b.total[m] * b.keep[m] + hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  }
}

// -------------------------------------------------------------------------------------------------------------------- attend

// Row r of a block's queries, as a tensor's element index (without its channel).
MXQ_INLINE int64_t row_index(const Attend& a, const Rows& r, int64_t pair, int64_t row) {
  const int64_t batch = pair / a.kv_heads, head = pair % a.kv_heads * a.group + row % a.group;
  return batch * r.batch + head * r.head + row / a.group * r.token;
}

static void load_queries(const Attend& a, const Block& b, float* q) {
  const int64_t d = a.kind.key.head;
  const V scale = set1(a.cap ? a.scale / a.cap : a.scale * 1.44269504f);
  for (int64_t m = 0; m < b.rows; m++) {
    const int64_t at = row_index(a, a.q, b.pair, b.r0 + m);
    for (int64_t c = 0; c < d; c += 16) store(q + m * LDX + c, mul(load_any(a.q.data, at + c, a.q.type), scale));
  }
}

struct Later {
  int64_t page, pair;
};

// Points at page `page`, and at what is to be fetched meanwhile, which has the format `ahead`.
static void show_page(PageView& v, const PageParts* pages, const uint8_t* PageParts::*codes, const uint16_t* PageParts::*params, int64_t page, int64_t pair,
                      Later later, PageFormat ahead) {
  v.codes = pages[page].*codes + pair * page_bytes(v.format);
  v.params = pages[page].*params + pair * page_params(v.format);
  v.codes_ahead = pages[later.page].*codes + later.pair * page_bytes(ahead) - v.codes;
  v.params_ahead = (const char*)(pages[later.page].*params + later.pair * page_params(ahead)) - (const char*)v.params;
}

// The natural logarithm of a query's sum of exponentials, from its largest score in units of ln 2 and the sum in units of that.
static void store_lse(const Attend& a, int64_t pair, int64_t row, float most, float total) {
  const int64_t head = pair / a.kv_heads * a.q_heads + pair % a.kv_heads * a.group + row % a.group;
  a.lse[head * a.queries + row / a.group] = total == 0.0f ? -__builtin_inff() : most * 0.693147181f + __builtin_logf(total);
}

static void attend_run(const Attend& a, int64_t item, float* scratch) {
  const Room s(scratch);
  const int64_t per_run = a.batch * a.kv_heads * a.blocks, run = item / per_run, d = a.kind.key.head;
  Block b = block_of(a, item % per_run);
  const int64_t batch = b.pair / a.kv_heads, head = b.pair % a.kv_heads;
  for (int64_t m = 0; m < BLOCK_ROWS; m++) b.most[m] = LOWEST;
  for (int64_t m = 0; m < b.rows; m++) memset(s.sums + m * LDX, 0, sizeof(float) * d);
  load_queries(a, b, s.q);

  const int64_t sinks = sink_chunks(a), first_tail = sinks + a.page_count, chunks = a.chunk1 - a.chunk0;
  const int64_t begin = a.chunk0 + part_start(chunks, a.runs, run), end = a.chunk0 + part_start(chunks, a.runs, run + 1);
  const auto view = [](PageFormat f, const float* levels) { return PageView{f, grid_of(f, levels), nullptr, nullptr, 0, 0}; };
  PageView keys[2] = {view(a.kind.key, a.kind.key_levels)}, values[2] = {view(a.kind.value, a.kind.value_levels)};
  if (a.round) keys[1] = view(a.low.key, a.low.key_levels), values[1] = view(a.low.value, a.low.value_levels);
  const int64_t ahead = ceil_div(ahead_of<0>(), page_bytes(a.kind.key) + page_bytes(a.kind.value)), pairs = a.batch * a.kv_heads;
  const int64_t first_page = begin > sinks ? begin - sinks : 0, last_page = end < first_tail ? end - sinks : a.page_count;
  // The page that is due `ahead` pages later; behind the run's last one come those of the next head, which is the next item. The same page: nothing.
  const auto later_page = [&](int64_t page) {
    const int64_t later = page + ahead, over = later - last_page + first_page;
    return later < last_page ? Later{later, b.pair} : b.pair + 1 < pairs && a.blocks == 1 && over < last_page ? Later{over, b.pair + 1} : Later{page, b.pair};
  };

  float ones[BLOCK_ROWS];
  for (float& one : ones) one = 1.0f;
  for (int64_t i = begin; i < end;) {
    Chunk chunks[TOGETHER];
    int64_t count = 0;
    for (; i < end && count < TOGETHER; i++) {
      const Chunk c = chunk_of(a, i);
      if (c.start >= b.newest.end || c.start + c.keys <= b.oldest.first) continue;
      const uint8_t* mask = a.mask ? a.mask + batch * a.mask_batch + c.start : nullptr;
      if (mask && !a.mask_query) {
        if (!memchr(mask, 1, c.keys)) continue;
        if (!memchr(mask, 0, c.keys)) mask = nullptr;
      }
      float* scores = s.scores + PAGE * count;
      if (c.part == PAGED) {
        PageView& key = keys[&kind_of(a, c.index) == &a.low];
        const Later later = later_page(c.index);
        show_page(key, a.pages, &PageParts::k_codes, &PageParts::k_params, c.index, b.pair, later, kind_of(a, later.page).key);
        if (a.turns.half) multiply_turned(key, a.turns, c.index, b.rows, s.q, scores, s);
        else multiply_page(key, a.panels, b.rows, s.q, nullptr, scores, s);
      } else {
        multiply_keys(as_float(c.part == TAIL ? a.tail_k : a.sink_k, batch, head, c.index, c.keys, d, s.floats), c.keys, d, a.panels, b.rows, s.q, scores, s);
      }
      finish_scores(a, b, c.start, c.keys, mask, scores);
      chunks[count++] = c;
    }
    if (!count) break;
    soften(b, count, s.scores);
    for (int64_t j = 0; j < count; j++) {
      const Chunk& c = chunks[j];
      const float *p = s.scores + PAGE * j, *keep = j ? ones : b.keep;
      if (c.part == PAGED) {
        PageView& value = values[&kind_of(a, c.index) == &a.low];
        const Later later = later_page(c.index);
        show_page(value, a.pages, &PageParts::v_codes, &PageParts::v_params, c.index, b.pair, later, kind_of(a, later.page).value);
        multiply_page(value, a.panels, b.rows, p, keep, s.sums, s);
      } else {
        multiply_values(as_float(c.part == TAIL ? a.tail_v : a.sink_v, batch, head, c.index, c.keys, d, s.floats), c.keys, d, a.panels, b.rows, p, keep, s.sums, s);
      }
    }
  }

  for (int64_t m = 0; m < b.rows; m++) {
    const float* sums = s.sums + m * LDX;
    if (a.runs == 1) {
      if (a.lse) store_lse(a, b.pair, b.r0 + m, b.most[m], b.total[m]);
      const int64_t at = row_index(a, a.out, b.pair, b.r0 + m);
      const V factor = set1(b.total[m] == 0.0f ? 0.0f : 1.0f / b.total[m]);  // a row that sees no key is 0
      for (int64_t c = 0; c < d; c += 16) store_any((void*)a.out.data, at + c, a.out.type, mul(load(sums + c), factor));
    } else {
      float* to = a.partial + ((run * a.batch * a.kv_heads + b.pair) * a.rows + b.r0 + m) * (d + 2);
      for (int64_t c = 0; c < d; c += 16) store(to + c, load(sums + c));
      to[d] = b.most[m], to[d + 1] = b.total[m];
    }
  }
}

static void merge_runs(const Attend& a, int64_t item) {
  const Block b = block_of(a, item);
  const int64_t d = a.kind.key.head, row_floats = d + 2, run_floats = a.batch * a.kv_heads * a.rows * row_floats;
  for (int64_t m = 0; m < b.rows; m++) {
    const float* part = a.partial + (b.pair * a.rows + b.r0 + m) * row_floats;
    float most = LOWEST, total = 0.0f, weights[MAX_RUNS];
    for (int64_t r = 0; r < a.runs; r++) {
      weights[r] = part[r * run_floats + d];
      most = weights[r] > most ? weights[r] : most;
    }
    for (int64_t r = 0; r < a.runs; r += 16) store(weights + r, exp2v(sub(load(weights + r), set1(most))));
    for (int64_t r = 0; r < a.runs; r++) total += weights[r] * part[r * run_floats + d + 1];
    if (a.lse) store_lse(a, b.pair, b.r0 + m, most, total);
    const V factor = set1(total == 0.0f ? 0.0f : 1.0f / total);
    const int64_t at = row_index(a, a.out, b.pair, b.r0 + m);
    for (int64_t c = 0; c < d; c += 16) {
      V sum = zero();
      for (int64_t r = 0; r < a.runs; r++) sum = fma(set1(weights[r]), load(part + r * run_floats + c), sum);
      store_any((void*)a.out.data, at + c, a.out.type, mul(sum, factor));
    }
  }
}

extern const AttentionKernels attention_kernels = {attend_run, merge_runs, pack_head, unpack_head};

}  // namespace MXQ_TARGET
}  // namespace mxq
