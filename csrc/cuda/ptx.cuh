// Every PTX instruction that the kernels use, as one named function with two bodies: the instruction for nvcc, and plain C++ for the executor
// that runs kernels on the CPU (docs/cuda-testing.md). `asm` and `__CUDA_ARCH__` occur in no other file of csrc/cuda, and a test holds that:
// the CPU executor sees the C++ bodies only, the PTX interpreter checks the instructions, so both need them in one place.
//
// Packed numbers are plain words: two fp16 or bf16 in a uint32_t, the first in the low half. Arguments of memory operations are ordinary
// pointers. A function with `.sync` in it must be called by all 32 lanes of a warp.
#pragma once

#include "simt.hpp"

#if defined(MXQ_SIMT)
#include "simt_numbers.hpp"
// Where the kernel called, for messages.
#define MXQ_SITE , SIMT_SITE
#define MXQ_PTX static inline
#else
#define MXQ_SITE
#define MXQ_PTX static __device__ __forceinline__
#endif
// The host pass of nvcc parses these bodies too, and takes the newer branch.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define MXQ_SM80 1
#else
#define MXQ_SM80 0
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MXQ_SM90 1
#else
#define MXQ_SM90 0
#endif

namespace mxq {
namespace ptx {

// ------------------------------------------------------------------------------------------------------------------ matrix products
//
// d = a * b + c on the tensor cores; a lane holds, with g = lane / 4, t = lane % 4 and P = elements in a word (2 for fp16, 4 for int8):
//   a[i]  rows g + 8 * (i % 2), columns k = P * t .. P * t + P - 1, plus 4 * P for i >= 2
//   b[i]  column g,             rows    k = P * t .. P * t + P - 1, plus 4 * P for i = 1
//   c[i]  row g + 8 * (i / 2),  column  2 * t + i % 2
// d may be c. Products are exact; the hardware adds them with a truncated alignment, the C++ body in double: compare with a tolerance.

// [16, 8] fp16 by [8, 8] fp16, all there is on sm_75.
MXQ_PTX void mma_m16n8k8_f16(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4] MXQ_SITE) {
#if defined(MXQ_SIMT)
  const uint32_t one[1] = {b};
  simt::mma<2, 2, 1, double>("mma_m16n8k8_f16", d, a, one, c, SIMT_HERE, simt::half_of_word);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

// [16, 16] fp16 by [16, 8] fp16. On sm_75 two products of half the depth.
MXQ_PTX void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4] MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::mma<4, 2, 2, double>("mma_m16n8k16_f16", d, a, b, c, SIMT_HERE, simt::half_of_word);
#elif MXQ_SM80
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  const uint32_t first[2] = {a[0], a[1]}, second[2] = {a[2], a[3]};
  mma_m16n8k8_f16(d, first, b[0], c);
  mma_m16n8k8_f16(d, second, b[1], d);
#endif
}

// [16, 16] bf16 by [16, 8] bf16. sm_75 has none: its kernels convert to fp16, and a call there ends the launch.
MXQ_PTX void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4] MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::mma<4, 2, 2, double>("mma_m16n8k16_bf16", d, a, b, c, SIMT_HERE, simt::bf16_of_word);
#elif MXQ_SM80
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  d[0] = d[1] = d[2] = d[3] = c[0] + c[1] + c[2] + c[3] + __uint_as_float(a[0] + a[1] + a[2] + a[3] + b[0] + b[1]);
  asm volatile("trap;");
#endif
}

// [16, 32] int8 by [32, 8] int8 into int32, which wraps. On sm_75 four products of a quarter.
MXQ_PTX void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4] MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::mma<4, 4, 2, int64_t>("mma_m16n8k32_s8", d, a, b, c, SIMT_HERE, simt::byte_of_word);
#elif MXQ_SM80
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
#pragma unroll
  for (int half = 0; half < 2; half++) {  // rows g, then rows g + 8
    int32_t x = c[2 * half], y = c[2 * half + 1];
#pragma unroll
    for (int i = 0; i < 2; i++)
      asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(x), "+r"(y) : "r"(a[2 * i + half]), "r"(b[i]));
    d[2 * half] = x;
    d[2 * half + 1] = y;
  }
