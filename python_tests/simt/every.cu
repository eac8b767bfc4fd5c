// Self-test of the executors: every function of ptx.cuh, on data that the test chooses.
#include "ptx.cuh"

namespace {

using namespace mxq;

constexpr int ROWS = 24;  // of results in words()

// One word a thread: out[row][i] = the row's function of a[i], b[i], c[i].
extern "C" __global__ void words(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  ptx::grid_dependency_wait();
  if (i < n) {
    ptx::prefetch_l2(a + i);  // changes nothing
    const uint32_t x = a[i], y = b[i], z = c[i];
    const float f = __uint_as_float(x), g = __uint_as_float(y);
    const float2 halves = ptx::half2_to_floats(x), bf16s = ptx::bf162_to_floats(x);
    const uint32_t result[ROWS] = {
        ptx::lop3<0xea>(x, y, z), ptx::lop3<0x6a>(x, y, z), ptx::lop3<0x01>(x, y, z), ptx::prmt(x, y, z), ptx::prmt(x, y, 0x5140),
        static_cast<uint32_t>(ptx::dp4a(x, y, static_cast<int32_t>(z))), static_cast<uint32_t>(ptx::dp4a_us(x, y, static_cast<int32_t>(z))),
        ptx::hfma2(x, y, z), ptx::hadd2(x, y), ptx::hsub2(x, y), ptx::hmul2(x, y),
        __float_as_uint(ptx::half_to_float(static_cast<uint16_t>(x))), ptx::float_to_half(f), __float_as_uint(ptx::bf16_to_float(static_cast<uint16_t>(x))),
        ptx::float_to_bf16(f), __float_as_uint(halves.x), __float_as_uint(halves.y), __float_as_uint(bf16s.x), __float_as_uint(bf16s.y),
        ptx::floats_to_half2(f, g), ptx::floats_to_bf162(f, g), __float_as_uint(ptx::exp2_approx(static_cast<float>(x & 0xffff) / 512.0f - 64.0f)),
        __funnelshift_r(x, y, z), static_cast<uint32_t>(__float2int_rn(f))};
#pragma unroll
    for (int row = 0; row < ROWS; row++) out[row * n + i] = result[row];
  }
  ptx::grid_dependency_launch();
}

// Packed bf16, which sm_75 does not have: out[4][n].
extern "C" __global__ void bf16_words(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[i] = ptx::hfma2_bf16(a[i], b[i], c[i]);
  out[n + i] = ptx::hadd2_bf16(a[i], b[i]);
  out[2 * n + i] = ptx::hsub2_bf16(a[i], b[i]);
  out[3 * n + i] = ptx::hmul2_bf16(a[i], b[i]);
}

// One warp. a [16, K], b [8, K], c [16, 8] by rows; out [16, 8] = a b^T + c. `words` are 32 bits of a row.
template <int A, int B, class T, class F>
__device__ __forceinline__ void product(const uint32_t* a, const uint32_t* b, const T* c, T* out, F&& multiply) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4, row_words = 4 * B;
  uint32_t left[A], right[B];
  T from[4], to[4];
  for (int i = 0; i < A; i++) left[i] = a[(g + 8 * (i % 2)) * row_words + t + 4 * (i / 2)];
  for (int i = 0; i < B; i++) right[i] = b[g * row_words + t + 4 * i];
  for (int i = 0; i < 4; i++) from[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  multiply(to, left, right, from);
  for (int i = 0; i < 4; i++) out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = to[i];
}

extern "C" __global__ void half_k8(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  product<2, 1, float>(a, b, c, out, [](float(&d)[4], const uint32_t(&x)[2], const uint32_t(&y)[1], const float(&z)[4]) { ptx::mma_m16n8k8_f16(d, x, y[0], z); });
}
extern "C" __global__ void half_k16(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  product<4, 2, float>(a, b, c, out, [](float(&d)[4], const uint32_t(&x)[4], const uint32_t(&y)[2], const float(&z)[4]) { ptx::mma_m16n8k16_f16(d, x, y, z); });
}
extern "C" __global__ void bf16_k16(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  product<4, 2, float>(a, b, c, out, [](float(&d)[4], const uint32_t(&x)[4], const uint32_t(&y)[2], const float(&z)[4]) { ptx::mma_m16n8k16_bf16(d, x, y, z); });
}
extern "C" __global__ void byte_k32(const uint32_t* a, const uint32_t* b, const int32_t* c, int32_t* out) {
  product<4, 2, int32_t>(a, b, c, out, [](int32_t(&d)[4], const uint32_t(&x)[4], const uint32_t(&y)[2], const int32_t(&z)[4]) { ptx::mma_m16n8k32_s8(d, x, y, z); });
}

// One warp: copies 4 matrices of [8, 8] halves into shared memory with all sizes of cp.async, the last row cut to `take` bytes, and reads them with all
// forms of ldmatrix. out [14][32] words: x1, x2, x4, and the same transposed.
extern "C" __global__ void matrices(const uint16_t* in, uint32_t* out, int take) {
  MXQ_SHARED(uint16_t, tile, 4 * 64);
  const int lane = threadIdx.x;
  const unsigned char* const from = reinterpret_cast<const unsigned char*>(in);
  unsigned char* const to = reinterpret_cast<unsigned char*>(tile);
  const int last = lane == 31 ? take : 16;
  if (lane % 3 == 0) {
    ptx::cp_async_16(to + 16 * lane, from + 16 * lane, last);
  } else if (lane % 3 == 1) {
    for (int i = 0; i < 16; i += 8) ptx::cp_async_8(to + 16 * lane + i, from + 16 * lane + i, min(max(last - i, 0), 8));
  } else {
    for (int i = 0; i < 16; i += 4) ptx::cp_async_4(to + 16 * lane + i, from + 16 * lane + i, min(max(last - i, 0), 4));
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  uint32_t one[1], two[2], four[4];
  const uint16_t* const row = tile + 8 * lane;
  uint32_t* o = out + lane;
  const auto put = [&](const uint32_t* d, int n) {
    for (int i = 0; i < n; i++, o += 32) *o = d[i];
  };
  ptx::ldmatrix_x1(one, row);
  put(one, 1);
  ptx::ldmatrix_x2(two, row);
  put(two, 2);
  ptx::ldmatrix_x4(four, row);
  put(four, 4);
  ptx::ldmatrix_x1_trans(one, row);
  put(one, 1);
  ptx::ldmatrix_x2_trans(two, row);
  put(two, 2);
  ptx::ldmatrix_x4_trans(four, row);
  put(four, 4);
}

// out [n][7]: what loads of three sizes read at [i].
extern "C" __global__ void loads(const uint32_t* in4, const uint2* in8, const uint4* in16, uint32_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint32_t a = ptx::ld_global_nc_4(in4 + i);
  const uint2 b = ptx::ld_global_nc_8(in8 + i);
  const uint4 c = ptx::ld_global_nc_16(in16 + i);
  const uint32_t all[7] = {a, b.x, b.y, c.x, c.y, c.z, c.w};
  for (int j = 0; j < 7; j++) out[7 * i + j] = all[j];
}

// What a warp and a block can tell each other: out [10][threads] words; 64 threads.
extern "C" __global__ void talk(const uint32_t* in, uint32_t* out, unsigned* cells) {
  const int i = threadIdx.x, lane = i & 31, n = blockDim.x;
  const uint32_t x = in[i];
  out[i] = __shfl_sync(0xffffffffu, x, x & 31);
  out[n + i] = __shfl_xor_sync(0xffffffffu, x, 5);
  out[2 * n + i] = __shfl_up_sync(0xffffffffu, x, 3, 16);
  out[3 * n + i] = __shfl_down_sync(0xffffffffu, x, 7, 8);
  out[4 * n + i] = __ballot_sync(0xffffffffu, x & 1);
  out[5 * n + i] = __any_sync(0xffffffffu, x > 0xf0000000u) + 2 * __all_sync(0xffffffffu, x < 0xf0000000u);
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;  // the halves of the warp, each on its own
  if (lane < 16) out[6 * n + i] = __shfl_xor_sync(half, x, 1);
  else out[6 * n + i] = __shfl_xor_sync(half, x, 2);
  __syncwarp();
  out[7 * n + i] = static_cast<uint32_t>(__syncthreads_count(x & 1));
  out[8 * n + i] = __syncthreads_or(x > 0xfff00000u) + 2 * __syncthreads_and(x > 0x00100000u);
  out[9 * n + i] = __popc(x) + 100 * __clz(static_cast<int>(x)) + 10000 * (__brev(x) >> 27);
  atomicAdd(cells, x & 0xff);
  atomicMax(cells + 1, x);
  atomicOr(cells + 2, x);
  atomicAdd(reinterpret_cast<float*>(cells) + 3, static_cast<float>(x & 0xff));
}

// Lanes that go different ways: loops of different lengths, a switch, an array that is indexed at run time. out[i] for in[i].
extern "C" __global__ void wander(const uint32_t* in, uint32_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  uint32_t history[8] = {};
  uint32_t sum = 0;
  if (i < n) {
    uint32_t x = in[i];
    for (int step = 0; step < 40 && x != 1; step++) {
      switch (x % 7) {
        case 0: x = x / 7 + 3; break;
        case 1: x = x * 5 + 1; break;
        case 2: x ^= history[x % 8]; break;
        case 3: x += __umulhi(x, 0x9e3779b9u); break;
        case 4: x -= static_cast<uint32_t>(static_cast<int32_t>(x) / 3); break;
        case 5: x = x << (step & 7) | x >> 25; break;
        default: x = static_cast<uint32_t>(static_cast<int64_t>(static_cast<int32_t>(x)) * 1234567 >> 11);
      }
      history[step % 8] = x;
      if (x % 11 == 5) continue;
      sum += x;
      if (x % 13 == 7) break;
    }
    for (int j = 0; j < 8; j++) sum = sum * 31 + history[j];
  }
  if (i < n) out[i] = sum;
}

// A template in an unnamed namespace, whose name nvcc and g++ mangle differently.
template <int FACTOR>
__global__ void scale(const uint32_t* in, uint32_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = FACTOR * in[i];
}

}  // namespace

extern "C" int run_words(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  return MXQ_LAUNCH_EARLY(true, words, (n + 63) / 64, 64, 0, nullptr, a, b, c, out, n);
}
extern "C" int run_bf16_words(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  return MXQ_LAUNCH(bf16_words, (n + 63) / 64, 64, 0, nullptr, a, b, c, out, n);
}
extern "C" int run_half_k8(const uint32_t* a, const uint32_t* b, const float* c, float* out) { return MXQ_LAUNCH(half_k8, 1, 32, 0, nullptr, a, b, c, out); }
extern "C" int run_half_k16(const uint32_t* a, const uint32_t* b, const float* c, float* out) { return MXQ_LAUNCH(half_k16, 1, 32, 0, nullptr, a, b, c, out); }
extern "C" int run_bf16_k16(const uint32_t* a, const uint32_t* b, const float* c, float* out) { return MXQ_LAUNCH(bf16_k16, 1, 32, 0, nullptr, a, b, c, out); }
extern "C" int run_byte_k32(const uint32_t* a, const uint32_t* b, const int32_t* c, int32_t* out) { return MXQ_LAUNCH(byte_k32, 1, 32, 0, nullptr, a, b, c, out); }
extern "C" int run_matrices(const uint16_t* in, uint32_t* out, int take) { return MXQ_LAUNCH(matrices, 1, 32, 0, nullptr, in, out, take); }
extern "C" int run_loads(const uint32_t* in4, const uint2* in8, const uint4* in16, uint32_t* out, int n) {
  return MXQ_LAUNCH(loads, (n + 63) / 64, 64, 0, nullptr, in4, in8, in16, out, n);
}
extern "C" int run_talk(const uint32_t* in, uint32_t* out, unsigned* cells) { return MXQ_LAUNCH(talk, 1, 64, 0, nullptr, in, out, cells); }
extern "C" int run_wander(const uint32_t* in, uint32_t* out, int n) { return MXQ_LAUNCH(wander, (n + 63) / 64, 64, 0, nullptr, in, out, n); }
extern "C" int run_scale(const uint32_t* in, uint32_t* out, int n, int factor) {
  return factor == 3 ? MXQ_LAUNCH((scale<3>), (n + 63) / 64, 64, 0, nullptr, in, out, n) : MXQ_LAUNCH((scale<5>), (n + 63) / 64, 64, 0, nullptr, in, out, n);
}
