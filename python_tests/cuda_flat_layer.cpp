// Entry points for tests that run in another process, where only numbers and arrays can be passed: what a decoder layer does between linears and attention.
#include "layer.h"

using namespace mxq::cuda;

extern "C" {

// x, delta (or null) and y [rows, width], contiguous.
int flat_add_norm(void* x, const void* delta, const void* weight, void* y, int rows, int width, int type, float eps) {
  return launch_add_norm({x, delta, weight, y, width, type, eps, 0}, rows, false, nullptr);
}

// q [batch, q_heads, dim], k and v [batch, kv_heads, dim], tails [batch, kv_heads, room, dim], cos and sin [positions, dim], norms [dim] or null, contiguous.
int flat_turn_and_store(void* q, const void* k, const void* v, void* tail_k, void* tail_v, const int32_t* counts, const int32_t* position, const void* cos,
                        const void* sin, const void* q_norm, const void* k_norm, int batch, int q_heads, int kv_heads, int dim, int room, int positions,
                        int type, float eps) {
  return launch_turn_and_store({q, k, v, tail_k, tail_v, int64_t(kv_heads) * room * dim, int64_t(room) * dim, dim, counts, position, cos, sin, positions,
                                q_norm, k_norm, q_heads, kv_heads, dim, type, eps}, batch, false, nullptr);
}

// gate and up [count].
int flat_silu_gate(void* gate, const void* up, int count, int type) { return launch_silu_gate({gate, up, count, type, 0}, false, nullptr); }

}  // extern "C"