#endif
}

// ------------------------------------------------------------------------------------------------------------------ shared memory

#if !defined(MXQ_SIMT)
MXQ_PTX uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// N matrices of [8, 8] 16-bit elements. Lane 8 * i + r passes the address of row r of matrix i, 16 bytes, aligned to 16; the other lanes pass any
// valid address. d[i] = row lane / 4, columns 2 * (lane % 4) and the next of matrix i; of its transpose for _trans. Only memory of the block that a
// barrier made visible may be read: the instruction itself orders nothing.
MXQ_PTX void ldmatrix_x1(uint32_t (&d)[1], const void* row MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::ldmatrix<1, false>("ldmatrix_x1", d, row, SIMT_HERE);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(shared_address(row)) : "memory");
#endif
}
MXQ_PTX void ldmatrix_x2(uint32_t (&d)[2], const void* row MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::ldmatrix<2, false>("ldmatrix_x2", d, row, SIMT_HERE);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(shared_address(row)) : "memory");
#endif
}
MXQ_PTX void ldmatrix_x4(uint32_t (&d)[4], const void* row MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::ldmatrix<4, false>("ldmatrix_x4", d, row, SIMT_HERE);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}
MXQ_PTX void ldmatrix_x1_trans(uint32_t (&d)[1], const void* row MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::ldmatrix<1, true>("ldmatrix_x1_trans", d, row, SIMT_HERE);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(shared_address(row)) : "memory");
#endif
}
MXQ_PTX void ldmatrix_x2_trans(uint32_t (&d)[2], const void* row MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::ldmatrix<2, true>("ldmatrix_x2_trans", d, row, SIMT_HERE);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(shared_address(row)) : "memory");
#endif
}
MXQ_PTX void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::ldmatrix<4, true>("ldmatrix_x4_trans", d, row, SIMT_HERE);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// Copies 16, 8 or 4 bytes from global to shared memory in the background: the first `take` bytes, then zeros; take = 0 does not touch the source.
// Both addresses are multiples of the size. The bytes are there for this thread after cp_async_wait, for others after a barrier behind it.
// On sm_75 an ordinary copy, done at once; take is 0 or all there.
MXQ_PTX void cp_async_16(void* shared, const void* global, int take = 16 MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::cp_async("cp_async_16", shared, global, 16, take, SIMT_HERE);
#elif MXQ_SM80
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(take) : "memory");
#else
  *static_cast<uint4*>(shared) = take ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}
MXQ_PTX void cp_async_8(void* shared, const void* global, int take = 8 MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::cp_async("cp_async_8", shared, global, 8, take, SIMT_HERE);
#elif MXQ_SM80
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(take) : "memory");
#else
  *static_cast<uint2*>(shared) = take ? *static_cast<const uint2*>(global) : make_uint2(0, 0);
#endif
}
MXQ_PTX void cp_async_4(void* shared, const void* global, int take = 4 MXQ_SITE) {
#if defined(MXQ_SIMT)
  simt::cp_async("cp_async_4", shared, global, 4, take, SIMT_HERE);
#elif MXQ_SM80
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(take) : "memory");
#else
  *static_cast<uint32_t*>(shared) = take ? *static_cast<const uint32_t*>(global) : 0;
