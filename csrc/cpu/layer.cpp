// The driver of whole decoder layers: the order of the steps, their memory, and the split over the threads. Products are linear_group.h's and
// attention.h's; what lies between them is layer.inl's.
#include "layer.h"

#include <cstring>

#include "linear_group.h"
#include "parallel.h"
#include "scratch.h"
#include "targets.h"

namespace mxq {
namespace {

thread_local Scratch scratch;

const LayerKernels& kernels() {
#if defined(__x86_64__)
  const Target* t = &current_target();
  if (t == &target_avx512vnni) return avx512vnni::layer_kernels;
  if (t == &target_avx512) return avx512::layer_kernels;
  if (t == &target_avx2) return avx2::layer_kernels;
#endif
  return scalar::layer_kernels;
}

// Numbers that a thread goes through while another one is woken; see useful_threads().
constexpr int64_t NUMBERS_PER_THREAD = 32768;

// Calls f(row) for each row, on as many threads as the numbers of them all are worth.
template <class F>
void each_row(int64_t rows, int64_t numbers, int threads, F&& f) {
  const int64_t useful = rows * numbers / NUMBERS_PER_THREAD;
  const int64_t chunks = useful < 2 ? 1 : useful < threads ? useful : threads;
  if (chunks < 2) {
    for (int64_t r = 0; r < rows; r++) f(r);
  } else {
    parallel_for(chunks, int(chunks), [&](int64_t i, int) {
      for (int64_t r = part_start(rows, chunks, i); r < part_start(rows, chunks, i + 1); r++) f(r);
    });
  }
}

// Activations of one call, each [rows][width] of the model's type.
struct Room {
  char *normed, *q, *k, *v, *mixed, *delta, *gate, *up;

  Room(const LayerStack& s, int64_t rows, int64_t size) {
    const int64_t q_width = s.q_heads * s.dim, kv_width = s.kv_heads * s.dim;
    const int64_t widths[] = {s.hidden, q_width, kv_width, kv_width, q_width, s.hidden, s.inner, s.inner};
    char** const parts[] = {&normed, &q, &k, &v, &mixed, &delta, &gate, &up};
    int64_t total = 0;
    for (const int64_t width : widths) total += round_up(rows * width * size, 64);
    char* at = reinterpret_cast<char*>(scratch.get(total / 4));
    for (int i = 0; i < 8; i++) *parts[i] = at, at += round_up(rows * widths[i] * size, 64);
  }
};

char* address(int64_t a) { return reinterpret_cast<char*>(a); }
const float* numbers(int64_t a) { return reinterpret_cast<const float*>(a); }

struct Step {
  const LayerStack& stack;
  const LayerCall& call;
  const LayerKernels& kernel;
  int threads;
  int64_t rows, size;
  Room room;

  Step(const LayerStack& s, const LayerCall& c, int n)
      : stack(s), call(c), kernel(kernels()), threads(n), rows(c.batch * c.tokens), size(s.type == F32 ? 4 : 2), room(s, c.batch * c.tokens, size) {}

  char* x(int64_t row) const { return static_cast<char*>(call.x) + row * stack.hidden * size; }

  void normalize(const void* weight, void* out) const {
    each_row(rows, stack.hidden, threads, [&](int64_t r) {
      kernel.norm(x(r), weight, static_cast<char*>(out) + r * stack.hidden * size, stack.hidden, stack.eps, stack.type);
    });
  }

  void multiply(const LayerLinear& w, const void* in, int64_t width, void* out) const {
    const GroupItem item{w.blob, w.bias, w.bias_type, w.a8, out};
    linear_group(&item, 1, in, width, stack.type, rows, threads);
  }

  // x += w(in)
  void project(const LayerLinear& w, const void* in, int64_t width) const {
    multiply(w, in, width, room.delta);
    each_row(rows, stack.hidden, threads, [&](int64_t r) { kernel.add(x(r), room.delta + r * stack.hidden * size, stack.hidden, stack.type); });
  }

