// The few vector operations that linear.inl is written in, once per target. A vector is always 16 lanes: one AVX-512 register, two AVX2
// registers, or four of the smallest vectors. The including file defines MXQ_TARGET to avx512, avx2 or scalar and gets everything in that namespace.
//
// Nothing here may be shared between targets (see formats.h): every name lies in the target's namespace and every function is inlined.
#pragma once

#include <stdint.h>
#include <string.h>

#define MXQ_INLINE static inline __attribute__((always_inline))
#define MXQ_LAMBDA __attribute__((always_inline))

namespace mxq {
namespace MXQ_TARGET {

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls f(Int<0>), f(Int<1>), ... f(Int<N-1>): indices that are constants, so that arrays of vectors stay in registers.
template <int N, int I = 0, class F>
MXQ_INLINE void unroll(F&& f) {
  if constexpr (I < N) {
    f(Int<I>{});
    unroll<N, I + 1>(f);
  }
}

// Portable conversions, used by the scalar target and for single values.
MXQ_INLINE float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
MXQ_INLINE uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
MXQ_INLINE float bf16_to_float(uint16_t h) { return bits_to_float((uint32_t)h << 16); }
MXQ_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 0x3ff;
  if (exp == 31) return bits_to_float(sign | 0x7f800000 | man << 13);
  if (exp) return bits_to_float(sign | (exp + 112) << 23 | man << 13);
  return bits_to_float(sign | float_to_bits((float)man * 0x1p-24f));  // zero and subnormals: man * 2^-24 is exact
}
// Both round to nearest, ties to even, as torch does.
MXQ_INLINE uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
MXQ_INLINE uint16_t float_to_half(float f) {
  const uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and above round to infinity
  if (a < 0x38800000) return (uint16_t)(sign | (float_to_bits(bits_to_float(a) + 0.5f) & 0xffff));  // subnormal: the adder rounds at 2^-24
  return (uint16_t)(sign | (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13);
}
MXQ_INLINE float load_one(const void* p, int64_t i, int type) {
  return type == F32 ? ((const float*)p)[i] : type == BF16 ? bf16_to_float(((const uint16_t*)p)[i]) : half_to_float(((const uint16_t*)p)[i]);
}
MXQ_INLINE void store_one(void* p, int64_t i, int type, float v) {
  if (type == F32) ((float*)p)[i] = v;
  else ((uint16_t*)p)[i] = type == BF16 ? float_to_bf16(v) : float_to_half(v);
}

#if defined(MXQ_AVX512) || defined(MXQ_AVX2)
// x[index[0..8)], load by load: the gather instruction is microcode on many processors (some 50 cycles for 16 on Zen 4, slower still on those
// that were mended against Downfall), these are two loads a cycle.
template <class I>
MXQ_INLINE __m256 gather_eight(const float* x, const I* i) {
  const __m128 low = _mm_set_ps(x[i[3]], x[i[2]], x[i[1]], x[i[0]]), high = _mm_set_ps(x[i[7]], x[i[6]], x[i[5]], x[i[4]]);
  return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}
#endif

#if defined(MXQ_AVX512)
// ------------------------------------------------------------------------------------------------------------------- AVX-512

using V = __m512;      // 16 floats
using W = __m512i;     // 16 words of codes
using Book = __m512;   // what codes decode to; shorter tables are repeated until all 16 entries are filled

MXQ_INLINE V zero() { return _mm512_setzero_ps(); }
MXQ_INLINE V set1(float f) { return _mm512_set1_ps(f); }
MXQ_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
MXQ_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
MXQ_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
MXQ_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
MXQ_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
MXQ_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
MXQ_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a*b
MXQ_INLINE float hsum(V v) { return _mm512_reduce_add_ps(v); }
MXQ_INLINE V load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
MXQ_INLINE V load_bf16(const void* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
MXQ_INLINE V load_s8(const void* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
MXQ_INLINE void store_half(void* p, V v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
MXQ_INLINE void store_bf16(void* p, V v) {
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i nan = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan)));
}
// The empty asm pins the words in a register: gcc would otherwise fold the load into every shift and spend the load ports on it.
MXQ_INLINE W load_words(const void* p) {
  W w = _mm512_loadu_si512(p);
  __asm__("" : "+v"(w));
  return w;
}
template <int S>
MXQ_INLINE W shift(W w) { return S ? _mm512_srli_epi32(w, S) : w; }
MXQ_INLINE W shift_by(W w, int s) { return _mm512_srl_epi32(w, _mm_cvtsi32_si128(s)); }
template <int BITS>
MXQ_INLINE V lookup(Book book, W w) { return _mm512_permutexvar_ps(w, book); }
// A lookup reads 4 bits, two codes of 2 bits: with this table instead of `book` it answers for the upper one.
static constexpr bool PAIRS = true;
MXQ_INLINE Book upper_code(Book book) {
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), book);
}
// Field of BITS bits, at most 4, at bit S as a signed number; `book` says the same as a table.
template <int BITS, int S>
MXQ_INLINE V centred(Book book, W w) {
  static_assert(BITS <= 4, "a table has 16 entries");
  return lookup<BITS>(book, shift<S>(w));
}

