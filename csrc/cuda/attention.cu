// Attention over the packed KV cache. A block has four warps, works for the query rows of one key/value head, and reads a run of chunks of 64 keys: warp w
// chunks w, w + 4, ..., each warp with a softmax of its own, and no barrier before the end. There the warps are merged in order, and, if several blocks
// share the chunks, their results by a second launch (attend_merge), in order too. So equal calls give equal bits.
//
// Both products run on raw codes as operand A of the tensor cores: scales belong to the page's columns, which are what is summed over, so they are
// multiplied into the vectors (queries, probabilities), and the zeros add one number to each row:
//
//   score[t] = sum over d of (q[d] s[d]) code[t][d] + sum over d of q[d] z[d]
//   out[d]   = sum over t of (p[t] s[t]) code[t][d] + sum over t of p[t] z[t]
//
// Codes are centred, as they are stored, which keeps the two sums from cancelling each other more than they must; z stands for the zero and 2^(bits-1) scales.
//
// Rounding. Codes are exact. Vectors are float32 until they become operand B, in two fp16 of 11 bits each, in neighbouring columns of one product: 4 rows
// fill its 8 columns. Powers of two keep them away from both ends of fp16's range: queries reach 2^14, scales of a page 2^0, probabilities 2^13. Products
// are summed in float32.
//
// Sums live in shared memory, where each lane has its own, so that D is a number like any other: they are read and written once for 64 keys.
#include "attention_tiles.cuh"
#include "numbers.cuh"
#include "simt.hpp"

namespace mxq::cuda {
namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr float LOWEST = -3.4028235e38f;  // and not minus infinity: differences with it are numbers
constexpr float PROBABILITY_EXPONENT = 13.0f, LOG2E = 1.44269504f;

// Sums over the lanes of one g; over all g of one t the other way round.
__device__ __forceinline__ float sum_over_t(float v) {
  v += __shfl_xor_sync(ALL, v, 1);
  return v + __shfl_xor_sync(ALL, v, 2);
}
__device__ __forceinline__ float sum_over_g(float v) {
#pragma unroll
  for (int m = 4; m < WARP; m *= 2) v += __shfl_xor_sync(ALL, v, m);
  return v;
}
__device__ __forceinline__ float largest_over_g(float v) {
#pragma unroll
  for (int m = 4; m < WARP; m *= 2) v = fmaxf(v, __shfl_xor_sync(ALL, v, m));
  return v;
}

// The scales and zeros of a group of a page. Scales are taken times a power of two that brings the largest finite one to [1, 2).
struct Scales {
  const uint16_t *s, *z;
  uint32_t factor;     // that power, as two fp16
  float undo, centre;  // its inverse, and 2^(bits-1) times that
};
template <int BITS>
__device__ __forceinline__ Scales scales_of(const uint16_t* params, int group, int cols, int lane) {
  Scales out;
  out.s = params + 2 * group * cols, out.z = out.s + cols;
  uint32_t most = 0;
  for (int c = 2 * lane; c < cols; c += 2 * WARP) {  // positive numbers are ordered like their bits
    const uint32_t w = __ldg(reinterpret_cast<const uint32_t*>(out.s + c)), x = w & 0xffff, y = w >> 16;
    if (x < 0x7c00) most = max(most, x);
    if (y < 0x7c00) most = max(most, y);
  }
#pragma unroll
  for (int m = WARP / 2; m; m /= 2) most = max(most, __shfl_xor_sync(ALL, most, m));
  const int exponent = min(15 - int(most >> 10), 15);  // at least -15 for what is finite
  out.undo = power_of_2(-exponent), out.centre = out.undo * float(1 << (BITS - 1));
  out.factor = both(exponent > -15 ? uint32_t(exponent + 15) << 10 : 1u << 9);  // 2^-15 is subnormal
  return out;
}

// Vectors times scales, 8 columns from `col` on (which are there), and what their zeros add. A number that is 0 hides a scale that is not finite.
__device__ __forceinline__ Vectors fold(const float* numbers, const Scales& scales, int col, float& bias, int lane) {
  const uint4 sw = __ldg(reinterpret_cast<const uint4*>(scales.s + col)), zw = __ldg(reinterpret_cast<const uint4*>(scales.z + col));
  const uint32_t s[4] = {sw.x, sw.y, sw.z, sw.w}, z[4] = {zw.x, zw.y, zw.z, zw.w};
  float x[8];
  load8(numbers + col, x);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 scale = ptx::half2_to_floats(ptx::hmul2(s[i], scales.factor)), zero = ptx::half2_to_floats(z[i]);
    const float s2[2] = {scale.x, scale.y}, z2[2] = {zero.x, zero.y};
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float& v = x[2 * i + j];
      if (v == 0.0f) continue;
      bias = fmaf(v, z2[j], bias);
      v *= s2[j];
      bias = fmaf(v, scales.centre, bias);
    }
  }
  return vectors_of(x, lane);
}

