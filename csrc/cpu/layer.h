// Decoder layers of the Llama family as one call: what the driver (layer.cpp), the kernels of each target (layer.inl) and the binding share.
#pragma once

#include <vector>

#include "attention.h"

namespace mxq {

struct LayerLinear {
  const uint8_t* blob;
  const void* bias;  // or null
  int bias_type;
  bool a8;
};

// One decoder layer:  x += o(attention(rotate(q(a)), rotate(k(a)), v(a))) with a = norm(x), then x += down(silu(gate(b)) * up(b)) with b = norm(x).
struct LayerWeights {
  const void *attention_norm, *mlp_norm;  // [hidden]
  const void *q_norm, *k_norm;            // [dim], or null: heads are normalized before they are rotated
  LayerLinear q, k, v, o, gate, up, down;
  float scale;     // of the scores
  int64_t window;  // of attention, 0 for none
};

// All vectors and activations are of `type` (Type): what a layer of the model rounds to it is rounded here too.
struct LayerStack {
  int type;
  int64_t hidden, q_heads, kv_heads, dim, inner;
  float eps;
  const void* final_norm;  // [hidden]
  std::vector<LayerWeights> layers;
};

// The cache of one layer, as Python writes it. Keys lie in the order sink, pages, tail; new ones go behind the tail, or behind the sink while there is no
// more, into memory that is there already. Strides in elements of the model's type; both sides of sink and of tail have the same.
struct LayerCache {
  int64_t key_bits, key_group, value_bits, value_group;
  int64_t pages, page_count;  // PageParts*
  int64_t sink_k, sink_v, sink_batch, sink_head, sink_token, sink_tokens;
  int64_t tail_k, tail_v, tail_batch, tail_head, tail_token, tail_tokens;
  int64_t into_sink;
  int64_t dropped;  // tokens before all of these, which a sliding window let go; a mask still has them
  int64_t key_levels, value_levels;           // float*, 0 for none
  int64_t page_turns, token_turns, turn_half;  // Turns
  int64_t key_outliers, value_outliers;
};
static_assert(sizeof(LayerCache) == 27 * sizeof(int64_t), "Python writes twenty-seven numbers");

struct LayerCall {
  void* x;               // [batch][tokens][hidden]; holds the result
  int64_t batch, tokens;
  LayerCache* caches;    // of the layers from `first` on; their tokens are counted up
  int64_t first, last;   // layers first .. last-1
  bool finish;           // then the final norm
  const void *cos, *sin; // [positions][dim] of the model's type
  int64_t positions;
  const int64_t* position;  // row of cos and sin for each token: [batch][tokens], or [tokens] if position_batch is 0
  int64_t position_batch;
  const uint8_t* mask;   // [batch][all keys that there ever were], 1 may be seen; or null
  int64_t mask_batch;
};

// The kernels of one instruction set. n is any number of elements, dim a multiple of 16 up to MAX_HEAD.
struct LayerKernels {
  void (*norm)(const void* x, const void* weight, void* y, int64_t n, float eps, int type);                 // y = x / rms(x) * weight
  void (*rotate)(const void* x, const void* cos, const void* sin, void* y, int64_t dim, int type);          // one head, in half pairs (d, d + dim / 2)
  void (*gate)(const void* gate, const void* up, void* y, int64_t n, int type);                             // y = silu(gate) * up
  void (*add)(void* x, const void* y, int64_t n, int type);                                                 // x += y
};

namespace scalar { extern const LayerKernels layer_kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const LayerKernels layer_kernels; }
namespace avx512 { extern const LayerKernels layer_kernels; }
namespace avx512vnni { extern const LayerKernels layer_kernels; }
#endif

// Runs layers; returns 0, or, with nothing done, what is wrong with the positions: the number of rows of cos and sin that they need, or -1 if one of
// them is negative. Everything else was checked in Python. Throws std::bad_alloc.
int64_t run_layers(const LayerStack& stack, const LayerCall& call, int threads);

}  // namespace mxq
