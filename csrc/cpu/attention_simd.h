// What attention needs of vectors beyond simd.h: order, left shifts, sums across lanes, exp2 and tanh. Included by attention.inl, once per target.
#pragma once

#include "simd.h"

namespace mxq {
namespace MXQ_TARGET {

// larger(limit, v) and smaller(limit, v) keep a NaN of v: both return the second argument unless the first is beyond it.
#if defined(MXQ_AVX512)
MXQ_INLINE V larger(V a, V b) { return _mm512_max_ps(a, b); }
MXQ_INLINE V smaller(V a, V b) { return _mm512_min_ps(a, b); }
MXQ_INLINE V divide(V a, V b) { return _mm512_div_ps(a, b); }
MXQ_INLINE float max_of(V v) { return _mm512_reduce_max_ps(v); }
MXQ_INLINE float min_of(V v) { return _mm512_reduce_min_ps(v); }
template <int S>
MXQ_INLINE W shift_left(W w) { return S ? _mm512_slli_epi32(w, S) : w; }
MXQ_INLINE W either(W a, W b) { return _mm512_or_si512(a, b); }
// n + 1 where a > b, else n; a NaN is above nothing.
MXQ_INLINE W count_above(W n, V a, V b) { return _mm512_mask_add_epi32(n, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), n, _mm512_set1_epi32(1)); }
// Lane i of the result is the sum of r[i]: 45 instructions where 16 sums one by one take 150.
MXQ_INLINE V sum16(const V* r) {
  V a[8], b[4];
  unroll<8>([&](auto i) MXQ_LAMBDA {
    constexpr int I = decltype(i)::value;
    a[I] = add(_mm512_unpacklo_ps(r[2 * I], r[2 * I + 1]), _mm512_unpackhi_ps(r[2 * I], r[2 * I + 1]));
  });
  unroll<4>([&](auto i) MXQ_LAMBDA {
    constexpr int I = decltype(i)::value;
    const __m512d x = _mm512_castps_pd(a[2 * I]), y = _mm512_castps_pd(a[2 * I + 1]);
    b[I] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  });
  const auto halves = [](V x, V y) MXQ_LAMBDA { return add(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd)); };
  return halves(halves(b[0], b[1]), halves(b[2], b[3]));
}
// out[i] = sum of r[i], for 4 vectors together.
MXQ_INLINE void sum4(const V* r, float* out) {
  const V a = add(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1])), b = add(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  const V c = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}

#elif defined(MXQ_AVX2)
MXQ_INLINE V larger(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
MXQ_INLINE V smaller(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
MXQ_INLINE V divide(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
MXQ_INLINE float max_of(V v) {
  const __m256 s = _mm256_max_ps(v.a, v.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
MXQ_INLINE float min_of(V v) {
  const __m256 s = _mm256_min_ps(v.a, v.b);
  __m128 q = _mm_min_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_min_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_min_ss(q, _mm_movehdup_ps(q)));
}
template <int S>
MXQ_INLINE W shift_left(W w) { return {_mm256_slli_epi32(w.a, S), _mm256_slli_epi32(w.b, S)}; }
MXQ_INLINE W either(W x, W y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
MXQ_INLINE W count_above(W n, V x, V y) {  // a comparison that holds is -1
  return {_mm256_sub_epi32(n.a, _mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ))),
          _mm256_sub_epi32(n.b, _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)))};
}
MXQ_INLINE __m256 sum8(const V* r) {  // lane i: half of the sum of r[i], over both registers
  __m256 s[8];
  for (int i = 0; i < 8; i++) s[i] = _mm256_add_ps(r[i].a, r[i].b);
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
MXQ_INLINE V sum16(const V* r) { return {sum8(r), sum8(r + 8)}; }

#else
#define MXQ_EACH(f) {f(a), f(b), f(c), f(d)}
MXQ_INLINE F4 pick(S4 mask, F4 x, F4 y) { return (F4)((mask & (S4)x) | (~mask & (S4)y)); }
#define MXQ_F(m) pick((S4)(x.m > y.m), x.m, y.m)
MXQ_INLINE V larger(V x, V y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) pick((S4)(x.m < y.m), x.m, y.m)
MXQ_INLINE V smaller(V x, V y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) x.m / y.m
MXQ_INLINE V divide(V x, V y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) w.m << (uint32_t)S
template <int S>
MXQ_INLINE W shift_left(W w) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) x.m | y.m
MXQ_INLINE W either(W x, W y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) n.m - (U4)(x.m > y.m)
MXQ_INLINE W count_above(W n, V x, V y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#undef MXQ_EACH
MXQ_INLINE float max_of(V v) {
  float f[16], most;
  store(f, v);
  most = f[0];
  for (int i = 1; i < 16; i++) most = f[i] > most ? f[i] : most;
  return most;
}
MXQ_INLINE float min_of(V v) {
  float f[16], least;
  store(f, v);
  least = f[0];
  for (int i = 1; i < 16; i++) least = f[i] < least ? f[i] : least;
  return least;
}
MXQ_INLINE V sum16(const V* r) {
  float f[16];
  for (int i = 0; i < 16; i++) f[i] = hsum(r[i]);
  return load(f);
}
#endif
#if !defined(MXQ_AVX512)
MXQ_INLINE void sum4(const V* r, float* out) {
  for (int i = 0; i < 4; i++) out[i] = hsum(r[i]);
}
#endif

// 2^v = power * (1 + r) with r in -0.3 .. 0.42, accurate relative to r; v in -127 .. 127. Below -126.5 the power, and so the result, is 0.
// r = f * p(f) with f the distance to the nearest integer; p is the polynomial of least relative error of the result, 1.6e-8 with these floats.
MXQ_INLINE V exp2_parts(V v, V& power) {
  const W n = round_to_ints(v);
  const V f = sub(v, to_float(n));
  power = as_floats(shift_left<23>(iadd(n, ints(127))));
  V p = set1(0x1.41fba0p-13f);
  p = fma(p, f, set1(0x1.5f3e50p-10f));
  p = fma(p, f, set1(0x1.3b2d4ep-7f));
  p = fma(p, f, set1(0x1.c6aee8p-5f));
  p = fma(p, f, set1(0x1.ebfbdcp-3f));
  p = fma(p, f, set1(0x1.62e430p-1f));
  return mul(p, f);
}
// v <= 127; a NaN gives a NaN, minus infinity gives 0.
MXQ_INLINE V exp2v(V v) {
  V power;
  const V r = exp2_parts(larger(set1(-127.0f), v), power);
  return fma(power, r, power);
}
// (e - 1) / (e + 1) with e = exp(2 v): e - 1 keeps its relative accuracy near 0.
MXQ_INLINE V tanhv(V v) {
  V power;
  const V y = mul(v, set1(2.885390082f));  // 2 / ln 2
  const V r = exp2_parts(larger(set1(-60.0f), smaller(set1(60.0f), y)), power);
  const V e1 = fma(power, r, sub(power, set1(1.0f)));
  return divide(e1, add(e1, set1(2.0f)));
}

}  // namespace MXQ_TARGET
}  // namespace mxq