__device__ __forceinline__ Vectors plain(const float* numbers, int col, int lane) {
  float x[8];
  load8(numbers + col, x);
  return vectors_of(x, lane);
}

__device__ __forceinline__ Vectors nothing() { return {{{0, 0}, {0, 0}}}; }

__device__ __forceinline__ void multiply(float (&c)[4], const Tile& tile, const Vectors& v) {
  ptx::mma_m16n8k16_f16(c, tile.a[0], v.b[0], c);
  ptx::mma_m16n8k16_f16(c, tile.a[1], v.b[1], c);
}

// What a warp works with. Row `t + 4 * m` of the block, m < NT, is the lane's own; g and t as everywhere.
template <int NT>
struct Warp {
  int lane, head;
  const float* q;   // [rows][head], times a power of two
  float* p;         // [rows][SCORE_STRIDE]
  float2* sums;     // [NT][head / 16][lane]: channels 16 * tile + 2g and the next of row t + 4 * m
  float keep[NT];   // what the sums so far are multiplied by
};

using Scores = float[4][2];  // of keys 16 * tile + 2g and the next

// ------------------------------------------------------------------------------------------------------------------ pages

template <int BITS, int NT>
__device__ __forceinline__ void page_scores(const Warp<NT>& w, const uint8_t* codes, const uint16_t* params, int groups, Scores (&score)[NT]) {
  const int stripes = (w.head + STRIPE - 1) / STRIPE, columns = BITS == 16 ? w.head : stripes * STRIPE;
  const int64_t tile_bytes = int64_t(columns) * LANES * BITS / 8;
  Scales scales[2];
  if constexpr (BITS != 16) {
    scales[0] = scales_of<BITS>(params, 0, w.head, w.lane);
    scales[1] = groups == 2 ? scales_of<BITS>(params, 1, w.head, w.lane) : scales[0];
  }
  float c[4][NT][4] = {}, bias[2][NT] = {};
#pragma unroll 1
  for (int stripe = 0; stripe < stripes; stripe++) {
    const int col = stripe * STRIPE + 8 * (w.lane % 4);
    const bool inside = col < w.head;
    Codes<BITS> tiles[4];
#pragma unroll
    for (int i = 0; i < 4; i++) tiles[i].load(codes + i * tile_bytes + stripe * 64 * BITS, w.lane, inside);
    Vectors v[NT];
#pragma unroll
    for (int half = 0; half < 2; half++) {  // 32 tokens each, with scales of their own if there are two groups
      if (half == 0 || (BITS != 16 && groups == 2)) {
#pragma unroll
        for (int m = 0; m < NT; m++) {
          const float* row = w.q + (w.lane / 8 + 4 * m) * w.head;
          if (!inside) v[m] = nothing();
          else if constexpr (BITS == 16) v[m] = plain(row, col, w.lane);
          else v[m] = fold(row, scales[half], col, bias[half][m], w.lane);
        }
      }
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) {
        Tile tile;
        tiles[i].decode(tile, w.lane);
#pragma unroll
        for (int m = 0; m < NT; m++) multiply(c[i][m], tile, v[m]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int m = 0; m < NT; m++) {
      float zeros = 0.0f, undo = 1.0f;
      if constexpr (BITS != 16) {
        zeros = sum_over_t(groups == 2 ? bias[half][m] : bias[0][m]);  // of row g / 2
        zeros = __shfl_sync(ALL, zeros, 8 * (w.lane % 4));
        undo = scales[half].undo;
      }
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) score[m][i][r] = fmaf(c[i][m][2 * r] + c[i][m][2 * r + 1], undo, zeros);
    }
  }
}

