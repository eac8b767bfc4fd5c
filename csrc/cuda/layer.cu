// What a decoder layer does between its linears and attention, for a few rows. Each kernel rounds to the type of the activations where the modules of
// transformers do: after every one of their operations.
#include <math.h>

#include <initializer_list>

#include "layer.h"
#include "numbers.cuh"
#include "simt.hpp"

namespace mxq::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr unsigned ALL = ~0u;

// v as it would be after a trip through memory of `type`.
__device__ __forceinline__ float rounded(float v, int type) {
  if (type == F32) return v;
  return type == BF16 ? ptx::bf16_to_float(ptx::float_to_bf16(v)) : ptx::half_to_float(ptx::float_to_half(v));
}

// N numbers from element i on: one, or eight by 16 bytes at a time. No read-only loads: the same kernel may have written them.
template <int N>
__device__ __forceinline__ void load(const void* p, int64_t i, int type, float (&v)[N]) {
  if constexpr (N == 1) {
    if (type == F32) {
      v[0] = static_cast<const float*>(p)[i];
    } else {
      const uint16_t u = static_cast<const uint16_t*>(p)[i];
      v[0] = type == BF16 ? ptx::bf16_to_float(u) : ptx::half_to_float(u);
    }
  } else if (type == F32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(p) + i);
    const float4 a = from[0], b = from[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else {
    const uint4 u = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + i);
    const unsigned words[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 two = type == BF16 ? ptx::bf162_to_floats(words[j]) : ptx::half2_to_floats(words[j]);
      v[2 * j] = two.x, v[2 * j + 1] = two.y;
    }
  }
}
template <int N>
__device__ __forceinline__ void store(void* p, int64_t i, int type, const float (&v)[N]) {
  if constexpr (N == 1) {
    store_number(p, i, type, v[0]);
  } else if (type == F32) {
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(p) + i);
    to[0] = make_float4(v[0], v[1], v[2], v[3]), to[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    unsigned words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) words[j] = type == BF16 ? ptx::floats_to_bf162(v[2 * j], v[2 * j + 1]) : ptx::floats_to_half2(v[2 * j], v[2 * j + 1]);
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p) + i) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int m = WARP / 2; m; m /= 2) v += __shfl_xor_sync(ALL, v, m);
  return v;
}

// ------------------------------------------------------------------------------------------------------------------ add_norm

// x += delta, if there is one, by the thread that normalizes the same numbers later; the sum of their squares.
template <int N>
__device__ __forceinline__ float add(const NormParams& p, int64_t row) {
  float squares = 0.0f;
  for (int i = N * int(threadIdx.x); i < p.width; i += N * THREADS) {
    float v[N];
    load(p.x, row + i, p.type, v);
    if (p.delta) {
      float d[N];
      load(p.delta, row + i, p.type, d);
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = rounded(__fadd_rn(v[j], d[j]), p.type);
      store(p.x, row + i, p.type, v);
    }
#pragma unroll
    for (int j = 0; j < N; j++) squares = fmaf(v[j], v[j], squares);
  }
  return squares;
}

template <int N>
__device__ __forceinline__ void normalize(const NormParams& p, int64_t row, float factor) {
  for (int i = N * int(threadIdx.x); i < p.width; i += N * THREADS) {
    float v[N], w[N];
    load(p.x, row + i, p.type, v);
    load(p.weight, i, p.type, w);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = __fmul_rn(rounded(__fmul_rn(v[j], factor), p.type), w[j]);
    store(p.y, row + i, p.type, v);
  }
}

// grid: rows. x += delta, y = x / rms(x) * weight.
__global__ void __launch_bounds__(THREADS) add_norm(const __grid_constant__ NormParams p) {
  MXQ_SHARED(float, sums, WARPS);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int64_t row = int64_t(blockIdx.x) * p.width;
  const float mine = sum_of_warp(p.wide ? add<8>(p, row) : add<1>(p, row));
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = mine;
  __syncthreads();
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < WARPS; i++) squares += sums[i];
  const float factor = __fdiv_rn(1.0f, sqrtf(__fadd_rn(__fdiv_rn(squares, float(p.width)), p.eps)));
  if (p.wide) normalize<8>(p, row, factor);
  else normalize<1>(p, row, factor);
}

// ------------------------------------------------------------------------------------------------------------------ turn_and_store

constexpr int PAIRS = MAX_HEAD / 2 / WARP;  // of channels (d, d + dim / 2), most that a lane has

__device__ __forceinline__ float one(const void* p, int64_t i, int type) {
  float v[1];
  load(p, i, type, v);
  return v[0];
}

