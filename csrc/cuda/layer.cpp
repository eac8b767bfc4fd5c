// The driver of whole decoder layers: the order of the launches, and their memory. Products are launch.cpp's, attention is attention.cpp's, and what lies between
// them is layer.cu's.
#include "layer.h"

#include <algorithm>
#include <initializer_list>

#include "prepack.h"

namespace mxq::cuda {
namespace {

// The launches of a call in their order, or, for `planning`, the most workspace that any of them asks for.
struct Driver {
  const LayersCall& call;
  const bool planning, early;
  int64_t used = 0, scratch = 0;  // bytes of the activations, and of the largest workspace of a step behind them
  int error = 0;                  // of the first launch that failed; nothing is launched after it
  void *normed, *q, *k, *v, *mixed, *delta, *gate, *up;  // [batch][width] of the model's type

  Driver(const LayersCall& c, bool plan) : call(c), planning(plan), early(c.capability >= 90) {
    const int64_t q_width = c.q_heads * c.dim, kv_width = c.kv_heads * c.dim;
    normed = take(c.hidden), q = take(q_width), k = take(kv_width), v = take(kv_width);
    mixed = take(q_width), delta = take(c.hidden), gate = take(c.inner), up = take(c.inner);
  }

  void* take(int64_t width) {
    void* const start = static_cast<uint8_t*>(call.workspace) + used;
    used += round_up(call.batch * width * (call.type == F32 ? 4 : 2), 256);
    return start;
  }

  template <class F>
  void step(F&& launch) {
    if (!planning && !error) error = launch();
  }

  void add_norm(const void* added, const void* weight, void* y) {
    NormParams p{};
    p.x = call.x, p.delta = added, p.weight = weight, p.y = y;
    p.width = int32_t(call.hidden), p.type = int32_t(call.type), p.eps = float(call.eps);
    step([&] { return launch_add_norm(p, call.batch, early, call.stream); });
  }

  struct Product {
    const LayerLinear& weight;
    void* y;
  };

  void multiply(const void* x, int64_t width, std::initializer_list<Product> products) {
    Output outputs[3];
    LinearCall c{};
    for (const Product& p : products)
      outputs[c.outputs++] = {p.weight.head, p.weight.blob, p.y, p.weight.bias, head_of(p.weight.head).n, p.weight.bias_type};
    c.x = x, c.ldx = width, c.x_type = c.y_type = call.type, c.m = call.batch, c.output = outputs, c.workspace = static_cast<uint8_t*>(call.workspace) + used;
    c.stream = call.stream, c.capability = call.capability, c.sms = call.sms;
    if (planning) scratch = std::max(scratch, workspace_nbytes(c));
    step([&] { return linear(c); });
  }

  void turn(const LayerDesc& l) {
    TurnParams p{};
    p.q = q, p.k = k, p.v = v, p.tail_k = const_cast<void*>(l.tail_k.data), p.tail_v = const_cast<void*>(l.tail_v.data);
    p.tail_batch = l.tail_k.batch, p.tail_head = l.tail_k.head, p.tail_token = l.tail_k.token;
    p.counts = l.counts, p.position = call.position, p.cos = call.cos, p.sin = call.sin, p.positions = call.positions;
    p.q_norm = l.q_norm, p.k_norm = l.k_norm, p.eps = float(call.eps);
    p.q_heads = int32_t(call.q_heads), p.kv_heads = int32_t(call.kv_heads), p.dim = int32_t(call.dim), p.type = int32_t(call.type);
    step([&] { return launch_turn_and_store(p, call.batch, early, call.stream); });
  }

  void attend_to(const LayerDesc& l) {
    const int64_t width = call.q_heads * call.dim;
    AttendCall a{};
    a.key = l.key, a.value = l.value, a.batch = call.batch, a.q_heads = call.q_heads, a.kv_heads = call.kv_heads, a.queries = 1;
    a.q = {q, call.type, 1, width, call.dim, width}, a.out = {mixed, call.type, 1, width, call.dim, width};
    a.sink_k = l.sink_k, a.sink_v = l.sink_v, a.tail_k = l.tail_k, a.tail_v = l.tail_v;
    a.pages = l.pages, a.page_count = l.page_room, a.counts = l.counts, a.scale = l.scale, a.causal = 1, a.window = l.window;
    a.mask = call.mask, a.mask_batch = call.mask_batch, a.workspace = static_cast<uint8_t*>(call.workspace) + used;
    a.stream = call.stream, a.capability = call.capability, a.sms = call.sms;
    if (planning) scratch = std::max(scratch, attend_workspace_nbytes(a));
    step([&] { return attend(a); });
  }

  void run() {
    const void* added = nullptr;  // what the step before left to be added to x
    for (int64_t i = 0; i < call.layers; i++) {
      const LayerDesc& l = call.layer[i];
      add_norm(added, l.attention_norm, normed);
      multiply(normed, call.hidden, {{l.q, q}, {l.k, k}, {l.v, v}});
      turn(l);
      attend_to(l);
      multiply(mixed, call.q_heads * call.dim, {{l.o, delta}});
      add_norm(delta, l.mlp_norm, normed);
      multiply(normed, call.hidden, {{l.gate, gate}, {l.up, up}});
      step([&] { return launch_silu_gate({gate, up, call.batch * call.inner, int32_t(call.type), 0}, early, call.stream); });
      multiply(gate, call.inner, {{l.down, delta}});
      added = delta;
    }
    add_norm(added, call.final_norm, call.x);
  }
};

}  // namespace

int64_t layers_workspace_nbytes(const LayersCall& c) {
  Driver driver(c, true);
  driver.run();
  return driver.used + driver.scratch;
}

int run_layers(const LayersCall& c) {
  Driver driver(c, false);
  driver.run();
  return driver.error;
}

}  // namespace mxq::cuda