// Integers: W as 64 bytes or as 16 sums.
using Bytes = __m512i;  // a table of 16 bytes, once in each 128 bits
#if defined(MXQ_VNNI)
static constexpr bool VNNI = true;
#else
static constexpr bool VNNI = false;
#endif
MXQ_INLINE W ints(int32_t v) { return _mm512_set1_epi32(v); }
MXQ_INLINE W iadd(W a, W b) { return _mm512_add_epi32(a, b); }
MXQ_INLINE W ixor(W a, W b) { return _mm512_xor_si512(a, b); }
template <int S>
MXQ_INLINE W sra(W a) { return S ? _mm512_srai_epi32(a, S) : a; }
MXQ_INLINE V to_float(W a) { return _mm512_cvtepi32_ps(a); }
static constexpr bool TERNARY = true;  // and with a constant, xor with another: one operation
template <uint32_t MASK, uint32_t FLIP>
MXQ_INLINE W field(W w) {  // (w & MASK) ^ FLIP
  if constexpr (FLIP == 0) return _mm512_and_si512(w, ints((int32_t)MASK));  // leaves w alone, where a ternary operation needs a copy of it
  else return _mm512_ternarylogic_epi32(w, ints((int32_t)MASK), ints((int32_t)FLIP), 0x6a);
}
// (a & 3) | (b & 4) in each byte, a code of quads 6 and 7 of a 3-bit stripe; FLIP inverts its top bit.
template <bool FLIP>
MXQ_INLINE W merge3(W a, W b) {
  return _mm512_ternarylogic_epi32(_mm512_and_si512(a, ints(0x03030303)), b, ints(0x04040404), FLIP ? 0xf2 : 0xf8);
}
// The bits of b where MASK has ones, those of a elsewhere.
template <uint32_t MASK>
MXQ_INLINE W merge(W a, W b) { return _mm512_ternarylogic_epi32(a, b, ints((int32_t)MASK), 0xd8); }
MXQ_INLINE void pin(W& w) { __asm__("" : "+v"(w)); }
MXQ_INLINE Bytes load_bytes(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
MXQ_INLINE W lookup_bytes(Bytes t, W index) { return _mm512_shuffle_epi8(t, index); }
MXQ_INLINE Bytes reordered(Bytes t, Bytes index) { return _mm512_shuffle_epi8(t, index); }  // entry i is t[index[i]]
MXQ_INLINE void store_words(void* p, W w) { _mm512_storeu_si512(p, w); }
// acc[i] += sum over byte k of lane i of u * x: u unsigned (up to 127 without VNNI, since pairs are summed in 16 bits), x in -127 .. 127.
#if defined(MXQ_VNNI)
// Not the intrinsic: gcc 12 copies its accumulator before and after each use, and 24 of them in a loop then spill.
MXQ_INLINE W dot(W acc, W u, W x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(x));
  return acc;
}
// x: four bytes, the same for all lanes.
MXQ_INLINE W dot_four(W acc, W u, const int8_t* x) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(u), "m"(*(const int8_t(*)[4])x));
  return acc;
}
#else
MXQ_INLINE W dot(W acc, W u, W x) { return iadd(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(u, x), _mm512_set1_epi16(1))); }
#endif
MXQ_INLINE W dot_signed(W acc, W s, W x) {  // both signed; only without VNNI
  const __m512i moved = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(s), _mm512_setzero_si512(), x);
  return iadd(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(s), moved), _mm512_set1_epi16(1)));
}
template <class I>
MXQ_INLINE V gather(const float* x, const I* index) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(gather_eight(x, index)), gather_eight(x, index + 8), 1);
}
MXQ_INLINE W max_bits(W most, V v) {  // of magnitudes as integers: ordered like floats, and a NaN is larger than all
  return _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(v), ints(0x7fffffff)));
}
MXQ_INLINE uint32_t max_lane(W w) { return _mm512_reduce_max_epu32(w); }
MXQ_INLINE int32_t sum_lanes(W w) { return _mm512_reduce_add_epi32(w); }
MXQ_INLINE W round_to_ints(V v) { return _mm512_cvtps_epi32(v); }  // ties to even
MXQ_INLINE void store_s8(int8_t* p, W w) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(w)); }
// r[i] lane j <-> r[j] lane i
MXQ_INLINE void transpose(V* r) {
  V t[16];
  unroll<8>([&](auto i) MXQ_LAMBDA {
    constexpr int I = decltype(i)::value;
    t[2 * I] = _mm512_unpacklo_ps(r[2 * I], r[2 * I + 1]);
    t[2 * I + 1] = _mm512_unpackhi_ps(r[2 * I], r[2 * I + 1]);
  });
  unroll<4>([&](auto i) MXQ_LAMBDA {
    constexpr int I = decltype(i)::value * 4;
    r[I] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[I]), _mm512_castps_pd(t[I + 2])));
    r[I + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[I]), _mm512_castps_pd(t[I + 2])));
    r[I + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[I + 1]), _mm512_castps_pd(t[I + 3])));
    r[I + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[I + 1]), _mm512_castps_pd(t[I + 3])));
  });
  unroll<4>([&](auto i) MXQ_LAMBDA {
    constexpr int I = decltype(i)::value;
    t[I] = _mm512_shuffle_f32x4(r[I], r[I + 4], 0x88);
    t[I + 4] = _mm512_shuffle_f32x4(r[I], r[I + 4], 0xdd);
    t[I + 8] = _mm512_shuffle_f32x4(r[I + 8], r[I + 12], 0x88);
    t[I + 12] = _mm512_shuffle_f32x4(r[I + 8], r[I + 12], 0xdd);
  });
  unroll<4>([&](auto i) MXQ_LAMBDA {
    constexpr int I = decltype(i)::value;
    r[I] = _mm512_shuffle_f32x4(t[I], t[I + 8], 0x88);
    r[I + 8] = _mm512_shuffle_f32x4(t[I], t[I + 8], 0xdd);
    r[I + 4] = _mm512_shuffle_f32x4(t[I + 4], t[I + 12], 0x88);
    r[I + 12] = _mm512_shuffle_f32x4(t[I + 4], t[I + 12], 0xdd);
  });
}