// grid: (heads of queries, keys and values / WARPS, batch). A warp has a head: it is normalized, if it has a norm, and turned; queries stay where they are, keys
// and values go to the place of the newest token of the tail.
__global__ void __launch_bounds__(THREADS) turn_and_store(const __grid_constant__ TurnParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int head = int(blockIdx.x) * WARPS + int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP, half = p.dim / 2;
  if (head >= p.q_heads + 2 * p.kv_heads) return;
  const int64_t b = blockIdx.y;
  const bool query = head < p.q_heads, value = head >= p.q_heads + p.kv_heads;
  const int of_side = query ? head : value ? head - p.q_heads - p.kv_heads : head - p.q_heads;
  const void* from = query ? p.q : value ? p.v : p.k;
  void* to = query ? p.q : value ? p.tail_v : p.tail_k;
  const void* norm = query ? p.q_norm : value ? nullptr : p.k_norm;
  const int64_t at = (b * (query ? p.q_heads : p.kv_heads) + of_side) * p.dim;
  const int64_t place = query ? at : b * p.tail_batch + of_side * p.tail_head + (p.counts[1] - 1) * p.tail_token;
  float low[PAIRS], high[PAIRS];
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    const int d = lane + i * WARP;
    low[i] = d < half ? one(from, at + d, p.type) : 0.0f, high[i] = d < half ? one(from, at + half + d, p.type) : 0.0f;
  }
  if (norm) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) squares = fmaf(low[i], low[i], fmaf(high[i], high[i], squares));
    const float factor = __fdiv_rn(1.0f, sqrtf(__fadd_rn(__fdiv_rn(sum_of_warp(squares), float(p.dim)), p.eps)));
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      const int d = lane + i * WARP;
      if (d >= half) break;
      low[i] = rounded(__fmul_rn(rounded(__fmul_rn(low[i], factor), p.type), one(norm, d, p.type)), p.type);
      high[i] = rounded(__fmul_rn(rounded(__fmul_rn(high[i], factor), p.type), one(norm, half + d, p.type)), p.type);
    }
  }
  const int64_t position = p.position[b];
  const bool known = position >= 0 && position < p.positions;
  const int64_t row = known ? position * p.dim : 0;
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    const int d = lane + i * WARP;
    if (d >= half) break;
    float a = low[i], c = high[i];
    if (!value) {
      const float straight = rounded(__fmul_rn(a, one(p.cos, row + d, p.type)), p.type), crossed = rounded(__fmul_rn(-c, one(p.sin, row + d, p.type)), p.type);
      const float straight2 = rounded(__fmul_rn(c, one(p.cos, row + half + d, p.type)), p.type);
      const float crossed2 = rounded(__fmul_rn(a, one(p.sin, row + half + d, p.type)), p.type);
      a = known ? __fadd_rn(straight, crossed) : NAN, c = known ? __fadd_rn(straight2, crossed2) : NAN;
    }
    store_number(to, place + d, p.type, a), store_number(to, place + half + d, p.type, c);
  }
}

// ------------------------------------------------------------------------------------------------------------------ silu_gate

// exp(v): a power of two, and what the product by log2(e) rounded off, unless the power may be infinite.
__device__ __forceinline__ float exponential(float v) {
  const float product = __fmul_rn(v, 0x1.715476p+0f), rest = fmaf(v, 0x1.4ae0c0p-26f, fmaf(v, 0x1.715476p+0f, -product));
  const float power = ptx::exp2_approx(product);
  return v > 87.0f ? power : fmaf(power, rest * 0x1.62e430p-1f, power);
}

template <int N>
__device__ __forceinline__ void gate(const GateParams& p) {
  const int64_t i = N * (int64_t(blockIdx.x) * THREADS + threadIdx.x);
  if (i >= p.count) return;
  float g[N], u[N];
  load(p.gate, i, p.type, g);
  load(p.up, i, p.type, u);
#pragma unroll
  for (int j = 0; j < N; j++) g[j] = __fmul_rn(rounded(__fdiv_rn(g[j], __fadd_rn(1.0f, exponential(-g[j]))), p.type), u[j]);
  store(p.gate, i, p.type, g);
}

// gate = silu(gate) * up
__global__ void __launch_bounds__(THREADS) silu_gate(const __grid_constant__ GateParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (p.wide) gate<8>(p);
  else gate<1>(p);
}

bool is_wide(int64_t width, std::initializer_list<const void*> addresses) {
  if (width % 8) return false;
  for (const void* a : addresses)
    if (reinterpret_cast<uintptr_t>(a) % 16) return false;
  return true;
}

}  // namespace

int launch_add_norm(NormParams p, int64_t rows, bool early, void* stream) {
  p.wide = is_wide(p.width, {p.x, p.delta, p.weight, p.y});
  return MXQ_LAUNCH_EARLY(early, add_norm, dim3(unsigned(rows)), dim3(THREADS), 0, stream, p);
}

int launch_turn_and_store(const TurnParams& p, int64_t batch, bool early, void* stream) {
  const dim3 grid(unsigned(ceil_div(p.q_heads + 2 * p.kv_heads, WARPS)), unsigned(batch));
  return MXQ_LAUNCH_EARLY(early, turn_and_store, grid, dim3(THREADS), 0, stream, p);
}

int launch_silu_gate(GateParams p, bool early, void* stream) {
  p.wide = is_wide(p.count, {p.gate, p.up});
  return MXQ_LAUNCH_EARLY(early, silu_gate, dim3(unsigned(ceil_div(p.count, (p.wide ? 8 : 1) * THREADS))), dim3(THREADS), 0, stream, p);
}

}  // namespace mxq::cuda
