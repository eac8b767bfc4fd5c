// Attention over the packed KV cache. A block has up to four warps, works for the query rows of one key/value head, and reads a run of chunks of 64 keys (16
// of sink and tail): warp w chunks w, w + warps, ..., each warp with a softmax of its own, and no barrier before the end. There the warps are merged in order,
// and, if several blocks share the chunks, their results by a second launch (attend_merge), in a fixed order too. So equal calls give equal bits.
//
// A warp has few others beside it to hide its waiting, so it copies whole chunks to shared memory ahead of their use: values while the scores are computed,
// the next keys while the values are summed. Where that leaves too few warps on an SM (wide heads of many bits), or there are no such copies (sm_75), the
// _direct kernels read where they use.
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
template <int BITS, bool STAGED>
__device__ __forceinline__ Scales scales_of(const uint16_t* params, int group, int cols, int lane) {
  Scales out;
  out.s = params + 2 * group * cols, out.z = out.s + cols;
  uint32_t most = 0;
  for (int first = 0; first < cols; first += 2 * WARP) {  // positive numbers are ordered like their bits
    const uint32_t w = read_4<STAGED>(out.s + min(first + 2 * lane, cols - 2)), x = w & 0xffff, y = w >> 16;
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
template <bool STAGED>
__device__ __forceinline__ Vectors fold(const float* numbers, const Scales& scales, int col, float& bias, int lane) {
  const uint4 sw = read_16<STAGED>(scales.s + col), zw = read_16<STAGED>(scales.z + col);
  const uint32_t s[4] = {sw.x, sw.y, sw.z, sw.w}, z[4] = {zw.x, zw.y, zw.z, zw.w};
  float x[8], sums[2] = {};  // of even and of odd columns: half the chain
  load8(numbers + col, x);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 scale = ptx::half2_to_floats(ptx::hmul2(s[i], scales.factor)), zero = ptx::half2_to_floats(z[i]);
    const float s2[2] = {scale.x, scale.y}, z2[2] = {zero.x, zero.y};
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float& v = x[2 * i + j];
      const float middle = fmaf(s2[j], scales.centre, z2[j]);
      if (v == 0.0f) continue;
      sums[j] = fmaf(v, middle, sums[j]);
      v *= s2[j];
    }
  }
  bias += sums[0] + sums[1];
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

template <int BITS, bool STAGED, int NT>
__device__ __forceinline__ void page_scores(const Warp<NT>& w, const uint8_t* codes, const uint16_t* params, int groups, Scores (&score)[NT]) {
  const int stripes = (w.head + STRIPE - 1) / STRIPE, columns = BITS == 16 ? w.head : stripes * STRIPE;
  const int tile_bytes = columns * LANES * BITS / 8;
  Scales scales[2];
  if constexpr (BITS != 16) {
    scales[0] = scales_of<BITS, STAGED>(params, 0, w.head, w.lane);
    scales[1] = groups == 2 ? scales_of<BITS, STAGED>(params, 1, w.head, w.lane) : scales[0];
  }
  float c[4][NT][4] = {}, bias[2][NT] = {};
#pragma unroll 1
  for (int stripe = 0; stripe < stripes; stripe++) {
    const int col = stripe * STRIPE + 8 * (w.lane % 4);
    const bool inside = col < w.head;
    Codes<BITS> tiles[4];
#pragma unroll
    for (int i = 0; i < 4; i++) tiles[i].template load<STAGED>(codes, i * tile_bytes + stripe * 64 * BITS, w.lane, inside);
    Vectors v[NT];
#pragma unroll
    for (int half = 0; half < 2; half++) {  // 32 tokens each, with scales of their own if there are two groups
      if (half == 0 || (BITS != 16 && groups == 2)) {
#pragma unroll
        for (int m = 0; m < NT; m++) {
          const float* row = w.q + (w.lane / 8 + 4 * m) * w.head;
          if (!inside) v[m] = nothing();
          else if constexpr (BITS == 16) v[m] = plain(row, col, w.lane);
          else v[m] = fold<STAGED>(row, scales[half], col, bias[half][m], w.lane);
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

// Tiles from `tile` to before `last`, of which there are at most N.
template <int NT, int N>
__device__ __forceinline__ void add_to_sums(const Warp<NT>& w, int tile, int last, const float (&c)[N][NT][4], float undo, const float (&zeros)[NT]) {
  const int tiles = w.head / LANES;
  float2 sums[N][NT];
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int m = 0; m < NT; m++) sums[j][m] = w.sums[(m * tiles + min(tile + j, last - 1)) * WARP + w.lane];
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int m = 0; m < NT; m++) {
      float2& s = sums[j][m];
      s.x = fmaf(s.x, w.keep[m], fmaf(c[j][m][0] + c[j][m][1], undo, zeros[m]));
      s.y = fmaf(s.y, w.keep[m], fmaf(c[j][m][2] + c[j][m][3], undo, zeros[m]));
      if (tile + j < last) w.sums[(m * tiles + tile + j) * WARP + w.lane] = s;
    }
}

template <int BITS, bool STAGED, int NT>
__device__ __forceinline__ void page_sums(const Warp<NT>& w, const uint8_t* codes, const uint16_t* params, int group) {
  constexpr int TILE_BYTES = CHUNK * LANES * BITS / 8, AT_ONCE = NT == 1 && (BITS == 2 || BITS == 4) ? 4 : 2;  // tiles whose products are under way together
  const int tiles = w.head / LANES, step = BITS == 16 ? tiles : group / LANES;
#pragma unroll 1
  for (int first = 0, i = 0; first < tiles; first += step, i++) {
    Scales scales;
    if constexpr (BITS != 16) scales = scales_of<BITS, STAGED>(params, i, CHUNK, w.lane);
    Vectors v[2][NT];
    float zeros[NT] = {};
#pragma unroll
    for (int m = 0; m < NT; m++) {
      const float* row = w.p + (w.lane / 8 + 4 * m) * SCORE_STRIDE;
#pragma unroll
      for (int stripe = 0; stripe < 2; stripe++) {
        const int col = stripe * STRIPE + 8 * (w.lane % 4);
        if constexpr (BITS == 16) v[stripe][m] = plain(row, col, w.lane);
        else v[stripe][m] = fold<STAGED>(row, scales, col, zeros[m], w.lane);
      }
      if constexpr (BITS != 16) zeros[m] = __shfl_sync(ALL, sum_over_t(zeros[m]), 8 * (w.lane % 4));
    }
    const int last = min(first + step, tiles);
#pragma unroll 1
    for (int tile = first; tile < last; tile += AT_ONCE) {
      Codes<BITS> words[AT_ONCE][2];
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
        for (int stripe = 0; stripe < 2; stripe++)  // the last tile once more rather than a branch
          words[j][stripe].template load<STAGED>(codes, min(tile + j, last - 1) * TILE_BYTES + stripe * 64 * BITS, w.lane, true);
      float c[AT_ONCE][NT][4] = {};
#pragma unroll
      for (int stripe = 0; stripe < 2; stripe++) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
          Tile a;
          words[j][stripe].decode(a, w.lane);
#pragma unroll
          for (int m = 0; m < NT; m++) multiply(c[j][m], a, v[stripe][m]);
        }
      }
      add_to_sums(w, tile, last, c, BITS == 16 ? 1.0f : scales.undo, zeros);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------ sink and tail

template <int TYPE, bool STAGED, int NT>
__device__ __forceinline__ void token_scores(const Warp<NT>& w, Tokens<TYPE, STAGED> k, Scores (&score)[NT]) {
  constexpr int PARTS = Tokens<TYPE, STAGED>::PARTS;
  k.scale(w.head, w.lane);
  float c[NT][4] = {};
#pragma unroll 2
  for (int first = 0; first < w.head; first += STRIPE) {
    const int col = first + 8 * (w.lane % 4);
    const bool inside = col < w.head;
    Tile tiles[PARTS];
    k.keys(col, inside, w.lane, tiles);
#pragma unroll
    for (int m = 0; m < NT; m++) {
      const Vectors v = inside ? plain(w.q + (w.lane / 8 + 4 * m) * w.head, col, w.lane) : nothing();
#pragma unroll
      for (int part = 0; part < PARTS; part++) multiply(c[m], tiles[part], v);
    }
  }
#pragma unroll
  for (int m = 0; m < NT; m++)
#pragma unroll
    for (int i = 0; i < 4; i++)  // of keys that are not there: any number
#pragma unroll
      for (int r = 0; r < 2; r++) score[m][i][r] = (c[m][2 * r] + c[m][2 * r + 1]) * k.undo;
}

template <int TYPE, bool STAGED, int NT>
__device__ __forceinline__ void token_sums(const Warp<NT>& w, Tokens<TYPE, STAGED> values) {
  constexpr int PARTS = Tokens<TYPE, STAGED>::PARTS, AT_ONCE = 2;
  values.scale(w.head, w.lane);
  Vectors v[NT];
  const float zeros[NT] = {};
#pragma unroll
  for (int m = 0; m < NT; m++) v[m] = plain(w.p + (w.lane / 8 + 4 * m) * SCORE_STRIDE, 8 * (w.lane % 4), w.lane);
  const int last = w.head / LANES;
#pragma unroll 1
  for (int tile = 0; tile < last; tile += AT_ONCE) {
    float c[AT_ONCE][NT][4] = {};
    Tile tiles[AT_ONCE][PARTS];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) values.values(min(tile + j, last - 1), w.lane, tiles[j]);
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int m = 0; m < NT; m++) multiply(c[j][m], tiles[j][part], v[m]);
    add_to_sums(w, tile, last, c, values.undo, zeros);
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
__device__ __forceinline__ void finish_scores(const AttendParams& p, int total, int row, int64_t batch, int start, int keys, float factor, int lane,
                                              Scores& score) {
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

// ------------------------------------------------------------------------------------------------------------------ chunks

enum Part { SINK, PAGES, TAIL };
struct Chunk {
  Part part;
  int token, start, keys;  // the first key's place within its part and among all keys, and how many there are
};
__device__ __forceinline__ Chunk chunk_at(const Keys& all, int chunk) {
  const int sinks = all.sinks(), tail = sinks + all.pages;
  if (chunk < sinks) return {SINK, FLOAT_CHUNK * chunk, FLOAT_CHUNK * chunk, min(all.sink - FLOAT_CHUNK * chunk, FLOAT_CHUNK)};
  const int page = CHUNK * (chunk - sinks), token = FLOAT_CHUNK * (chunk - tail);
  if (chunk < tail) return {PAGES, page, all.sink + page, CHUNK};
  return {TAIL, token, all.packed() + token, min(all.tail - token, FLOAT_CHUNK)};
}

// Field by field: a reference to either would be read through memory.
__device__ __forceinline__ RowsView either(bool first, const RowsView& a, const RowsView& b) {
  return {first ? a.data : b.data, first ? a.batch : b.batch, first ? a.head : b.head, first ? a.token : b.token, first ? a.type : b.type};
}

__device__ __forceinline__ int64_t first_byte(const AttendParams& p, const RowsView& r, int pair, int token) {
  return (pair / p.kv_heads * r.batch + pair % p.kv_heads * r.head + token * r.token) * (r.type == F32 ? 4 : 2);
}

// Either where they lie, or the warp's copy of them.
template <int TYPE, bool STAGED>
__device__ __forceinline__ Tokens<TYPE, STAGED> tokens_of(const AttendParams& p, const RowsView& r, int pair, const Chunk& chunk, const uint8_t* copy) {
  constexpr int SIZE = Tokens<TYPE, STAGED>::SIZE;
  if constexpr (STAGED) return {copy, p.head * SIZE, chunk.keys, 1.0f, 1.0f};
  else return {static_cast<const uint8_t*>(r.data) + first_byte(p, r, pair, chunk.token), r.token * SIZE, chunk.keys, 1.0f, 1.0f};
}

// The warp's copy of one side of a page, codes and params behind each other, and of a chunk of tokens, in the background.
__device__ __forceinline__ void copy_page(uint8_t* to, const uint8_t* codes, int64_t bytes, const uint16_t* params, int64_t halves, int bits, int lane) {
#pragma unroll 4
  for (int at = 16 * lane; at < int(bytes); at += 16 * WARP) ptx::cp_async_16(to + (at ^ staged_turn(bits, at)), codes + at);
  const uint8_t* from = reinterpret_cast<const uint8_t*>(params);
  for (int at = 16 * lane; at < int(2 * halves); at += 16 * WARP) ptx::cp_async_16(to + bytes + at, from + at);
}
__device__ __forceinline__ void copy_tokens(uint8_t* to, const AttendParams& p, const RowsView& r, int pair, const Chunk& chunk, int lane) {
  const int size = r.type == F32 ? 4 : 2, row = p.head * size / 16;  // copies of a token
  const uint8_t* from = static_cast<const uint8_t*>(r.data) + first_byte(p, r, pair, chunk.token);
#pragma unroll 4
  for (int i = lane; i < chunk.keys * row; i += WARP) {
    const int token = i / row;
    ptx::cp_async_16(to + 16 * i + token / 8 * TOKEN_SHIFT, from + token * r.token * size + 16 * (i - token * row));
  }
}

// ------------------------------------------------------------------------------------------------------------------ the kernels

// Numbers first + lane, first + lane + WARP, ... of a row of queries, as they are stored.
constexpr int AT_ONCE = 4;
__device__ __forceinline__ void load_numbers(uint32_t (&bits)[AT_ONCE], const RowsView& q, int64_t from, bool there, int first, int head, int lane) {
#pragma unroll
  for (int j = 0; j < AT_ONCE; j++) {
    const int c = first + j * WARP + lane;
    bits[j] = 0;
    if (!there || c >= head) continue;
    bits[j] = q.type == F32 ? __ldg(static_cast<const uint32_t*>(q.data) + from + c) : __ldg(static_cast<const uint16_t*>(q.data) + from + c);
  }
}

// A row of the queries in float32, times the power of two that brings its largest finite number near 2^14, whose inverse goes to `undo`. `bits`: its first
// numbers.
__device__ __forceinline__ void load_row(float* to, float* undo, const RowsView& q, uint32_t (&bits)[AT_ONCE], int64_t from, bool there, int head, int lane) {
  uint32_t most = 0;
  for (int first = 0; first < head; first += AT_ONCE * WARP) {
    if (first) load_numbers(bits, q, from, there, first, head, lane);
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int c = first + j * WARP + lane;
      const float x = q.type == F32 ? __uint_as_float(bits[j]) : q.type == BF16 ? ptx::bf16_to_float(uint16_t(bits[j])) : ptx::half_to_float(uint16_t(bits[j]));
      const uint32_t size = __float_as_uint(x) & 0x7fffffffu;
      if (size < 0x7f800000u) most = max(most, size);
      if (c < head) to[c] = x;
    }
  }
#pragma unroll
  for (int m = WARP / 2; m; m /= 2) most = max(most, __shfl_xor_sync(ALL, most, m));
  const int exponent = raise_to_2_14(most);
  for (int c = lane; c < head; c += WARP) to[c] *= power_of_2(exponent);  // the lane's own
  if (lane == 0) *undo = power_of_2(-exponent);
}

// grid: (pairs, blocks of rows, splits), the last fastest.
template <int NT, bool STAGED>
__device__ __forceinline__ void attend(const AttendParams& p) {
  constexpr int ROWS = TILE_QUERIES * NT;
  MXQ_DYN_SMEM(float, memory);
  ptx::grid_dependency_launch();
  const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP, t = lane % 4;
  const int split = int(blockIdx.x % unsigned(p.splits)), rest = int(blockIdx.x / unsigned(p.splits)), pair = rest / p.blocks, row0 = rest % p.blocks * ROWS;
  float* const queries = memory;                                              // [ROWS][head]
  float* const scores = queries + ROWS * p.head;                              // [warps][ROWS][SCORE_STRIDE]
  float* const all_sums = scores + p.warps * ROWS * SCORE_STRIDE;             // [warps][ROWS * head]
  float* const told = all_sums + p.warps * ROWS * p.head;                     // [warps][ROWS][2]: largest score, sum of probabilities
  Keys* const shared_keys = reinterpret_cast<Keys*>(told + p.warps * ROWS * 2);  // registers are short: read anew for each chunk
  uint8_t* const key_copy = reinterpret_cast<uint8_t*>(shared_keys) + KEYS_ROOM + warp * (p.key_stage + p.value_stage);
  uint8_t* const value_copy = key_copy + p.key_stage;

  // Chunks of this warp that any row of the block sees, one after the other.
  int begin, end;
  Span oldest, newest;
  {
    const Keys all = p.counts ? Keys{p.keys.sink, __ldg(p.counts), __ldg(p.counts + 1)} : p.keys;
    if (threadIdx.x == 0) *shared_keys = all;
    const int chunk0 = all.first(p.queries, p.window), chunks = all.chunks() - chunk0, each = chunks / p.splits, larger = chunks % p.splits;
    begin = chunk0 + split * each + min(split, larger) + warp, end = begin - warp + each + (split < larger);
    oldest = span_of(p, all.total(), row0 / p.group), newest = span_of(p, all.total(), (min(row0 + ROWS, p.rows) - 1) / p.group);
  }
  const auto seen_from = [&](const Keys& all, int chunk) {
    for (; chunk < end; chunk += p.warps) {
      const Chunk c = chunk_at(all, chunk);
      if (c.start < newest.end && c.start + c.keys > oldest.first) break;
    }
    return chunk;
  };
  // The addresses of a chunk's keys, where it is a page. Those of its values are in the same line.
  const auto page_at = [&](const Keys& all, int chunk) {
    const int page = chunk - all.sinks();
    PageParts parts = {};
    if (chunk < end && page >= 0 && page < all.pages) parts.k_codes = p.pages[page].k_codes, parts.k_params = p.pages[page].k_params;
    return parts;
  };
  const auto copy_keys = [&](const Keys& all, int chunk, const PageParts& page) {
    if (chunk < end) {
      const Chunk c = chunk_at(all, chunk);
      if (c.part == PAGES) {
        copy_page(key_copy, page.k_codes + pair * p.key_bytes, p.key_bytes, page.k_params + pair * p.key_halves, p.key_halves, p.key_bits, lane);
      } else {
        copy_tokens(key_copy, p, either(c.part == SINK, p.sink_k, p.tail_k), pair, c, lane);
      }
    }
    ptx::cp_async_commit();
  };
  const auto copy_values = [&](const Keys& all, int chunk) {
    if (chunk < end) {
      const Chunk c = chunk_at(all, chunk);
      if (c.part == PAGES) {
        const PageParts& page = p.pages[c.token / CHUNK];
        copy_page(value_copy, page.v_codes + pair * p.value_bytes, p.value_bytes, page.v_params + pair * p.value_halves, p.value_halves, p.value_bits, lane);
      } else {
        copy_tokens(value_copy, p, either(c.part == SINK, p.sink_v, p.tail_v), pair, c, lane);
      }
    }
    ptx::cp_async_commit();
  };
  // Queries are asked for before the pages' addresses are waited for.
  uint32_t numbers[AT_ONCE];
  const auto row_at = [&](int row) { return row0 + row < p.rows ? row_index(p, p.q, pair, row0 + row) : 0; };
  load_numbers(numbers, p.q, row_at(warp), row0 + warp < p.rows, 0, p.head, lane);
  int chunk;
  {
    const Keys all = p.counts ? Keys{p.keys.sink, __ldg(p.counts), __ldg(p.counts + 1)} : p.keys;
    chunk = seen_from(all, begin);
    if constexpr (STAGED) copy_keys(all, chunk, page_at(all, chunk)), copy_values(all, chunk);
  }

  for (int row = warp; row < ROWS; row += p.warps) {  // told has the inverse of a row's power of two meanwhile
    const bool there = row0 + row < p.rows;
    if (row != warp) load_numbers(numbers, p.q, row_at(row), there, 0, p.head, lane);
    load_row(queries + row * p.head, told + row, p.q, numbers, row_at(row), there, p.head, lane);
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

#pragma unroll 1
  while (chunk < end) {
    const Keys all = *shared_keys;
    const Chunk c = chunk_at(all, chunk);
    const int next = seen_from(all, chunk + p.warps);
    PageParts page = {}, next_page = {};
    if constexpr (STAGED) next_page = page_at(all, next);
    if (!STAGED && c.part == PAGES) {
      page = p.pages[c.token / CHUNK];
      page.k_codes += pair * p.key_bytes, page.k_params += pair * p.key_halves, page.v_codes += pair * p.value_bytes, page.v_params += pair * p.value_halves;
    }
    const uint8_t *const k_codes = STAGED ? key_copy : page.k_codes, *const v_codes = STAGED ? value_copy : page.v_codes;
    const uint16_t* const k_params = STAGED ? reinterpret_cast<const uint16_t*>(key_copy + p.key_bytes) : page.k_params;
    const uint16_t* const v_params = STAGED ? reinterpret_cast<const uint16_t*>(value_copy + p.value_bytes) : page.v_params;
    const RowsView k = either(c.part == SINK, p.sink_k, p.tail_k), v = either(c.part == SINK, p.sink_v, p.tail_v);
    if constexpr (STAGED) {
      ptx::cp_async_wait<1>();  // the values may still be on their way
      __syncwarp();
    }
    Scores score[NT];
    if (c.part == PAGES) {
      switch (p.key_bits) {
        case 2: page_scores<2, STAGED>(w, k_codes, k_params, p.key_groups, score); break;
        case 3: page_scores<3, STAGED>(w, k_codes, k_params, p.key_groups, score); break;
        case 4: page_scores<4, STAGED>(w, k_codes, k_params, p.key_groups, score); break;
        case 8: page_scores<8, STAGED>(w, k_codes, k_params, p.key_groups, score); break;
        default: page_scores<16, STAGED>(w, k_codes, k_params, p.key_groups, score);
      }
    } else if (k.type == F32) {
      token_scores(w, tokens_of<F32, STAGED>(p, k, pair, c, key_copy), score);
    } else if (k.type == BF16) {
      token_scores(w, tokens_of<BF16, STAGED>(p, k, pair, c, key_copy), score);
    } else {
      token_scores(w, tokens_of<F16, STAGED>(p, k, pair, c, key_copy), score);
    }
    if constexpr (STAGED) {
      __syncwarp();  // the keys are read
      copy_keys(all, next, next_page);
    }

#pragma unroll
    for (int m = 0; m < NT; m++) {
      finish_scores(p, all.total(), row0 + t + 4 * m, pair / p.kv_heads, c.start, c.keys, factor[m], lane, score[m]);
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
    if constexpr (STAGED) ptx::cp_async_wait<1>();  // the next keys may still be on their way
    __syncwarp();
    if (c.part == PAGES) {
      switch (p.value_bits) {
        case 2: page_sums<2, STAGED>(w, v_codes, v_params, p.value_group); break;
        case 3: page_sums<3, STAGED>(w, v_codes, v_params, p.value_group); break;
        case 4: page_sums<4, STAGED>(w, v_codes, v_params, p.value_group); break;
        case 8: page_sums<8, STAGED>(w, v_codes, v_params, p.value_group); break;
        default: page_sums<16, STAGED>(w, v_codes, v_params, p.value_group);
      }
    } else if (v.type == F32) {
      token_sums(w, tokens_of<F32, STAGED>(p, v, pair, c, value_copy));
    } else if (v.type == BF16) {
      token_sums(w, tokens_of<BF16, STAGED>(p, v, pair, c, value_copy));
    } else {
      token_sums(w, tokens_of<F16, STAGED>(p, v, pair, c, value_copy));
    }
    __syncwarp();  // values and probabilities are read
    if constexpr (STAGED) copy_values(all, next);
    chunk = next;
  }

#pragma unroll
  for (int m = 0; m < NT; m++)
    if (lane / 4 == 0) {
      float* mine = told + (warp * ROWS + t + 4 * m) * 2;
      mine[0] = most[m], mine[1] = total[m];
    }
  __syncthreads();
  for (int i = int(threadIdx.x); i < ROWS * p.head; i += p.warps * WARP) {
    const int row = i / p.head, channel = i % p.head;
    if (row0 + row >= p.rows) break;
    float top = LOWEST, sum = 0.0f, share = 0.0f;
    for (int j = 0; j < p.warps; j++) top = fmaxf(top, told[(j * ROWS + row) * 2]);
    const int place = ((row / 4 * (p.head / LANES) + channel / LANES) * WARP + channel % LANES / 2 * 4 + row % 4) * 2 + channel % 2;
    for (int j = 0; j < p.warps; j++) {
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

__global__ void __launch_bounds__(ATTEND_THREADS, NARROW_BLOCKS) attend_four(const __grid_constant__ AttendParams p) { attend<1, true>(p); }
__global__ void __launch_bounds__(ATTEND_THREADS, WIDE_BLOCKS) attend_eight(const __grid_constant__ AttendParams p) { attend<2, true>(p); }
__global__ void __launch_bounds__(ATTEND_THREADS, NARROW_BLOCKS) attend_four_direct(const __grid_constant__ AttendParams p) { attend<1, false>(p); }
__global__ void __launch_bounds__(ATTEND_THREADS, WIDE_BLOCKS) attend_eight_direct(const __grid_constant__ AttendParams p) { attend<2, false>(p); }

// grid: rows of all pairs. A block has a row: thread (i, channel) adds up splits i, i + parts, ...; then the parts are added in order.
__global__ void __launch_bounds__(MERGE_THREADS) attend_merge(const __grid_constant__ AttendParams p) {
  constexpr int EACH = MAX_SPLITS / WARP, AHEAD = 20;
  MXQ_SHARED(float, weights, MAX_SPLITS);
  MXQ_SHARED(float, sums, MERGE_THREADS);
  MXQ_SHARED(float, shared_share, 1);
  const int pair = int(blockIdx.x) / p.rows, row = int(blockIdx.x) % p.rows, lane = int(threadIdx.x) % WARP;
  const int parts = MERGE_THREADS / p.head, part = int(threadIdx.x) / p.head, channel = int(threadIdx.x) % p.head;
  const int64_t step = int64_t(p.pairs) * p.rows * (p.head + 2);
  const float* from = p.partial + (int64_t(pair) * p.rows + row) * (p.head + 2);
  const int count = part < parts ? (p.splits - part + parts - 1) / parts : 0;
  const float* mine = from + part * step + channel;
  ptx::grid_dependency_wait();
  float ahead[AHEAD];  // before the weights are known: one wait rather than two
#pragma unroll
  for (int i = 0; i < AHEAD; i++, mine += parts * step) ahead[i] = i < count ? *mine : 0.0f;
  if (int(threadIdx.x) < WARP) {
    float tops[EACH], shares[EACH], top = LOWEST, share = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const bool there = lane + i * WARP < p.splits;
      tops[i] = there ? from[(lane + i * WARP) * step + p.head] : LOWEST, shares[i] = there ? from[(lane + i * WARP) * step + p.head + 1] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) top = fmaxf(top, tops[i]);
#pragma unroll
    for (int m = WARP / 2; m; m /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, m));
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const float weight = ptx::exp2_approx(tops[i] - top);
      weights[lane + i * WARP] = weight;
      share = fmaf(shares[i], weight, share);
    }
#pragma unroll
    for (int m = WARP / 2; m; m /= 2) share += __shfl_xor_sync(ALL, share, m);
    if (lane == 0) shared_share[0] = share;
  }
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (i < count) sum = fmaf(ahead[i], weights[part + i * parts], sum);
#pragma unroll 4
  for (int i = AHEAD; i < count; i++, mine += parts * step) sum = fmaf(*mine, weights[part + i * parts], sum);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (part) return;
  for (int i = 1; i < parts; i++) sum += sums[i * p.head + channel];
  const float share = shared_share[0];
  store_number(const_cast<void*>(p.out.data), row_index(p, p.out, pair, row) + channel, p.out.type, share == 0.0f ? 0.0f : sum / share);
}
static_assert(MERGE_THREADS >= MAX_HEAD && MAX_SPLITS % WARP == 0, "a thread has at most one channel, a lane whole splits");

}  // namespace

int launch_attend(const AttendParams& p, int tiles, void* stream) {
  const dim3 grid(unsigned(p.pairs) * unsigned(p.blocks) * unsigned(p.splits)), block(unsigned(p.warps) * WARP);
  const int bytes = attend_smem(tiles, p.head, p.warps, p.key_stage + p.value_stage);
  if (p.key_stage) return tiles == 1 ? MXQ_LAUNCH(attend_four, grid, block, bytes, stream, p) : MXQ_LAUNCH(attend_eight, grid, block, bytes, stream, p);
  return tiles == 1 ? MXQ_LAUNCH(attend_four_direct, grid, block, bytes, stream, p) : MXQ_LAUNCH(attend_eight_direct, grid, block, bytes, stream, p);
}

int launch_attend_merge(const AttendParams& p, bool dependent, void* stream) {
  const dim3 grid(unsigned(p.pairs) * unsigned(p.rows)), block(MERGE_THREADS);
  return MXQ_LAUNCH_EARLY(dependent, attend_merge, grid, block, 0, stream, p);
}

}  // namespace mxq::cuda
