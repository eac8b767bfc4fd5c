// Attention over the packed KV cache, on the host: which chunks are seen, how they are split, what is launched.
#include "attention.h"

#include <algorithm>
#include <cstdio>

#include "launch.h"

namespace mxq::cuda {
namespace {

RowsView view_of(const Rows& r) { return {r.data, r.batch, r.head, r.token, int32_t(r.type)}; }

int64_t stage_bytes(const PageDesc& d, const Rows& sink, const Rows& tail) {
  int64_t bytes = whole_page_bytes(page_format(d));
  for (const Rows* r : {&sink, &tail})
    if (r->tokens) bytes = std::max<int64_t>(bytes, FLOAT_CHUNK * d.head * (r->type == F32 ? 4 : 2) + TOKEN_SHIFT);
  return round_up(bytes, 128);
}

Keys keys_of(const AttendCall& c) { return {int32_t(c.sink_k.tokens), int32_t(c.page_count), int32_t(c.tail_k.tokens)}; }

}  // namespace

AttendDesc attend_desc(const AttendCall& c) {
  AttendDesc d{};
  d.pairs = c.batch * c.kv_heads, d.group = c.q_heads / c.kv_heads, d.rows = d.group * c.queries, d.head = c.key.head;
  d.key_bits = int32_t(c.key.bits), d.value_bits = int32_t(c.value.bits), d.q_type = int32_t(c.q.type);
  d.device = {int32_t(c.capability), int32_t(c.sms)};
  // The newest query sees the last key. With counts it is not known where in a chunk a window begins: one more chunk is planned for.
  const Keys keys = keys_of(c);
  const int32_t first = keys.first(int32_t(c.queries), int32_t(c.window));
  d.keys = keys.total(), d.chunks = std::min(keys.chunks() - first + (c.counts != nullptr), keys.chunks());
  const int64_t pages = std::min<int64_t>(std::max(0, keys.sinks() + keys.pages - std::max(first, keys.sinks())) + (c.counts != nullptr), keys.pages);
  d.page_bytes = pages * d.pairs * (whole_page_bytes(page_format(c.key)) + whole_page_bytes(page_format(c.value)));
  d.key_stage = stage_bytes(c.key, c.sink_k, c.tail_k), d.value_stage = stage_bytes(c.value, c.sink_v, c.tail_v);
  return d;
}

AttendConfig choose(const AttendDesc& d) {
  AttendConfig c{};
  const int32_t cc = d.device.capability;
  if (cc && cc < 75) {
    c.reason = "there are kernels for compute capability 7.5 and later, this device has " + std::to_string(cc / 10) + "." + std::to_string(cc % 10);
    return c;
  }
  c.ok = 1;
  c.tiles = d.rows > TILE_QUERIES && d.head <= WIDE_HEAD ? 2 : 1;
  c.blocks = ceil_div(d.rows, TILE_QUERIES * c.tiles);
  // As many warps on an SM as registers and shared memory allow; of equals the largest blocks, which leave least to merge.
  const int bound = c.tiles == 1 ? NARROW_BLOCKS : WIDE_BLOCKS;
  int64_t resident = bound;
  c.warps = ATTEND_WARPS;
  if (cc == 0 || cc >= 80) {
    int64_t best_warps = FEW_WARPS - 1;
    for (int32_t warps = ATTEND_WARPS; warps; warps /= 2) {
      const int64_t bytes = attend_smem(c.tiles, int(d.head), warps, int(d.key_stage + d.value_stage)) + BLOCK_SHARED;
      const int64_t fit = std::min<int64_t>(bound * ATTEND_WARPS / warps, shared_of(cc) / bytes);
      if (fit * warps > best_warps) best_warps = fit * warps, resident = fit, c.warps = warps, c.staged = true;
    }
  }
  // Turns of the whole device times the chunks that a warp reads in each; the fewest splits that come within 5 % of the best, since each costs a merge.
  const int64_t slots = resident * (d.device.sms > 0 ? d.device.sms : DEFAULT_SMS), base = d.pairs * c.blocks;
  const int64_t most = std::clamp<int64_t>(ceil_div(d.chunks, c.warps), 1, MAX_SPLITS);
  const auto time = [&](int64_t splits) { return ceil_div(base * splits, slots) * ceil_div(ceil_div(d.chunks, splits), c.warps); };
  int64_t best = time(1);
  for (int64_t s = 2; s <= most; s++) best = std::min(best, time(s));
  for (c.splits = 1; 100 * time(c.splits) > 105 * best;) c.splits++;
  return c;
}

AttendConfig attend_config(const AttendCall& c) {
  const AttendDesc d = attend_desc(c);
  AttendConfig config = choose(d);
  if (c.splits && config.ok) config.splits = std::clamp<int64_t>(c.splits, 1, std::clamp<int64_t>(d.chunks, 1, MAX_SPLITS));
  return config;
}

std::string attend_name(const AttendDesc& d) {
  return "attend_k" + std::to_string(d.key_bits) + "v" + std::to_string(d.value_bits) + "_d" + std::to_string(d.head) + "__" +
         (d.device.capability && d.device.capability < 80 ? "sm75" : "sm80");
}

std::string describe(const AttendDesc& d, const AttendConfig& c, double bandwidth) {
  if (!c.ok) return c.reason;
  const std::string pairs = std::to_string(d.pairs);
  std::string s = std::to_string(d.keys) + " keys, " + std::to_string(d.rows) + " rows of queries (" + std::to_string(d.group) + " heads) on each of " + pairs +
                  " key/value heads: " + pairs + " x " + std::to_string(c.blocks) + " x " + std::to_string(c.splits) + " blocks of " +
                  std::to_string(TILE_QUERIES * c.tiles) + " rows and " + std::to_string(c.warps) + " warps, " +
                  std::to_string(ceil_div(d.chunks, c.splits)) + " chunks each; " +
                  std::to_string(d.page_bytes) + " bytes of pages";
  if (bandwidth > 0) {
    char text[64];
    std::snprintf(text, sizeof text, ", at least %.2f us at %.0f GB/s", double(d.page_bytes) / bandwidth * 1e6, bandwidth / 1e9);
    s += text;
  }
  return s;
}

int64_t attend_workspace_nbytes(const AttendCall& c) {
  const AttendDesc d = attend_desc(c);
  const AttendConfig config = attend_config(c);
  return config.ok && config.splits > 1 ? config.splits * d.pairs * d.rows * (d.head + 2) * 4 : 0;
}

int attend(const AttendCall& c) {
  const AttendDesc d = attend_desc(c);
  const AttendConfig config = attend_config(c);
  if (!config.ok) return NO_KERNEL;
  const PageFormat key = page_format(c.key), value = page_format(c.value);
  AttendParams p{};
  p.q = view_of(c.q), p.out = view_of(c.out);
  p.sink_k = view_of(c.sink_k), p.sink_v = view_of(c.sink_v), p.tail_k = view_of(c.tail_k), p.tail_v = view_of(c.tail_v);
  p.pages = c.pages, p.mask = c.mask, p.mask_batch = c.mask_batch, p.mask_query = c.mask_query;
  p.partial = config.splits > 1 ? static_cast<float*>(c.workspace) : nullptr;
  p.head = int32_t(d.head), p.key_bits = d.key_bits, p.value_bits = d.value_bits;
  p.key_groups = int32_t(page_groups(key)), p.value_group = int32_t(page_group_rows(value));
  p.key_bytes = page_bytes(key), p.key_halves = page_params(key), p.value_bytes = page_bytes(value), p.value_halves = page_params(value);
  p.keys = keys_of(c), p.counts = c.counts;
  p.splits = int32_t(config.splits), p.blocks = int32_t(config.blocks), p.warps = config.warps;
  p.key_stage = config.staged ? int32_t(d.key_stage) : 0, p.value_stage = config.staged ? int32_t(d.value_stage) : 0;
  p.kv_heads = int32_t(c.kv_heads), p.group = int32_t(d.group), p.queries = int32_t(c.queries);
  p.rows = int32_t(d.rows), p.pairs = int32_t(d.pairs);
  p.causal = int32_t(c.causal), p.window = int32_t(c.window), p.scale = float(c.scale), p.cap = float(c.cap);
  if (const int error = launch_attend(p, config.tiles, c.stream)) return error;
  return config.splits > 1 ? launch_attend_merge(p, c.capability >= 90, c.stream) : 0;
}

}  // namespace mxq::cuda