#endif
}
// Closes a group of copies, which may be empty.
MXQ_PTX void cp_async_commit() {
#if defined(MXQ_SIMT)
  simt::commit_group();
#elif MXQ_SM80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most the N youngest groups of this thread are on their way.
template <int N>
MXQ_PTX void cp_async_wait() {
#if defined(MXQ_SIMT)
  simt::cp_async_wait(N);
#elif MXQ_SM80
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ------------------------------------------------------------------------------------------------------------------ global memory

// Loads through the read-only path, without a place in L1: for weights, which each byte of is used once. The kernel must not write them.
MXQ_PTX uint32_t ld_global_nc_4(const void* p MXQ_SITE) {
#if defined(MXQ_SIMT)
  return simt::ld_global<uint32_t>("ld_global_nc_4", p, SIMT_HERE);
#else
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
#endif
}
MXQ_PTX uint2 ld_global_nc_8(const void* p MXQ_SITE) {
#if defined(MXQ_SIMT)
  return simt::ld_global<uint2>("ld_global_nc_8", p, SIMT_HERE);
#else
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
#endif
}
MXQ_PTX uint4 ld_global_nc_16(const void* p MXQ_SITE) {
#if defined(MXQ_SIMT)
  return simt::ld_global<uint4>("ld_global_nc_16", p, SIMT_HERE);
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
#endif
}

// Asks for the 128 bytes around an address to be brought to L2. Nothing is read, so it may be asked before what is there was written.
MXQ_PTX void prefetch_l2(const void* p) {
#if defined(MXQ_SIMT)
  (void)p;
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// ------------------------------------------------------------------------------------------------------------------ bits

// The bitwise function of three words whose table is LUT: evaluate it with a = 0xf0, b = 0xcc, c = 0xaa. (a & b) | c has 0xea.
template <int LUT>
MXQ_PTX uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#if defined(MXQ_SIMT)
  uint32_t r = 0;
  for (int i = 0; i < 8; i++)
    if (LUT >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
#else
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(LUT));
  return r;
#endif
}

// Byte i of the result is byte (sel >> 4 * i & 7) of the eight bytes a, then b; with bit 3 of the nibble set, eight copies of that byte's sign.
MXQ_PTX uint32_t prmt(uint32_t a, uint32_t b, uint32_t sel) {
#if defined(MXQ_SIMT)
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t nibble = sel >> (4 * i), byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 0xff;
    r |= (nibble & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
  }
  return r;
#else
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sel));
  return r;
#endif
}

// c + the products of four signed bytes of a with four signed bytes of b.
MXQ_PTX int32_t dp4a(uint32_t a, uint32_t b, int32_t c) {
#if defined(MXQ_SIMT)
  uint32_t r = static_cast<uint32_t>(c);
  for (int i = 0; i < 4; i++) r += static_cast<uint32_t>(simt::byte_of_word(a, i) * simt::byte_of_word(b, i));
  return static_cast<int32_t>(r);
#else
  int32_t r;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#endif
}
// The same with unsigned bytes in a.
MXQ_PTX int32_t dp4a_us(uint32_t a, uint32_t b, int32_t c) {
#if defined(MXQ_SIMT)
  uint32_t r = static_cast<uint32_t>(c);
  for (int i = 0; i < 4; i++) r += static_cast<uint32_t>(static_cast<int64_t>(a >> (8 * i) & 0xff) * simt::byte_of_word(b, i));
  return static_cast<int32_t>(r);
#else
  int32_t r;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#endif
}

// ------------------------------------------------------------------------------------------------------------------ packed arithmetic
//
// Two fp16 at a time, rounded to nearest once, subnormals kept, NaN becomes 0x7fff. `.rn` keeps the assembler from fusing a product with a sum.

MXQ_PTX uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {  // a * b + c
#if defined(MXQ_SIMT)
  return simt::fma2<simt::Half>(a, b, c);
#else
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#endif
}
MXQ_PTX uint32_t hadd2(uint32_t a, uint32_t b) {
#if defined(MXQ_SIMT)
  return simt::add2<simt::Half>(a, b);
#else
  uint32_t r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#endif
}
MXQ_PTX uint32_t hsub2(uint32_t a, uint32_t b) {
#if defined(MXQ_SIMT)
  return simt::add2<simt::Half>(a, b ^ 0x80008000u);
#else
  uint32_t r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#endif
}
MXQ_PTX uint32_t hmul2(uint32_t a, uint32_t b) {
#if defined(MXQ_SIMT)
  return simt::mul2<simt::Half>(a, b);
#else
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#endif
}