#elif defined(MXQ_AVX2)
// ---------------------------------------------------------------------------------------------------------------------- AVX2

struct V { __m256 a, b; };
struct W { __m256i a, b; };
struct Book { __m256 a, b; };

MXQ_INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
MXQ_INLINE V set1(float f) { const __m256 v = _mm256_set1_ps(f); return {v, v}; }
MXQ_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MXQ_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
MXQ_INLINE V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
MXQ_INLINE V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
MXQ_INLINE V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
MXQ_INLINE V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
MXQ_INLINE V fnma(V x, V y, V z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
MXQ_INLINE float hsum(V v) {
  const __m256 s = _mm256_add_ps(v.a, v.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
MXQ_INLINE V load_half(const void* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
MXQ_INLINE __m256 bf16x8(const __m128i* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
MXQ_INLINE V load_bf16(const void* p) { return {bf16x8((const __m128i*)p), bf16x8((const __m128i*)p + 1)}; }
MXQ_INLINE V load_s8(const void* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)p + 8))))};
}
MXQ_INLINE void store_half(void* p, V v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}
MXQ_INLINE void store_bf16(void* p, V v) {
  float f[16];
  store(f, v);
  for (int i = 0; i < 16; i++) ((uint16_t*)p)[i] = float_to_bf16(f[i]);
}
MXQ_INLINE W load_words(const void* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}; }
template <int S>
MXQ_INLINE W shift(W w) { return {_mm256_srli_epi32(w.a, S), _mm256_srli_epi32(w.b, S)}; }
MXQ_INLINE W shift_by(W w, int s) {
  const __m128i n = _mm_cvtsi32_si128(s);
  return {_mm256_srl_epi32(w.a, n), _mm256_srl_epi32(w.b, n)};
}
// vpermps reads 3 bits: tables of 16 need two lookups and a blend by bit 3.
template <int BITS>
MXQ_INLINE __m256 lookup8(Book book, __m256i w) {
  const __m256 low = _mm256_permutevar8x32_ps(book.a, w);
  if constexpr (BITS < 4) return low;
  return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(book.b, w), _mm256_castsi256_ps(_mm256_slli_epi32(w, 28)));
}
template <int BITS>
MXQ_INLINE V lookup(Book book, W w) { return {lookup8<BITS>(book, w.a), lookup8<BITS>(book, w.b)}; }
template <int BITS, int S>
MXQ_INLINE __m256 signed8(__m256i w) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(w, 32 - BITS - S), 32 - BITS)); }
template <int BITS, int S>
MXQ_INLINE V centred(Book book, W w) {
  if constexpr (BITS >= 4) return {signed8<BITS, S>(w.a), signed8<BITS, S>(w.b)};  // cheaper than two lookups and a blend
  else return lookup<BITS>(book, shift<S>(w));
}