template <int NT>
__device__ __forceinline__ void add_to_sums(const Warp<NT>& w, int m, int tile, const float (&c)[4], float undo, float zeros, float keep) {
  float2& sum = w.sums[(m * (w.head / LANES) + tile) * WARP + w.lane];
  float2 s = sum;
  s.x = fmaf(s.x, keep, fmaf(c[0] + c[1], undo, zeros));
  s.y = fmaf(s.y, keep, fmaf(c[2] + c[3], undo, zeros));
  sum = s;
}

template <int BITS, int NT>
__device__ __forceinline__ void page_sums(const Warp<NT>& w, const uint8_t* codes, const uint16_t* params, int group) {
  constexpr int TILE_BYTES = CHUNK * LANES * BITS / 8;
  const int tiles = w.head / LANES, step = BITS == 16 ? tiles : group / LANES;
#pragma unroll 1
  for (int first = 0, i = 0; first < tiles; first += step, i++) {
    Scales scales;
    if constexpr (BITS != 16) scales = scales_of<BITS>(params, i, CHUNK, w.lane);
    Vectors v[2][NT];
    float zeros[NT] = {};
#pragma unroll
    for (int m = 0; m < NT; m++) {
      const float* row = w.p + (w.lane / 8 + 4 * m) * SCORE_STRIDE;
#pragma unroll
      for (int stripe = 0; stripe < 2; stripe++) {
        const int col = stripe * STRIPE + 8 * (w.lane % 4);
        if constexpr (BITS == 16) v[stripe][m] = plain(row, col, w.lane);
        else v[stripe][m] = fold(row, scales, col, zeros[m], w.lane);
      }
      if constexpr (BITS != 16) zeros[m] = __shfl_sync(ALL, sum_over_t(zeros[m]), 8 * (w.lane % 4));
    }
    const int last = min(first + step, tiles);
#pragma unroll 2
    for (int tile = first; tile < last; tile++) {
      Codes<BITS> words[2];
#pragma unroll
      for (int stripe = 0; stripe < 2; stripe++) words[stripe].load(codes + tile * TILE_BYTES + stripe * 64 * BITS, w.lane, true);
      float c[NT][4] = {};
#pragma unroll
      for (int stripe = 0; stripe < 2; stripe++) {
        Tile a;
        words[stripe].decode(a, w.lane);
#pragma unroll
        for (int m = 0; m < NT; m++) multiply(c[m], a, v[stripe][m]);
      }
#pragma unroll
      for (int m = 0; m < NT; m++) add_to_sums(w, m, tile, c[m], BITS == 16 ? 1.0f : scales.undo, zeros[m], w.keep[m]);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------ sink and tail

template <int TYPE, int NT>
__device__ __forceinline__ void token_scores(const Warp<NT>& w, Tokens<TYPE> k, Scores (&score)[NT]) {
  constexpr int PARTS = Tokens<TYPE>::PARTS;
  k.scale(w.head, w.lane);
  float c[4][NT][4] = {};
#pragma unroll 1
  for (int first = 0; first < w.head; first += STRIPE) {
    const int col = first + 8 * (w.lane % 4);
    const bool inside = col < w.head;
    Vectors v[NT];
#pragma unroll
    for (int m = 0; m < NT; m++) v[m] = inside ? plain(w.q + (w.lane / 8 + 4 * m) * w.head, col, w.lane) : nothing();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (LANES * i >= k.n) break;
      Tile tiles[PARTS];
      k.keys(i, col, inside, w.lane, tiles);
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int m = 0; m < NT; m++) multiply(c[i][m], tiles[part], v[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < NT; m++)
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) score[m][i][r] = (c[i][m][2 * r] + c[i][m][2 * r + 1]) * k.undo;
}

template <int TYPE, int NT>
__device__ __forceinline__ void token_sums(const Warp<NT>& w, Tokens<TYPE> values) {
  constexpr int PARTS = Tokens<TYPE>::PARTS;
  values.scale(w.head, w.lane);
#pragma unroll 1
  for (int stripe = 0; stripe * STRIPE < values.n; stripe++) {
    Vectors v[NT];
#pragma unroll
    for (int m = 0; m < NT; m++) v[m] = plain(w.p + (w.lane / 8 + 4 * m) * SCORE_STRIDE, stripe * STRIPE + 8 * (w.lane % 4), w.lane);
#pragma unroll 1
    for (int tile = 0; tile < w.head / LANES; tile++) {
      float c[NT][4] = {};
      Tile tiles[PARTS];
      values.values(tile, stripe, w.lane, tiles);
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int m = 0; m < NT; m++) multiply(c[m], tiles[part], v[m]);
#pragma unroll
      for (int m = 0; m < NT; m++) add_to_sums(w, m, tile, c[m], values.undo, 0.0f, stripe ? 1.0f : w.keep[m]);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------ softmax

// Keys that a query sees, apart from the mask: from `first` to before `end`; either may lie outside of the keys.
struct Span {
  int first, end;
};
__device__ __forceinline__ Span span_of(const AttendParams& p, int total, int query) {
  const int position = total - p.queries + query;
  return {p.window ? position - p.window + 1 : 0, p.causal ? position + 1 : total};
}

// Scores of the lane's row r0 + t + 4 * m in units of ln 2, minus infinity where a key is hidden.
__device__ __forceinline__ void finish_scores(const AttendParams& p, int total, int row, int64_t batch, int start, int keys, float factor, int lane, Scores& score) {
  const Span seen = row < p.rows ? span_of(p, total, row / p.group) : Span{0, 0};
  const uint8_t* mask = p.mask && row < p.rows ? p.mask + batch * p.mask_batch + row / p.group * p.mask_query : nullptr;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int key = 16 * i + 2 * (lane / 4) + r, at = start + key;
      float s = score[i][r] * factor;
      if (p.cap != 0.0f) s = p.cap * LOG2E * tanhf(s);
      const bool hidden = key >= keys || at < seen.first || at >= seen.end || (mask && !__ldg(mask + at));
      score[i][r] = hidden ? -INFINITY : s;
    }
}

// Element of row `row` of the block's queries.
__device__ __forceinline__ int64_t row_index(const AttendParams& p, const RowsView& r, int pair, int row) {
  return pair / p.kv_heads * r.batch + (int64_t(pair % p.kv_heads) * p.group + row % p.group) * r.head + row / p.group * r.token;
}

template <int TYPE>
__device__ __forceinline__ Tokens<TYPE> tokens_of(const AttendParams& p, const RowsView& r, int pair, int token, int n) {
  const int64_t first = pair / p.kv_heads * r.batch + pair % p.kv_heads * r.head + token * r.token;
  return {static_cast<const uint8_t*>(r.data) + first * Tokens<TYPE>::SIZE, r.token * Tokens<TYPE>::SIZE, n, 1.0f, 1.0f};
}

// ------------------------------------------------------------------------------------------------------------------ the kernels

// grid: (pairs, blocks of rows, splits), the last fastest.
template <int NT>
__device__ __forceinline__ void attend(const AttendParams& p) {
  constexpr int ROWS = TILE_QUERIES * NT;
  MXQ_DYN_SMEM(float, memory);
  const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP, t = lane % 4;
  const int split = int(blockIdx.x % unsigned(p.splits)), rest = int(blockIdx.x / unsigned(p.splits)), pair = rest / p.blocks, row0 = rest % p.blocks * ROWS;
  float* const queries = memory;                                              // [ROWS][head]
  float* const scores = queries + ROWS * p.head;                              // [ATTEND_WARPS][ROWS][SCORE_STRIDE]
  float* const all_sums = scores + ATTEND_WARPS * ROWS * SCORE_STRIDE;        // [ATTEND_WARPS][ROWS * head]
  float* const told = all_sums + ATTEND_WARPS * ROWS * p.head;                // [ATTEND_WARPS][ROWS][2]: largest score, sum of probabilities
  Keys* const shared_keys = reinterpret_cast<Keys*>(told + ATTEND_WARPS * ROWS * 2);  // registers are short: read anew for each chunk
  if (threadIdx.x == 0) *shared_keys = p.counts ? Keys{p.keys.sink, __ldg(p.counts), __ldg(p.counts + 1)} : p.keys;

  // Queries in float32, each row times the power of two that brings its largest finite number near 2^14; told has the inverse meanwhile.
  for (int row = warp; row < ROWS; row += ATTEND_WARPS) {
    const bool there = row0 + row < p.rows;
    const int64_t from = there ? row_index(p, p.q, pair, row0 + row) : 0;
    uint32_t most = 0;
    for (int c = lane; c < p.head; c += WARP) {
      const float x = there ? number_at(p.q.data, from + c, p.q.type) : 0.0f;
      queries[row * p.head + c] = x;
      const uint32_t size = __float_as_uint(x) & 0x7fffffffu;
      if (size < 0x7f800000u) most = max(most, size);
    }
#pragma unroll
    for (int m = WARP / 2; m; m /= 2) most = max(most, __shfl_xor_sync(ALL, most, m));
    const int exponent = raise_to_2_14(most);
    for (int c = lane; c < p.head; c += WARP) queries[row * p.head + c] *= power_of_2(exponent);  // the lane's own
    if (lane == 0) told[row] = power_of_2(-exponent);
  }
  __syncthreads();
  Warp<NT> w;
  w.lane = lane, w.head = p.head, w.q = queries, w.p = scores + warp * ROWS * SCORE_STRIDE;
  w.sums = reinterpret_cast<float2*>(all_sums + warp * ROWS * p.head);
  float factor[NT], most[NT], total[NT];
#pragma unroll
  for (int m = 0; m < NT; m++) {
    factor[m] = told[t + 4 * m] * (p.cap != 0.0f ? p.scale / p.cap : p.scale * LOG2E);
    most[m] = LOWEST, total[m] = 0.0f;
    for (int tile = 0; tile < p.head / LANES; tile++) w.sums[(m * (p.head / LANES) + tile) * WARP + lane] = make_float2(0.0f, 0.0f);
  }
  __syncthreads();  // told is read, and will be written again

  const int chunk0 = shared_keys->first(p.queries, p.window), chunks = shared_keys->chunks() - chunk0, each = chunks / p.splits, larger = chunks % p.splits;
  const int begin = chunk0 + split * each + min(split, larger), end = begin + each + (split < larger);
  const Span oldest = span_of(p, shared_keys->total(), row0 / p.group);
  const Span newest = span_of(p, shared_keys->total(), (min(row0 + ROWS, p.rows) - 1) / p.group);
#pragma unroll 1
  for (int chunk = begin + warp; chunk < end; chunk += ATTEND_WARPS) {
    const Keys all = *shared_keys;
    const int sinks = all.sinks(), tail = sinks + all.pages;
    const bool paged = chunk >= sinks && chunk < tail, sink = chunk < sinks;
    const int token = CHUNK * (chunk - (sink ? 0 : paged ? sinks : tail));  // within its part
    const int start = token + (sink ? 0 : paged ? all.sink : all.packed());
    const int keys = paged ? CHUNK : min((sink ? all.sink : all.tail) - token, CHUNK);
    if (start >= newest.end || start + keys <= oldest.first) continue;
    PageParts page = {};
    const RowsView &k = sink ? p.sink_k : p.tail_k, &v = sink ? p.sink_v : p.tail_v;
    Scores score[NT];
    if (paged) {
      page = p.pages[chunk - sinks];
      page.k_codes += pair * p.key_bytes, page.k_params += pair * p.key_halves, page.v_codes += pair * p.value_bytes, page.v_params += pair * p.value_halves;
      switch (p.key_bits) {
        case 2: page_scores<2>(w, page.k_codes, page.k_params, p.key_groups, score); break;
        case 3: page_scores<3>(w, page.k_codes, page.k_params, p.key_groups, score); break;
        case 4: page_scores<4>(w, page.k_codes, page.k_params, p.key_groups, score); break;
        case 8: page_scores<8>(w, page.k_codes, page.k_params, p.key_groups, score); break;
        default: page_scores<16>(w, page.k_codes, page.k_params, p.key_groups, score);
      }
    } else if (k.type == F32) {
      token_scores(w, tokens_of<F32>(p, k, pair, token, keys), score);
    } else if (k.type == BF16) {
      token_scores(w, tokens_of<BF16>(p, k, pair, token, keys), score);
    } else {
      token_scores(w, tokens_of<F16>(p, k, pair, token, keys), score);
    }

#pragma unroll
    for (int m = 0; m < NT; m++) {
      finish_scores(p, shared_keys->total(), row0 + t + 4 * m, pair / p.kv_heads, start, keys, factor[m], lane, score[m]);
      float top = most[m];
#pragma unroll
      for (int i = 0; i < 4; i++) top = fmaxf(top, fmaxf(score[m][i][0], score[m][i][1]));
      top = largest_over_g(top);
      w.keep[m] = ptx::exp2_approx(most[m] - top);
      most[m] = top;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float a = ptx::exp2_approx(score[m][i][0] - top + PROBABILITY_EXPONENT), b = ptx::exp2_approx(score[m][i][1] - top + PROBABILITY_EXPONENT);
        *reinterpret_cast<float2*>(w.p + (t + 4 * m) * SCORE_STRIDE + 16 * i + 2 * (lane / 4)) = make_float2(a, b);
        sum += a + b;
      }
      total[m] = fmaf(total[m], w.keep[m], sum_over_g(sum));
    }
    __syncwarp();
    if (paged) {
      switch (p.value_bits) {
        case 2: page_sums<2>(w, page.v_codes, page.v_params, p.value_group); break;
        case 3: page_sums<3>(w, page.v_codes, page.v_params, p.value_group); break;
        case 4: page_sums<4>(w, page.v_codes, page.v_params, p.value_group); break;
        case 8: page_sums<8>(w, page.v_codes, page.v_params, p.value_group); break;
        default: page_sums<16>(w, page.v_codes, page.v_params, p.value_group);
      }
    } else if (v.type == F32) {
      token_sums(w, tokens_of<F32>(p, v, pair, token, keys));
    } else if (v.type == BF16) {
      token_sums(w, tokens_of<BF16>(p, v, pair, token, keys));
    } else {
      token_sums(w, tokens_of<F16>(p, v, pair, token, keys));
    }
    __syncwarp();  // the probabilities are read
  }

#pragma unroll
  for (int m = 0; m < NT; m++)
    if (lane / 4 == 0) {
      float* mine = told + (warp * ROWS + t + 4 * m) * 2;
      mine[0] = most[m], mine[1] = total[m];
    }
  __syncthreads();
  for (int i = int(threadIdx.x); i < ROWS * p.head; i += ATTEND_THREADS) {
    const int row = i / p.head, channel = i % p.head;
    if (row0 + row >= p.rows) break;
    float top = LOWEST, sum = 0.0f, share = 0.0f;
    for (int j = 0; j < ATTEND_WARPS; j++) top = fmaxf(top, told[(j * ROWS + row) * 2]);
    const int place = ((row / 4 * (p.head / LANES) + channel / LANES) * WARP + channel % LANES / 2 * 4 + row % 4) * 2 + channel % 2;
    for (int j = 0; j < ATTEND_WARPS; j++) {
      const float* of = told + (j * ROWS + row) * 2;
      const float weight = ptx::exp2_approx(of[0] - top);
      sum = fmaf(all_sums[j * ROWS * p.head + place], weight, sum);
      share = fmaf(of[1], weight, share);
    }
    if (p.splits > 1) {
      float* to = p.partial + ((int64_t(split) * p.pairs + pair) * p.rows + row0 + row) * (p.head + 2);
      to[channel] = sum;
      if (channel == 0) to[p.head] = top, to[p.head + 1] = share;
    } else {
      store_number(const_cast<void*>(p.out.data), row_index(p, p.out, pair, row0 + row) + channel, p.out.type, share == 0.0f ? 0.0f : sum / share);
    }
  }
}

__global__ void __launch_bounds__(ATTEND_THREADS, NARROW_BLOCKS) attend_four(const __grid_constant__ AttendParams p) { attend<1>(p); }
__global__ void __launch_bounds__(ATTEND_THREADS, WIDE_BLOCKS) attend_eight(const __grid_constant__ AttendParams p) { attend<2>(p); }

// grid: rows of all pairs. One block a row: the splits in order.
__global__ void __launch_bounds__(ATTEND_THREADS) attend_merge(const __grid_constant__ AttendParams p) {
  const int pair = int(blockIdx.x) / p.rows, row = int(blockIdx.x) % p.rows;
  const int64_t step = int64_t(p.pairs) * p.rows * (p.head + 2);
  const float* from = p.partial + (int64_t(pair) * p.rows + row) * (p.head + 2);
  float top = LOWEST, share = 0.0f;
  for (int i = 0; i < p.splits; i++) top = fmaxf(top, from[i * step + p.head]);
  for (int i = 0; i < p.splits; i++) share = fmaf(from[i * step + p.head + 1], ptx::exp2_approx(from[i * step + p.head] - top), share);
  for (int channel = int(threadIdx.x); channel < p.head; channel += ATTEND_THREADS) {
    float sum = 0.0f;
    for (int i = 0; i < p.splits; i++) sum = fmaf(from[i * step + channel], ptx::exp2_approx(from[i * step + p.head] - top), sum);
    store_number(const_cast<void*>(p.out.data), row_index(p, p.out, pair, row) + channel, p.out.type, share == 0.0f ? 0.0f : sum / share);
  }
}

}  // namespace

int launch_attend(const AttendParams& p, int tiles, void* stream) {
  const dim3 grid(unsigned(p.pairs) * unsigned(p.blocks) * unsigned(p.splits)), block(ATTEND_THREADS);
  if (tiles == 1) return MXQ_LAUNCH(attend_four, grid, block, attend_smem(1, p.head), stream, p);
  return MXQ_LAUNCH(attend_eight, grid, block, attend_smem(2, p.head), stream, p);
}

int launch_attend_merge(const AttendParams& p, void* stream) {
  return MXQ_LAUNCH(attend_merge, dim3(unsigned(p.pairs) * unsigned(p.rows)), dim3(ATTEND_THREADS), 0, stream, p);
}

}  // namespace mxq::cuda