// Two bf16 at a time. sm_80 has the fused form alone, which gives sums (b = 1) and products (c = -0) with the same one rounding. sm_75 has none.
MXQ_PTX uint32_t hfma2_bf16(uint32_t a, uint32_t b, uint32_t c) {
#if defined(MXQ_SIMT)
  return simt::fma2<simt::Bf16>(a, b, c);
#elif MXQ_SM80
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#else
  asm volatile("trap;");
  return a + b + c;
#endif
}
MXQ_PTX uint32_t hadd2_bf16(uint32_t a, uint32_t b) {
#if defined(MXQ_SIMT)
  return simt::add2<simt::Bf16>(a, b);
#else
  return hfma2_bf16(a, 0x3f803f80u, b);
#endif
}
MXQ_PTX uint32_t hsub2_bf16(uint32_t a, uint32_t b) {
#if defined(MXQ_SIMT)
  return simt::add2<simt::Bf16>(a, b ^ 0x80008000u);
#else
  return hfma2_bf16(b, 0xbf80bf80u, a);
#endif
}
MXQ_PTX uint32_t hmul2_bf16(uint32_t a, uint32_t b) {
#if defined(MXQ_SIMT)
  return simt::mul2<simt::Bf16>(a, b);
#else
  return hfma2_bf16(a, b, 0x80008000u);
#endif
}

// ------------------------------------------------------------------------------------------------------------------ conversions
//
// To nearest, ties to even. bf16 is the upper half of a float, so reading one needs no instruction.

MXQ_PTX float half_to_float(uint16_t h) {
#if defined(MXQ_SIMT)
  return static_cast<float>(simt::Half::read(h));
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
#endif
}
MXQ_PTX uint16_t float_to_half(float f) {
#if defined(MXQ_SIMT)
  return simt::Half::round(f);
#else
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#endif
}
MXQ_PTX float bf16_to_float(uint16_t h) { return __uint_as_float(static_cast<uint32_t>(h) << 16); }
MXQ_PTX uint16_t float_to_bf16(float f) {
#if defined(MXQ_SIMT)
  return simt::Bf16::round(f);
#elif MXQ_SM80
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#else
  const uint32_t u = __float_as_uint(f);
  return f != f ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
#endif
}
// Two at a time: x in the low half.
MXQ_PTX float2 half2_to_floats(uint32_t h) {
  return make_float2(half_to_float(static_cast<uint16_t>(h)), half_to_float(static_cast<uint16_t>(h >> 16)));
}
MXQ_PTX float2 bf162_to_floats(uint32_t h) { return make_float2(__uint_as_float(h << 16), __uint_as_float(h & 0xffff0000u)); }
MXQ_PTX uint32_t floats_to_half2(float x, float y) {
#if defined(MXQ_SIMT) || !MXQ_SM80
  return float_to_half(x) | static_cast<uint32_t>(float_to_half(y)) << 16;
#else
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
  return r;
#endif
}
MXQ_PTX uint32_t floats_to_bf162(float x, float y) {
#if defined(MXQ_SIMT) || !MXQ_SM80
  return float_to_bf16(x) | static_cast<uint32_t>(float_to_bf16(y)) << 16;
#else
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
  return r;
#endif
}

// 2^x to about 2 units in the last place; subnormal results become 0 on a device, and stay what they are in the C++ body.
MXQ_PTX float exp2_approx(float x) {
#if defined(MXQ_SIMT)
  return exp2f(x);
#else
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#endif
}

// ------------------------------------------------------------------------------------------------------------------ dependent launches

// In a kernel launched early (MXQ_LAUNCH_EARLY): returns when the kernel ahead has ended and its writes are visible. Nothing below sm_90.
MXQ_PTX void grid_dependency_wait() {
#if !defined(MXQ_SIMT) && MXQ_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next such kernel start as soon as all blocks of this one have come here or ended.
MXQ_PTX void grid_dependency_launch() {
#if !defined(MXQ_SIMT) && MXQ_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ptx
}  // namespace mxq
