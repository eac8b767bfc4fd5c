// Entry points for tests that run in another process, where only numbers and arrays can be passed: attention over pages that lie behind each other, one
// sequence.
#include "attention.h"

using namespace mxq;
using namespace mxq::cuda;

extern "C" {

// q and out [Hq, queries, D], sinks and tails [Hkv, tokens, D], pages [pages][Hkv][...], all contiguous and of one type; `table` is room for 4 addresses a
// page. With `counts`, pages and tail are the most that there may be.
int flat_attend(const void* q, void* out, const void* sink_k, const void* sink_v, const void* tail_k, const void* tail_v, const uint8_t* k_codes,
                const uint16_t* k_params, const uint8_t* v_codes, const uint16_t* v_params, PageParts* table, const uint8_t* mask, const int32_t* counts,
                void* workspace, int workspace_bytes, int type, int d, int key_bits, int key_group, int value_bits, int value_group, int q_heads,
                int kv_heads, int queries, int sink, int pages, int tail, int window, float cap, int splits) {
  AttendCall c{};
  c.key = {KEYS, key_bits, key_group, d}, c.value = {VALUES, value_bits, value_group, d};
  c.batch = 1, c.q_heads = q_heads, c.kv_heads = kv_heads, c.queries = queries;
  const auto rows = [&](const void* data, int heads, int tokens) {
    return Rows{data, type, tokens, int64_t(heads) * tokens * d, int64_t(tokens) * d, d};
  };
  c.q = rows(q, q_heads, queries), c.out = rows(out, q_heads, queries);
  c.sink_k = rows(sink_k, kv_heads, sink), c.sink_v = rows(sink_v, kv_heads, sink);
  c.tail_k = rows(tail_k, kv_heads, tail), c.tail_v = rows(tail_v, kv_heads, tail);
  const PageFormat key = page_format(c.key), value = page_format(c.value);
  for (int64_t i = 0; i < pages; i++)
    table[i] = {k_codes + i * kv_heads * page_bytes(key), k_params + i * kv_heads * page_params(key),
                v_codes + i * kv_heads * page_bytes(value), v_params + i * kv_heads * page_params(value)};
  c.pages = table, c.page_count = pages, c.counts = counts;
  c.scale = 0.125, c.cap = cap, c.causal = 1, c.window = window, c.mask = mask, c.mask_query = sink + pages * int64_t(PAGE) + tail;
  c.workspace = workspace, c.splits = splits;
  if (attend_workspace_nbytes(c) > workspace_bytes) return -2;
  return attend(c);
}

// x [heads, 64, D], contiguous.
int flat_pack(const void* x, uint8_t* codes, uint16_t* params, int type, int side, int bits, int group, int d, int heads) {
  return pack_page({side, bits, group, d}, {x, type, PAGE, int64_t(heads) * PAGE * d, int64_t(PAGE) * d, d}, 1, heads, codes, params, nullptr);
}

}  // extern "C"