using Bytes = __m256i;
static constexpr bool VNNI = false;
MXQ_INLINE W ints(int32_t v) { const __m256i w = _mm256_set1_epi32(v); return {w, w}; }
MXQ_INLINE W iadd(W x, W y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
MXQ_INLINE W ixor(W x, W y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int S>
MXQ_INLINE W sra(W w) { return {_mm256_srai_epi32(w.a, S), _mm256_srai_epi32(w.b, S)}; }
MXQ_INLINE V to_float(W w) { return {_mm256_cvtepi32_ps(w.a), _mm256_cvtepi32_ps(w.b)}; }
static constexpr bool TERNARY = false;
MXQ_INLINE W mask_words(W w, uint32_t mask) {
  const __m256i m = _mm256_set1_epi32((int32_t)mask);
  return {_mm256_and_si256(w.a, m), _mm256_and_si256(w.b, m)};
}
template <uint32_t MASK, uint32_t FLIP>
MXQ_INLINE W field(W w) {
  if constexpr (MASK != 0xffffffffu) w = mask_words(w, MASK);
  if constexpr (FLIP) w = ixor(w, ints((int32_t)FLIP));
  return w;
}
template <bool FLIP>
MXQ_INLINE W merge3(W a, W b) {
  const W low = mask_words(a, 0x03030303), top = field<0x04040404, FLIP ? 0x04040404 : 0>(b);
  return {_mm256_or_si256(low.a, top.a), _mm256_or_si256(low.b, top.b)};
}
template <uint32_t MASK>
MXQ_INLINE W merge(W a, W b) {
  const W low = mask_words(a, ~MASK), top = mask_words(b, MASK);
  return {_mm256_or_si256(low.a, top.a), _mm256_or_si256(low.b, top.b)};
}
MXQ_INLINE void pin(W&) {}
MXQ_INLINE Bytes load_bytes(const void* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
MXQ_INLINE W lookup_bytes(Bytes t, W i) { return {_mm256_shuffle_epi8(t, i.a), _mm256_shuffle_epi8(t, i.b)}; }
MXQ_INLINE Bytes reordered(Bytes t, Bytes index) { return _mm256_shuffle_epi8(t, index); }
MXQ_INLINE void store_words(void* p, W w) { _mm256_storeu_si256((__m256i*)p, w.a); _mm256_storeu_si256((__m256i*)p + 1, w.b); }
MXQ_INLINE W short_products(W u, W x) { return {_mm256_maddubs_epi16(u.a, x.a), _mm256_maddubs_epi16(u.b, x.b)}; }
// Not the intrinsics: gcc 12 brings a chain of their additions into another order, and keeps all terms of it in memory until the end.
MXQ_INLINE W add_short(W x, W y) {
  __asm__("vpaddw %2, %0, %0\n\tvpaddw %3, %1, %1" : "+x"(x.a), "+x"(x.b) : "x"(y.a), "x"(y.b));
  return x;
}
MXQ_INLINE W widen(W acc, W s) {
  const __m256i one = _mm256_set1_epi16(1), a = _mm256_madd_epi16(s.a, one), b = _mm256_madd_epi16(s.b, one);
  __asm__("vpaddd %2, %0, %0\n\tvpaddd %3, %1, %1" : "+x"(acc.a), "+x"(acc.b) : "x"(a), "x"(b));
  return acc;
}
MXQ_INLINE W dot(W acc, W u, W x) { return widen(acc, short_products(u, x)); }
template <class I>
MXQ_INLINE V gather(const float* x, const I* index) { return {gather_eight(x, index), gather_eight(x, index + 8)}; }
MXQ_INLINE W max_bits(W most, V v) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_max_epu32(most.a, _mm256_and_si256(_mm256_castps_si256(v.a), mask)),
          _mm256_max_epu32(most.b, _mm256_and_si256(_mm256_castps_si256(v.b), mask))};
}
MXQ_INLINE W round_to_ints(V v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
MXQ_INLINE __m128i lower(__m256i v) { return _mm256_castsi256_si128(v); }
MXQ_INLINE __m128i upper(__m256i v) { return _mm256_extracti128_si256(v, 1); }
MXQ_INLINE uint32_t max_lane(W w) {
  __m256i m = _mm256_max_epu32(w.a, w.b);
  __m128i q = _mm_max_epu32(lower(m), upper(m));
  q = _mm_max_epu32(q, _mm_shuffle_epi32(q, 0x4e));
  return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(q, _mm_shuffle_epi32(q, 0xb1)));
}
MXQ_INLINE int32_t sum_lanes(W w) {
  const __m256i s = _mm256_add_epi32(w.a, w.b);
  __m128i q = _mm_add_epi32(lower(s), upper(s));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
MXQ_INLINE void store_s8(int8_t* p, W w) {  // -128 .. 127, so that saturation changes nothing
  const __m256i s = _mm256_packs_epi32(w.a, w.b);  // 4 of a, 4 of b, 4 of a, 4 of b
  const __m128i b = _mm_packs_epi16(lower(s), upper(s));
  _mm_storeu_si128((__m128i*)p, _mm_shuffle_epi32(b, 0xd8));
}
// 8 x 8: r[i] lane j <-> r[j] lane i
MXQ_INLINE void transpose8(__m256* r) {
  __m256 t[8];
  unroll<4>([&](auto i) MXQ_LAMBDA {
    constexpr int I = 2 * decltype(i)::value;
    t[I] = _mm256_unpacklo_ps(r[I], r[I + 1]);
    t[I + 1] = _mm256_unpackhi_ps(r[I], r[I + 1]);
  });
  unroll<2>([&](auto i) MXQ_LAMBDA {
    constexpr int I = 4 * decltype(i)::value;
    r[I] = _mm256_shuffle_ps(t[I], t[I + 2], 0x44);
    r[I + 1] = _mm256_shuffle_ps(t[I], t[I + 2], 0xee);
    r[I + 2] = _mm256_shuffle_ps(t[I + 1], t[I + 3], 0x44);
    r[I + 3] = _mm256_shuffle_ps(t[I + 1], t[I + 3], 0xee);
  });
  unroll<4>([&](auto i) MXQ_LAMBDA {
    constexpr int I = decltype(i)::value;
    const __m256 low = r[I], high = r[I + 4];
    r[I] = _mm256_permute2f128_ps(low, high, 0x20);
    r[I + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  });
}
MXQ_INLINE void transpose(V* r) {  // four blocks, one after the other: 16 registers hold one
  __m256 t[8], u[8];
  const auto take = [&](__m256* to, int first, bool b) MXQ_LAMBDA {
    for (int i = 0; i < 8; i++) to[i] = b ? r[first + i].b : r[first + i].a;
    transpose8(to);
  };
  take(t, 0, false);
  for (int i = 0; i < 8; i++) r[i].a = t[i];
  take(t, 8, true);
  for (int i = 0; i < 8; i++) r[8 + i].b = t[i];
  take(t, 0, true), take(u, 8, false);
  for (int i = 0; i < 8; i++) r[8 + i].a = t[i], r[i].b = u[i];
}

#else
// -------------------------------------------------------------------------------------------------------------------- scalar

// Four vectors of 16 bytes, which gcc and clang map to whatever the architecture has at least (SSE2, NEON) or to single operations.
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t S4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
struct V { F4 a, b, c, d; };
struct W { U4 a, b, c, d; };
struct Book { float v[16]; };

// The same expression of the members a, b, c, d of the arguments.
#define MXQ_EACH(f) {f(a), f(b), f(c), f(d)}
template <class T>
MXQ_INLINE T read(const void* p) { T t; memcpy(&t, p, sizeof t); return t; }

MXQ_INLINE V set1(float f) { const F4 v = {f, f, f, f}; return {v, v, v, v}; }
MXQ_INLINE V zero() { return set1(0.0f); }
MXQ_INLINE V load(const float* p) { return read<V>(p); }
MXQ_INLINE void store(float* p, V v) { memcpy(p, &v, sizeof v); }
#define MXQ_F(m) x.m + y.m
MXQ_INLINE V add(V x, V y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) x.m - y.m
MXQ_INLINE V sub(V x, V y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) x.m * y.m
MXQ_INLINE V mul(V x, V y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
MXQ_INLINE V fma(V x, V y, V z) { return add(mul(x, y), z); }  // rounds twice: the old CPUs have no fused one
MXQ_INLINE V fnma(V x, V y, V z) { return sub(z, mul(x, y)); }
MXQ_INLINE float hsum(V v) {
  const F4 s = (v.a + v.b) + (v.c + v.d);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
MXQ_INLINE F4 half4(const uint16_t* h) {
  const U4 u = {h[0], h[1], h[2], h[3]}, sign = (u & 0x8000) << 16, magnitude = (u & 0x7fff) << 13;
  const U4 small = (U4)((F4)magnitude * 0x1p112f);  // moves the exponent; exact for subnormals too
  const U4 special = (U4)(magnitude >= 0x0f800000u) & 0x7f800000u;  // infinity and NaN
  return (F4)(sign | small | special);
}
MXQ_INLINE V load_half(const void* p) { const uint16_t* h = (const uint16_t*)p; return {half4(h), half4(h + 4), half4(h + 8), half4(h + 12)}; }
MXQ_INLINE F4 bf16x4(const uint16_t* h) { const U4 u = {h[0], h[1], h[2], h[3]}; return (F4)(u << 16); }
MXQ_INLINE V load_bf16(const void* p) { const uint16_t* h = (const uint16_t*)p; return {bf16x4(h), bf16x4(h + 4), bf16x4(h + 8), bf16x4(h + 12)}; }
MXQ_INLINE F4 to_float(S4 s) { return __builtin_convertvector(s, F4); }
MXQ_INLINE F4 s8x4(const int8_t* p) { const S4 s = {p[0], p[1], p[2], p[3]}; return to_float(s); }
MXQ_INLINE V load_s8(const void* p) { const int8_t* q = (const int8_t*)p; return {s8x4(q), s8x4(q + 4), s8x4(q + 8), s8x4(q + 12)}; }
MXQ_INLINE void store_half(void* p, V v) {
  float f[16];
  store(f, v);
  for (int i = 0; i < 16; i++) ((uint16_t*)p)[i] = float_to_half(f[i]);
}
MXQ_INLINE void store_bf16(void* p, V v) {
  float f[16];
  store(f, v);
  for (int i = 0; i < 16; i++) ((uint16_t*)p)[i] = float_to_bf16(f[i]);
}
MXQ_INLINE W load_words(const void* p) { return read<W>(p); }
#define MXQ_F(m) w.m >> (uint32_t)s
MXQ_INLINE W shift_by(W w, int s) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
template <int S>
MXQ_INLINE W shift(W w) { return shift_by(w, S); }
MXQ_INLINE F4 lookup4(const Book& book, U4 u) { return F4{book.v[u[0] & 15], book.v[u[1] & 15], book.v[u[2] & 15], book.v[u[3] & 15]}; }
#define MXQ_F(m) lookup4(book, w.m)
template <int BITS>
MXQ_INLINE V lookup(const Book& book, W w) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) to_float((S4)(w.m << (32 - BITS - S)) >> (32 - BITS))
template <int BITS, int S>
MXQ_INLINE V centred(const Book&, W w) { return MXQ_EACH(MXQ_F); }  // shifts instead of a table: those are vectors
#undef MXQ_F

struct Bytes { int8_t v[16]; };
static constexpr bool VNNI = false;
MXQ_INLINE W ints(int32_t v) { const uint32_t w = (uint32_t)v; const U4 u = {w, w, w, w}; return {u, u, u, u}; }
#define MXQ_F(m) x.m + y.m
MXQ_INLINE W iadd(W x, W y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) x.m ^ y.m
MXQ_INLINE W ixor(W x, W y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) (U4)((S4)w.m >> S)
template <int S>
MXQ_INLINE W sra(W w) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) to_float((S4)w.m)
MXQ_INLINE V to_float(W w) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
static constexpr bool TERNARY = false;
#define MXQ_F(m) (w.m & MASK) ^ FLIP
template <uint32_t MASK, uint32_t FLIP>
MXQ_INLINE W field(W w) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) (x.m & 0x03030303u) | ((FLIP ? ~y.m : y.m) & 0x04040404u)
template <bool FLIP>
MXQ_INLINE W merge3(W x, W y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
#define MXQ_F(m) (x.m & ~MASK) | (y.m & MASK)
template <uint32_t MASK>
MXQ_INLINE W merge(W x, W y) { return MXQ_EACH(MXQ_F); }
#undef MXQ_F
MXQ_INLINE void pin(W&) {}
MXQ_INLINE Bytes load_bytes(const void* p) { return read<Bytes>(p); }
MXQ_INLINE void store_words(void* p, W w) { memcpy(p, &w, sizeof w); }
MXQ_INLINE Bytes reordered(Bytes t, Bytes index) {
  Bytes r;
  for (int i = 0; i < 16; i++) r.v[i] = t.v[index.v[i] & 15];
  return r;
}
MXQ_INLINE W lookup_bytes(Bytes t, W index) {
  uint8_t i[64];
  store_words(i, index);
  for (int k = 0; k < 64; k++) i[k] = (uint8_t)t.v[i[k] & 15];
  return load_words(i);
}
template <class T>
MXQ_INLINE W dot_bytes(W acc, W w, W x) {
  T a[64];
  int8_t b[64];
  uint32_t sums[16];
  memcpy(a, &w, 64), memcpy(b, &x, 64), memcpy(sums, &acc, 64);
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 4; k++) sums[i] += (uint32_t)(a[4 * i + k] * b[4 * i + k]);
  return load_words(sums);
}
MXQ_INLINE W dot(W acc, W u, W x) { return dot_bytes<uint8_t>(acc, u, x); }
MXQ_INLINE W dot_signed(W acc, W s, W x) { return dot_bytes<int8_t>(acc, s, x); }
template <class I>
MXQ_INLINE V gather(const float* x, const I* index) {
  float out[16];
  for (int l = 0; l < 16; l++) out[l] = x[index[l]];
  return load(out);
}
MXQ_INLINE W max_bits(W most, V v) {
  uint32_t a[16], b[16];
  memcpy(a, &most, 64), memcpy(b, &v, 64);
  for (int i = 0; i < 16; i++) a[i] = (b[i] & 0x7fffffff) > a[i] ? b[i] & 0x7fffffff : a[i];
  return load_words(a);
}
MXQ_INLINE W round_to_ints(V v) {  // |v| < 2^22: the adder rounds to even at 1. A NaN gives any number
  float f[16];
  int32_t out[16];
  store(f, v);
  for (int i = 0; i < 16; i++) {
    volatile float moved = f[i] + 12582912.0f;
    out[i] = (int32_t)float_to_bits(moved) - (int32_t)0x4b400000;
  }
  return load_words(out);
}
MXQ_INLINE void transpose(V* r) {
  float t[16][16], u[16][16];
  memcpy(t, r, sizeof t);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) u[i][j] = t[j][i];
  memcpy(r, u, sizeof u);
}
#undef MXQ_EACH
#endif

MXQ_INLINE Book make_book(V v) {
  Book book;
  static_assert(sizeof book == sizeof v, "a table is one vector");
  memcpy(&book, &v, sizeof book);
  return book;
}
#if !defined(MXQ_AVX512)
static constexpr bool PAIRS = false;
MXQ_INLINE Book upper_code(const Book& book) { return book; }  // not used
#endif
#if !defined(MXQ_AVX512) && !defined(MXQ_AVX2)
MXQ_INLINE uint32_t max_lane(W w) {
  uint32_t u[16], most = 0;
  store_words(u, w);
  for (int i = 0; i < 16; i++) most = u[i] > most ? u[i] : most;
  return most;
}
MXQ_INLINE int32_t sum_lanes(W w) {
  int32_t v[16], sum = 0;
  store_words(v, w);
  for (int i = 0; i < 16; i++) sum += v[i];
  return sum;
}
MXQ_INLINE void store_s8(int8_t* p, W w) {
  int32_t v[16];
  store_words(v, w);
  for (int i = 0; i < 16; i++) p[i] = (int8_t)v[i];
}
#endif
MXQ_INLINE V as_floats(W w) { V v; memcpy(&v, &w, sizeof v); return v; }
MXQ_INLINE W as_words(V v) { W w; memcpy(&w, &v, sizeof w); return w; }
// Four bytes in every lane.
MXQ_INLINE W four_bytes(const int8_t* p) { int32_t v; memcpy(&v, p, 4); return ints(v); }
#if !defined(MXQ_VNNI)
MXQ_INLINE W dot_four(W acc, W u, const int8_t* x) { return dot(acc, u, four_bytes(x)); }
#endif
// sum += u * x as dot() does, of the Q-th of RUN quads that follow one another. Where products come out as 16 bits they are added up in `part` as
// such, and widened once a run: u * x of a run's 2 RUN bytes to a lane must fit 16 bits. SHORT: the target does so. (AVX-512 without VNNI could,
// too; there was no such processor to measure it on.)
#if defined(MXQ_AVX2)
static constexpr bool SHORT = true;
template <int RUN, int Q>
MXQ_INLINE void dot_run(W& sum, W& part, W u, W x) {
  part = Q % RUN == 0 ? short_products(u, x) : add_short(part, short_products(u, x));
  if constexpr (Q % RUN == RUN - 1) sum = widen(sum, part);
}
#else
static constexpr bool SHORT = false;
template <int RUN, int Q>
MXQ_INLINE void dot_run(W& sum, W&, W u, W x) { sum = dot(sum, u, x); }
#endif
// Sums of one row whose lanes are added up in the end: where a vector is a pair, half of one is enough.
#if defined(MXQ_AVX2)
typedef __m256i RowInts;
typedef __m256 RowFloats;
MXQ_INLINE RowFloats row_floats() { return _mm256_setzero_ps(); }
MXQ_INLINE RowFloats row_fma(RowInts d, float unit, RowFloats total) { return _mm256_fmadd_ps(_mm256_cvtepi32_ps(d), _mm256_set1_ps(unit), total); }
MXQ_INLINE V as_vector(RowFloats f) { return {f, _mm256_setzero_ps()}; }
#else
typedef W RowInts;
typedef V RowFloats;
MXQ_INLINE RowFloats row_floats() { return zero(); }
MXQ_INLINE RowFloats row_fma(RowInts d, float unit, RowFloats total) { return fma(to_float(d), set1(unit), total); }
MXQ_INLINE V as_vector(RowFloats f) { return f; }
#endif
// APART: weights of 8 bits are multiplied with the magnitudes of x, and take the signs of x by an exclusive or. w ^ -1 is -w - 1, so that a sum lacks the
// magnitudes of negative x, which are the same for all rows of the weight. Moving the signs of one factor to the other (vpsignb, vpabsb) would be exact by
// itself, but keeps the two ports busy that multiply: 2.42 x 32 products a ns at most on Zen 3, instead of 2.85 x 32.
// Of x, 32 bytes of magnitudes and 32 of signs lie in turns; a sign is -1 or 0, less 128, and the weight's byte its value plus 128.
// STRIPED: stripes of 32 columns of the rows of a block lie side by side, so that a kernel knows their distance: an address of its own for each row is an
// operation more where four are all that there is to do, and rows a power of two apart would share few lines of L1.
#if defined(MXQ_AVX2)
static constexpr bool APART = true, STRIPED = true;
static constexpr int64_t APART_BYTES = 32;
// acc += u times x, whose magnitudes x points to: four, the same for all lanes, or a byte for each byte of u; acc = if it is the FIRST.
MXQ_INLINE W dot_apart_four(W acc, W u, const int8_t* x) {
  return widen(acc, short_products(four_bytes(x), ixor(u, four_bytes(x + APART_BYTES))));
}
template <int FIRST>
MXQ_INLINE void dot_apart(RowInts& acc, W u, const int8_t* x, int64_t step) {
  const auto at = [&](int64_t i) MXQ_LAMBDA { return _mm256_loadu_si256((const __m256i*)(x + i)); };
  const __m256i one = _mm256_set1_epi16(1);
  const W s = short_products({at(0), at(step)}, ixor(u, {at(APART_BYTES), at(step + APART_BYTES)}));
  const __m256i a = _mm256_madd_epi16(s.a, one), b = _mm256_madd_epi16(s.b, one);
  if constexpr (FIRST) acc = _mm256_add_epi32(a, b);
  else __asm__("vpaddd %1, %0, %0\n\tvpaddd %2, %0, %0" : "+x"(acc) : "x"(a), "x"(b));
}
// Writes `width` bytes of x, a multiple of 32, in that manner, `step` bytes from stripe to stripe; returns the sum of the magnitudes.
MXQ_INLINE int32_t split_signs(const int8_t* x, int64_t width, int8_t* out, int64_t step) {
  const __m256i none = _mm256_setzero_si256(), top = _mm256_set1_epi8(-128);
  __m256i sum = none;
  for (int64_t i = 0; i < width; i += APART_BYTES, out += step) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)(x + i)), magnitude = _mm256_abs_epi8(v);
    _mm256_storeu_si256((__m256i*)out, magnitude);
    _mm256_storeu_si256((__m256i*)(out + APART_BYTES), _mm256_xor_si256(_mm256_cmpgt_epi8(none, v), top));
    sum = _mm256_add_epi64(sum, _mm256_sad_epu8(magnitude, none));
  }
  return sum_lanes({sum, none});
}
MXQ_INLINE W dot_signed(W acc, W, W) { return acc; }  // not used
#else
static constexpr bool APART = false, STRIPED = false;
MXQ_INLINE W dot_apart_four(W acc, W, const int8_t*) { return acc; }  // not used
template <int FIRST>
MXQ_INLINE void dot_apart(RowInts&, W, const int8_t*, int64_t) {}
MXQ_INLINE int32_t split_signs(const int8_t*, int64_t, int8_t*, int64_t) { return 0; }
#endif
MXQ_INLINE V load_scale(const void* p, bool bf16) { return bf16 ? load_bf16(p) : load_half(p); }
MXQ_INLINE V load_any(const void* p, int64_t i, int type) {
  return type == F32 ? load((const float*)p + i) : type == BF16 ? load_bf16((const uint16_t*)p + i) : load_half((const uint16_t*)p + i);
}
MXQ_INLINE void store_any(void* p, int64_t i, int type, V v) {
  if (type == F32) store((float*)p + i, v);
  else if (type == BF16) store_bf16((uint16_t*)p + i, v);
  else store_half((uint16_t*)p + i, v);
}

}  // namespace MXQ_TARGET
}  // namespace mxq
