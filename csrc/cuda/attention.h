// Attention over the packed KV cache: a call as Python hands it over (8-byte fields, filled through ctypes), what is launched for it, and what the kernels get.
// Pages are those of csrc/kv_formats.h, the very bytes that the CPU kernels read; attention.cu says how they are multiplied.
#pragma once

#include <string>

#include "../kv_formats.h"
#include "dispatch.h"

namespace mxq::cuda {

// Rows of `head` numbers in device memory: (b, h, t, d) of a tensor [B, H, tokens, D] is element b * batch + h * head + t * token + d. `data` is null where
// there are no tokens. Sinks and tails are read by 16 bytes: their addresses and strides are multiples of that.
struct Rows {
  const void* data;
  int64_t type;  // Type
  int64_t tokens;
  int64_t batch, head, token;
};

struct PageDesc {
  int64_t side, bits, group, head;
};
static inline PageFormat page_format(const PageDesc& d) { return {uint8_t(d.side), uint8_t(d.bits), int32_t(d.group), int32_t(d.head)}; }

// Keys are in the order sink, pages, tail, cut into chunks: a page of 64 tokens is one, sink and tail are cut from their beginning into chunks of at most 16,
// which have as many bytes as a page of few bits.
struct AttendCall {
  PageDesc key, value;
  int64_t batch, q_heads, kv_heads, queries;
  Rows q, out;                             // [B, Hq, queries, D]; out is written
  Rows sink_k, sink_v, tail_k, tail_v;     // [B, Hkv, tokens, D]
  const PageParts* pages;                  // [page_count] in device memory
  int64_t page_count;
  const int32_t* counts;                   // device memory, or null: pages and tokens of the tail, in place of page_count and of the rows of tail_k and
                                           // tail_v, which then are the most that there may be. A captured launch so serves caches of any length
  double scale, cap;                       // cap: soft cap of the scores, 0 for none
  int64_t causal, window;                  // query i, at position keys - queries + i, sees keys up to it, and those after position - window; 0: none
  const uint8_t* mask;                     // [B][queries][keys], 1 may be seen; or null
  int64_t mask_batch, mask_query;          // strides; mask_query is 0 where all queries share a row
  void* workspace;                         // device memory of attend_workspace_nbytes()
  void* stream;
  int64_t capability, sms;
  int64_t splits;                          // 0: as the configuration has it. Tests set it to reach every branch with short caches
  double bandwidth;                        // bytes a second that a copy reaches, for the bound that is printed; 0: not known
};

constexpr int CHUNK = PAGE;                                          // most keys of a chunk
constexpr int FLOAT_CHUNK = 16;                                      // of one of the sink or the tail
constexpr int ATTEND_WARPS = 4, ATTEND_THREADS = ATTEND_WARPS * WARP;  // at most
constexpr int MERGE_THREADS = 512;
constexpr int TILE_QUERIES = 4;                                      // rows of the queries that one product of 8 columns holds, see attention.cu
constexpr int WIDE_HEAD = 256;                                       // wider heads: 4 rows to a block, whose sums fit any device's shared memory
constexpr int MAX_SPLITS = 128;
constexpr int NARROW_BLOCKS = 4, WIDE_BLOCKS = 3;                    // blocks of 4 and of 8 rows that an SM holds at once: what their registers are bounded for
constexpr int SCORE_STRIDE = CHUNK + 8;                              // floats between rows of probabilities: stores of a warp meet no bank twice
constexpr int TOKEN_SHIFT = 32;                                      // bytes, see Tokens
constexpr int FEW_WARPS = 4;                                         // with fewer on an SM, copies in shared memory cost more than they hide

// The keys of a call: how many tokens are in each part, and which chunk is where. The host plans by it, each block computes it anew.
struct Keys {
  int32_t sink, pages, tail;
  constexpr int32_t packed() const { return sink + CHUNK * pages; }  // tokens before the tail
  constexpr int32_t total() const { return packed() + tail; }
  constexpr int32_t sinks() const { return (sink + FLOAT_CHUNK - 1) / FLOAT_CHUNK; }  // chunks before the pages
  constexpr int32_t chunks() const { return sinks() + pages + (tail + FLOAT_CHUNK - 1) / FLOAT_CHUNK; }
  // The first chunk that any of the newest `queries` tokens sees: the oldest one's window begins first.
  constexpr int32_t first(int32_t queries, int32_t window) const {
    const int32_t key = window ? total() - queries - window + 1 : 0;
    if (key < sink) return key > 0 ? key / FLOAT_CHUNK : 0;
    return sinks() + (key < packed() ? (key - sink) / CHUNK : pages + (key - packed()) / FLOAT_CHUNK);
  }
};

// The rows of the queries are those of all query heads of a key/value head: row r is token r / group, query head kv * group + r % group.
struct AttendDesc {
  int64_t pairs, rows, group, head;  // pairs: sequences x key/value heads
  int32_t key_bits, value_bits, q_type;
  int64_t chunks, keys;              // chunks that any query sees, and the keys of the cache; with counts, the most of both
  int64_t page_bytes;                // of the pages among them
  int64_t key_stage, value_stage;    // bytes of the largest chunk, as a warp copies it to shared memory
  Device device;
};

struct AttendConfig {
  int32_t tiles;   // a block holds TILE_QUERIES * tiles rows
  int64_t blocks;  // of rows
  int64_t splits;  // blocks that share the chunks
  int32_t warps;   // of a block
  bool staged;     // whether warps copy chunks to shared memory ahead of their use
  int32_t ok;      // 0: `reason` says why there is no kernel
  std::string reason;
};

// Bytes of shared memory of a block: queries, then for each warp probabilities and sums, then what the warps tell each other, then the keys, then for each
// warp `stage` bytes of copies.
constexpr int KEYS_ROOM = 32;
static_assert(sizeof(Keys) <= KEYS_ROOM && SCORE_STRIDE % 2 == 0, "copies begin at multiples of 32 bytes: see MvShape in shape.h");
static constexpr int attend_smem(int tiles, int head, int warps, int stage) {
  return 4 * (TILE_QUERIES * tiles * (head + warps * (SCORE_STRIDE + head + 2))) + KEYS_ROOM + warps * stage;
}
static_assert(attend_smem(2, WIDE_HEAD, ATTEND_WARPS, 0) <= 64 * 1024 && attend_smem(1, MAX_HEAD, ATTEND_WARPS, 0) <= 64 * 1024,
              "what compute capability 7.5 has");

AttendDesc attend_desc(const AttendCall& c);
AttendConfig choose(const AttendDesc& d);
AttendConfig attend_config(const AttendCall& c);  // with what the call forces
std::string attend_name(const AttendDesc& d);
// All decisions in one line, and with a bandwidth the least time that reading the pages takes.
std::string describe(const AttendDesc& d, const AttendConfig& c, double bandwidth);
int64_t attend_workspace_nbytes(const AttendCall& c);
// Return a cudaError_t, 0 for success, or NO_KERNEL. Nothing is allocated, nothing waits.
int attend(const AttendCall& c);
// 64 tokens of each of the heads, quantized by the formulas of kv_formats.h; the bits are those of the CPU kernels.
int pack_page(const PageDesc& format, const Rows& x, int64_t batch, int64_t heads, uint8_t* codes, uint16_t* params, void* stream);

// ------------------------------------------------------------------------------------------------------------------ for the kernels

struct RowsView {
  const void* data;
  int64_t batch, head, token;
  int32_t type;
};

struct AttendParams {
  RowsView q, out, sink_k, sink_v, tail_k, tail_v;
  const PageParts* pages;
  Keys keys;              // as the host has them
  const int32_t* counts;  // null, or where its pages and tail are
  const uint8_t* mask;
  int64_t mask_batch, mask_query;
  float* partial;  // [splits][pairs * rows][head + 2]: sums, largest score, sum of probabilities; null with one split
  int32_t head, key_bits, value_bits, key_groups, value_group;  // value_group: channels
  int64_t key_bytes, key_halves, value_bytes, value_halves;     // of one head's page: codes, params
  int32_t splits, blocks, warps;
  int32_t key_stage, value_stage;  // bytes of a warp's copies; 0 without them
  int32_t kv_heads, group, queries, rows, pairs;
  int32_t causal, window;
  float scale, cap;
};
static_assert(sizeof(AttendParams) <= 4096, "kernel parameters of all devices");

int launch_attend(const AttendParams& p, int tiles, void* stream);
int launch_attend_merge(const AttendParams& p, bool dependent, void* stream);

}  // namespace mxq::cuda
