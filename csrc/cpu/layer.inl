// What a decoder layer does between its linears and attention, written once for all targets; included by target_*.cpp behind attention.inl.
// Each function rounds to the type of the activations where the modules of transformers do: after every one of their operations.

#include "layer.h"

namespace mxq {
namespace MXQ_TARGET {

// Up to 16 numbers from element i on; zeros beyond `count`.
MXQ_INLINE V load_some(const void* p, int64_t i, int64_t count, int type) {
  if (count >= 16) return load_any(p, i, type);
  float f[16] = {0};
  for (int64_t j = 0; j < count; j++) f[j] = load_one(p, i + j, type);
  return load(f);
}
MXQ_INLINE void store_some(void* p, int64_t i, int64_t count, int type, V v) {
  if (count >= 16) return store_any(p, i, type, v);
  float f[16];
  store(f, v);
  for (int64_t j = 0; j < count; j++) store_one(p, i + j, type, f[j]);
}

// v as it would be after a trip through memory of `type`.
MXQ_INLINE V rounded(V v, int type) {
  if (type == F32) return v;
  uint16_t half[16];
  store_any(half, 0, type, v);
  return load_any(half, 0, type);
}

static void norm(const void* x, const void* weight, void* y, int64_t n, float eps, int type) {
  V sum[4];
  unroll<4>([&](auto i) MXQ_LAMBDA { sum[decltype(i)::value] = zero(); });
  int64_t c = 0;
  for (; c + 64 <= n; c += 64)
    unroll<4>([&](auto i) MXQ_LAMBDA {
      constexpr int I = decltype(i)::value;
      const V v = load_any(x, c + 16 * I, type);
      sum[I] = fma(v, v, sum[I]);
    });
  for (; c < n; c += 16) {
    const V v = load_some(x, c, n - c, type);
    sum[0] = fma(v, v, sum[0]);
  }
  const float variance = hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3]))) / float(n);
  const V factor = set1(1.0f / __builtin_sqrtf(variance + eps));
  for (c = 0; c < n; c += 16) {
    const int64_t left = n - c;
    store_some(y, c, left, type, mul(rounded(mul(load_some(x, c, left, type), factor), type), load_some(weight, c, left, type)));
  }
}

static void rotate(const void* x, const void* cos, const void* sin, void* y, int64_t dim, int type) {
  float head[MAX_HEAD], turned[MAX_HEAD];
  const int64_t half = dim / 2;
  for (int64_t d = 0; d < dim; d += 16) store(head + d, load_any(x, d, type));
  for (int64_t d = 0; d < half; d++) turned[d] = -head[half + d], turned[half + d] = head[d];
  for (int64_t d = 0; d < dim; d += 16) {
    const V straight = rounded(mul(load(head + d), load_any(cos, d, type)), type), crossed = rounded(mul(load(turned + d), load_any(sin, d, type)), type);
    store_any(y, d, type, add(straight, crossed));
  }
}

// exp(v), within 2 units in the last place; v is taken as at most 87, so that the result is a number.
MXQ_INLINE V exponential(V v) {
  v = smaller(set1(87.0f), v);
  const V high = set1(0x1.715476p+0f), product = mul(v, high);  // log2(e) and, below, what its float leaves out
  const V rest = fma(v, set1(0x1.4ae0c0p-26f), fma(v, high, sub(zero(), product)));
  const V power = exp2v(product);
  return fma(power, mul(rest, set1(0x1.62e430p-1f)), power);
}

static void gate(const void* gate, const void* up, void* y, int64_t n, int type) {
  for (int64_t c = 0; c < n; c += 16) {
    const int64_t left = n - c;
    const V g = load_some(gate, c, left, type);
    const V silu = rounded(divide(g, add(set1(1.0f), exponential(sub(zero(), g)))), type);
    store_some(y, c, left, type, mul(silu, load_some(up, c, left, type)));
  }
}

static void add_to(void* x, const void* y, int64_t n, int type) {
  for (int64_t c = 0; c < n; c += 16) store_some(x, c, n - c, type, add(load_some(x, c, n - c, type), load_some(y, c, n - c, type)));
}

extern const LayerKernels layer_kernels = {norm, rotate, gate, add_to};

}  // namespace MXQ_TARGET
}  // namespace mxq
