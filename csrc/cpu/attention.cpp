// The drivers of the KV cache ops: scratch, the split of attention into blocks of rows and runs of chunks, and the choice of the instruction set.
#include "attention.h"

#include <algorithm>
#include <functional>

#include "parallel.h"
#include "scratch.h"
#include "targets.h"

namespace mxq {
namespace {

thread_local Scratch scratch;

const AttentionKernels& kernels() {
#if defined(__x86_64__)
  const Target* t = &current_target();
  if (t == &target_avx512vnni) return avx512vnni::attention_kernels;
  if (t == &target_avx512) return avx512::attention_kernels;
  if (t == &target_avx2) return avx2::attention_kernels;
#endif
  return scalar::attention_kernels;
}

// Items that any sensible number of threads can share, and chunks that are worth an item of their own.
constexpr int64_t ITEMS = 64, CHUNKS = 8;

}  // namespace

uint32_t nth_largest(uint32_t* words, int64_t count, int64_t n) {
  std::nth_element(words, words + n - 1, words + count, std::greater<uint32_t>());
  return words[n - 1];
}

void attend(Attend a, int threads) {
  const AttentionKernels& k = kernels();
  const int64_t pairs = a.batch * a.kv_heads, d = a.kind.key.head;
  a.group = a.q_heads / a.kv_heads;
  a.rows = a.group * a.queries;
  a.panels = a.rows > FEW_ROWS;
  a.blocks = ceil_div(a.rows, a.panels ? BLOCK_ROWS : FEW_ROWS);

  // Chunks that some query sees: the oldest query's window begins first, the newest query sees furthest.
  const Span oldest = span_of(a, 0), newest = span_of(a, a.queries - 1);
  a.chunk0 = 0, a.chunk1 = all_chunks(a);
  const auto chunk_end = [&](int64_t i) { const Chunk c = chunk_of(a, i); return c.start + c.keys; };
  while (a.chunk0 < a.chunk1 && chunk_end(a.chunk0) <= oldest.first) a.chunk0++;
  while (a.chunk1 > a.chunk0 && chunk_of(a, a.chunk1 - 1).start >= newest.end) a.chunk1--;
  const int64_t chunks = a.chunk1 - a.chunk0;
  a.runs = std::max<int64_t>(1, std::min({ceil_div(ITEMS, pairs * a.blocks), chunks / CHUNKS, MAX_RUNS}));

  threads = useful_threads(2 * pairs * a.rows * chunks * PAGE * d, threads);
  const int64_t partial = a.runs > 1 ? round_up(a.runs * pairs * a.rows * (d + 2), 16) : 0;
  a.partial = scratch.get(partial + ATTEND_SCRATCH * threads);
  float* workers = a.partial + partial;
  parallel_for(a.runs * pairs * a.blocks, threads, [&](int64_t i, int worker) { k.attend(a, i, workers + ATTEND_SCRATCH * worker); });
  if (a.runs > 1) parallel_for(pairs * a.blocks, useful_threads(a.runs * pairs * a.rows * d, threads), [&](int64_t i, int) { k.merge(a, i); });
}

void pack_page(PageFormat f, const float* levels, const Rows& x, int64_t batch, int64_t heads, uint8_t* codes, uint16_t* params, int threads) {
  const AttentionKernels& k = kernels();
  const int64_t size = x.type == F32 ? 4 : 2;
  parallel_for(batch * heads, useful_threads(batch * heads * PAGE * f.head, threads), [&](int64_t i, int) {
    const char* head = static_cast<const char*>(x.data) + (i / heads * x.batch + i % heads * x.head) * size;
    k.pack(f, levels, head, x.type, x.token, codes + i * page_bytes(f), params + i * page_params(f));
  });
}

void unpack_page(PageFormat f, const float* levels, const uint8_t* codes, const uint16_t* params, int64_t heads, void* out, int type, int threads) {
  const AttentionKernels& k = kernels();
  const int64_t size = type == F32 ? 4 : 2;
  parallel_for(heads, useful_threads(heads * PAGE * f.head, threads), [&](int64_t i, int) {
    k.unpack(f, levels, codes + i * page_bytes(f), params + i * page_params(f), static_cast<char*>(out) + i * PAGE * f.head * size, type);
  });
}

}  // namespace mxq
