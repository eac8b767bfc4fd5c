// Decoder layers of the Llama family for one new token of each sequence: a call as Python hands it over (8-byte fields, filled through ctypes), and the
// kernels between linears and attention. layer.cpp has the order of the launches.
#pragma once

#include "attention.h"
#include "launch.h"

namespace mxq::cuda {

struct LayerLinear {
  const uint8_t *head, *blob;  // as in Output
  const void* bias;            // or null
  int64_t bias_type;
};

// One layer:  x += o(attention(turn(q(a)), turn(k(a)), v(a))) with a = norm(x), then x += down(silu(gate(b)) * up(b)) with b = norm(x).
// Its sink has all tokens that it is to have, so that the new one goes into the tail.
struct LayerDesc {
  const void *attention_norm, *mlp_norm;  // [hidden]
  const void *q_norm, *k_norm;            // [dim], or null: heads are normalized before they are turned
  LayerLinear q, k, v, o, gate, up, down;
  double scale;                           // of the scores
  int64_t window;                         // of attention, 0 for none
  PageDesc key, value;
  Rows sink_k, sink_v, tail_k, tail_v;    // [batch, kv_heads, tokens, dim] of the call's type; the tail with all the room that it has
  const PageParts* pages;                 // room for page_room pages
  int64_t page_room;
  const int32_t* counts;                  // device memory: pages, and tokens of the tail with the new one among them
};

// Whatever is another one from token to token (counts, position, mask, x) is read from device memory: the same call, and what was captured of it in a graph,
// serves one token after the other.
struct LayersCall {
  const LayerDesc* layer;
  int64_t layers;
  void* x;  // [batch, hidden]; holds the result
  int64_t type, batch, hidden, q_heads, kv_heads, dim, inner;  // Type: of all vectors and activations
  double eps;
  const void* final_norm;   // [hidden]
  const void *cos, *sin;    // [positions, dim]
  int64_t positions;
  const int32_t* position;  // [batch], device memory: rows of cos and sin. Keys and queries of one that is no row are NaN
  const uint8_t* mask;      // [batch][keys], 1 may be seen; or null
  int64_t mask_batch;
  void* workspace;          // device memory of layers_workspace_nbytes()
  void* stream;
  int64_t capability, sms;
};

int64_t layers_workspace_nbytes(const LayersCall& c);
// Returns a cudaError_t, 0 for success, or NO_KERNEL. Nothing is allocated, nothing waits.
int run_layers(const LayersCall& c);

// ------------------------------------------------------------------------------------------------------------------ for the kernels

struct NormParams {
  void* x;              // [rows, width]
  const void* delta;    // the same, or null
  const void* weight;   // [width]
  void* y;              // [rows, width]; may be x
  int32_t width, type;
  float eps;
  int32_t wide;         // set by the launch: all addresses and rows are multiples of 16 bytes
};

struct TurnParams {
  void* q;                                         // [batch, q_heads, dim], in place
  const void *k, *v;                               // [batch, kv_heads, dim]
  void *tail_k, *tail_v;
  int64_t tail_batch, tail_head, tail_token;       // strides of both
  const int32_t *counts, *position;                // as in LayerDesc and LayersCall
  const void *cos, *sin;
  int64_t positions;
  const void *q_norm, *k_norm;
  int32_t q_heads, kv_heads, dim, type;
  float eps;
};

struct GateParams {
  void* gate;      // [count], in place
  const void* up;
  int64_t count;
  int32_t type, wide;  // wide: see NormParams
};

// layer.cu. `early`: see MXQ_LAUNCH_EARLY.
int launch_add_norm(NormParams p, int64_t rows, bool early, void* stream);
int launch_turn_and_store(const TurnParams& p, int64_t batch, bool early, void* stream);
int launch_silu_gate(GateParams p, bool early, void* stream);

}  // namespace mxq::cuda
