// Attention over a packed KV cache: what the driver (attention.cpp), the kernels of each target (attention.inl) and the twins share.
// The format of a page is drawn in kv_formats.h.
#pragma once

#include "../kv_formats.h"
#include "linear.h"

namespace mxq {

// Rows of `head` floats: element (b, h, t, d) of a tensor [B, H, tokens, D] is data[b * batch + h * head + t * token + d].
struct Rows {
  const void* data;  // of type `type`; null where there are no tokens
  int type;          // Type
  int64_t tokens;
  int64_t batch, head, token;  // strides in elements
};

// Turns keys that were stored before their rotary embedding while they are read (kv_formats.h). Channels c and c + half of a head are a pair.
struct Turns {
  const float* pages;   // [page][cos, sin][half] of the position of each page's first token
  const float* tokens;  // [tile of 16 tokens][half][cos, sin][16] of the place of a token in its page
  int64_t half;         // 0: keys are stored as they are multiplied
};

// How pages of one kind are stored.
struct PageKind {
  PageFormat key, value;
  const float *key_levels, *value_levels;  // codebooks, 2^bits numbers; null: codes are numbers
};

// One call. Keys are in the order sink, pages, tail, cut into chunks of at most 64 tokens: a page is one, sink and tail are cut from their beginning.
struct Attend {
  PageKind kind;
  PageKind low;         // of pages whose tokens have fewer bits: all but the first `high` of each `round`; round 0: there are none
  int64_t high, round;
  Turns turns;
  int64_t batch, q_heads, kv_heads, queries;  // queries: tokens of q
  Rows q, out;                                // [B, Hq, queries, D]; out is written
  Rows sink_k, sink_v, tail_k, tail_v;        // [B, Hkv, tokens, D]
  const PageParts* pages;
  int64_t page_count;
  int64_t total;       // key tokens
  float scale, cap;    // cap: soft cap of the scores, 0 for none
  bool causal;         // query i sees keys up to position total - queries + i
  int64_t window;      // and those after that position - window; 0: no window
  const uint8_t* mask; // [B][queries][total], 1 may be seen; or null
  int64_t mask_batch, mask_query;  // strides; mask_query is 0 where all queries share a row
  float* lse;          // [B][Hq][queries]: logarithm of the sum of a query's exponentials; or null

  // Made by the driver from the shapes alone, so that the order of all sums is too.
  // The queries of the heads that share a kv head are the rows of one product: row r is token r / group, query head kv * group + r % group.
  int64_t group, rows;
  int64_t blocks, block_rows;    // blocks of nearly equal size, at most block_rows each
  bool panels;                   // many rows: pages are decoded once for all of them; few: again for each register block
  int64_t chunk0, chunk1, runs;  // chunks that any query sees, and the runs that they are cut into: each is summed up by itself, then they are merged
  float* partial;                // [runs][B * Hkv * rows][D + 2]: sums, largest score, sum of probabilities; used if runs > 1
};

static inline const PageKind& kind_of(const Attend& a, int64_t page) { return a.round && page % a.round >= a.high ? a.low : a.kind; }

enum Part : int { SINK, PAGED, TAIL };
struct Chunk {
  Part part;
  int64_t start;  // position of its first key
  int64_t keys;   // at most PAGE
  int64_t index;  // the page, or the first token within the sink or tail
};
static inline int64_t sink_chunks(const Attend& a) { return ceil_div(a.sink_k.tokens, PAGE); }
static inline int64_t all_chunks(const Attend& a) { return sink_chunks(a) + a.page_count + ceil_div(a.tail_k.tokens, PAGE); }
static inline Chunk chunk_of(const Attend& a, int64_t i) {
  const int64_t sinks = sink_chunks(a), tail = sinks + a.page_count;
  if (i >= sinks && i < tail) return {PAGED, a.sink_k.tokens + PAGE * (i - sinks), PAGE, i - sinks};
  const int64_t token = PAGE * (i < sinks ? i : i - tail), left = (i < sinks ? a.sink_k.tokens : a.tail_k.tokens) - token;
  return {i < sinks ? SINK : TAIL, (i < sinks ? 0 : a.sink_k.tokens + PAGE * a.page_count) + token, left < PAGE ? left : PAGE, token};
}

// Keys that a query sees, apart from the mask: from `first` to before `end`; either may lie outside of the keys.
struct Span {
  int64_t first, end;
};
static inline Span span_of(const Attend& a, int64_t query) {
  const int64_t position = a.total - a.queries + query;
  return {a.window ? position - a.window + 1 : 0, a.causal ? position + 1 : a.total};
}

static inline int64_t part_start(int64_t items, int64_t parts, int64_t i) { return i * (items / parts) + (i < items % parts ? i : items % parts); }

// Up to this many rows pages are decoded in registers, as gemv does; see GEMV_ROWS.
static constexpr int64_t FEW_ROWS = 16;
static constexpr int64_t BLOCK_ROWS = 64;
static constexpr int64_t TOGETHER = 4;   // chunks that go through softmax together
static constexpr int64_t MAX_RUNS = 64;  // a multiple of 16
// Floats between the rows of the kernels' vectors: a constant, so that all rows of a block are addressed from one pointer; the 16 keep them from falling
// into the same set of the L1 cache.
static constexpr int64_t LDX = MAX_HEAD + 16;
// Scratch of one thread: the queries, the same times scales, scores, the sums of a block, a panel, one chunk as float.
static constexpr int64_t ATTEND_SCRATCH = 4 * BLOCK_ROWS * LDX + MAX_HEAD * 2 * LANES + PAGE * MAX_HEAD;

// The kernels of one instruction set. Items of attend: (run, sequence and kv head, block), the last fastest; of merge: (sequence and kv head, block).
struct AttentionKernels {
  void (*attend)(const Attend&, int64_t item, float* scratch);
  void (*merge)(const Attend&, int64_t item);
  void (*pack)(PageFormat, const float* levels, const void* x, int type, int64_t token, uint8_t* codes, uint16_t* params);  // one head
  void (*unpack)(PageFormat, const float* levels, const uint8_t* codes, const uint16_t* params, void* out, int type);       // [64][D]
};

namespace scalar { extern const AttentionKernels attention_kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const AttentionKernels attention_kernels; }
namespace avx512 { extern const AttentionKernels attention_kernels; }
namespace avx512vnni { extern const AttentionKernels attention_kernels; }
#endif

// The nth largest of `count` words (1: the largest), whose order is lost. Compiled for any CPU: the standard library has no place in the files of the targets.
uint32_t nth_largest(uint32_t* words, int64_t count, int64_t n);

// The ops as the binding calls them; everything was checked in Python. Throw std::bad_alloc.
void attend(Attend a, int threads);  // without the fields that the driver makes
void pack_page(PageFormat f, const float* levels, const Rows& x, int64_t batch, int64_t heads, uint8_t* codes, uint16_t* params, int threads);
void unpack_page(PageFormat f, const float* levels, const uint8_t* codes, const uint16_t* params, int64_t heads, void* out, int type, int threads);

// Their twins: plain loops, double sums.
namespace ref {
void attend(const Attend& a);
void pack_page(PageFormat f, const float* levels, const Rows& x, int64_t batch, int64_t heads, uint8_t* codes, uint16_t* params);
void unpack_page(PageFormat f, const float* levels, const uint8_t* codes, const uint16_t* params, int64_t heads, void* out, int type);
}  // namespace ref

}  // namespace mxq