  // Queries are rotated in their place, keys and values go into the cache.
  void store(const LayerWeights& w, const LayerCache& c) const {
    const int64_t dim = stack.dim, head_bytes = dim * size;
    char* const to_k = address(c.into_sink ? c.sink_k : c.tail_k);
    char* const to_v = address(c.into_sink ? c.sink_v : c.tail_v);
    const int64_t by_batch = c.into_sink ? c.sink_batch : c.tail_batch, by_head = c.into_sink ? c.sink_head : c.tail_head;
    const int64_t by_token = c.into_sink ? c.sink_token : c.tail_token, filled = c.into_sink ? c.sink_tokens : c.tail_tokens;
    each_row(rows, (stack.q_heads + 2 * stack.kv_heads) * dim, threads, [&](int64_t r) {
      const int64_t b = r / call.tokens, t = r % call.tokens;
      const int64_t turn = call.position[b * call.position_batch + t] * head_bytes;
      const char *cos = static_cast<const char*>(call.cos) + turn, *sin = static_cast<const char*>(call.sin) + turn;
      const auto turned = [&](char* head, const void* weight, char* out) {
        if (weight) kernel.norm(head, weight, head, dim, stack.eps, stack.type);
        kernel.rotate(head, cos, sin, out, dim, stack.type);
      };
      for (int64_t h = 0; h < stack.q_heads; h++) {
        char* const head = room.q + (r * stack.q_heads + h) * head_bytes;
        turned(head, w.q_norm, head);
      }
      for (int64_t h = 0; h < stack.kv_heads; h++) {
        const int64_t from = (r * stack.kv_heads + h) * head_bytes, to = (b * by_batch + h * by_head + (filled + t) * by_token) * size;
        turned(room.k + from, w.k_norm, to_k + to);
        memcpy(to_v + to, room.v + from, size_t(head_bytes));
      }
    });
  }

  void attend_to(const LayerWeights& w, const LayerCache& c) const {
    const int64_t dim = stack.dim, width = stack.q_heads * dim;
    Attend a{};
    a.kind = {{KEYS, uint8_t(c.key_bits), int32_t(c.key_group), int32_t(dim), int32_t(c.key_outliers)},
              {VALUES, uint8_t(c.value_bits), int32_t(c.value_group), int32_t(dim), int32_t(c.value_outliers)}, numbers(c.key_levels), numbers(c.value_levels)};
    a.turns = {numbers(c.page_turns), numbers(c.token_turns), c.turn_half};
    a.batch = call.batch, a.q_heads = stack.q_heads, a.kv_heads = stack.kv_heads, a.queries = call.tokens;
    a.q = {room.q, stack.type, call.tokens, call.tokens * width, dim, width};
    a.out = {room.mixed, stack.type, call.tokens, call.tokens * width, dim, width};
    a.pages = reinterpret_cast<const PageParts*>(address(c.pages)), a.page_count = c.page_count;
    a.sink_k = {address(c.sink_k), stack.type, c.sink_tokens, c.sink_batch, c.sink_head, c.sink_token};
    a.tail_k = {address(c.tail_k), stack.type, c.tail_tokens, c.tail_batch, c.tail_head, c.tail_token};
    a.sink_v = a.sink_k, a.sink_v.data = address(c.sink_v);
    a.tail_v = a.tail_k, a.tail_v.data = address(c.tail_v);
    a.total = c.sink_tokens + PAGE * c.page_count + c.tail_tokens;
    a.scale = w.scale, a.causal = true, a.window = w.window;
    if (call.mask) a.mask = call.mask + c.dropped, a.mask_batch = call.mask_batch;
    attend(a, threads);
  }

  void run(const LayerWeights& w, LayerCache& c) const {
    normalize(w.attention_norm, room.normed);
    const GroupItem qkv[] = {{w.q.blob, w.q.bias, w.q.bias_type, w.q.a8, room.q},
                             {w.k.blob, w.k.bias, w.k.bias_type, w.k.a8, room.k},
                             {w.v.blob, w.v.bias, w.v.bias_type, w.v.a8, room.v}};
    linear_group(qkv, 3, room.normed, stack.hidden, stack.type, rows, threads);
    store(w, c);
    (c.into_sink ? c.sink_tokens : c.tail_tokens) += call.tokens;
    attend_to(w, c);
    project(w.o, room.mixed, stack.q_heads * stack.dim);

    normalize(w.mlp_norm, room.normed);
    const GroupItem both[] = {{w.gate.blob, w.gate.bias, w.gate.bias_type, w.gate.a8, room.gate}, {w.up.blob, w.up.bias, w.up.bias_type, w.up.a8, room.up}};
    linear_group(both, 2, room.normed, stack.hidden, stack.type, rows, threads);
    each_row(rows, stack.inner, threads, [&](int64_t r) {
      char* const gate = room.gate + r * stack.inner * size;
      kernel.gate(gate, room.up + r * stack.inner * size, gate, stack.inner, stack.type);
    });
    project(w.down, room.gate, stack.inner);
  }
};

}  // namespace

int64_t run_layers(const LayerStack& stack, const LayerCall& call, int threads) {
  int64_t need = 0;
  for (int64_t b = 0; b < (call.position_batch ? call.batch : 1); b++)
    for (int64_t t = 0; t < call.tokens; t++) {
      const int64_t p = call.position[b * call.position_batch + t];
      if (p < 0) return -1;
      if (p >= need) need = p + 1;
    }
  if (need > call.positions) return need;
  const Step step(stack, call, threads);
  for (int64_t i = call.first; i < call.last; i++) step.run(stack.layers[size_t(i)], call.caches[i - call.first]);
  if (call.finish) step.normalize(stack.final_norm, call.x);
  return 0;
}

}  // namespace mxq
