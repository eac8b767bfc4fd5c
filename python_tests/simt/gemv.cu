// Self-test of the executors: y = W x by one warp a row, with shuffles, shared memory and a ticket.
#include "ptx.cuh"

namespace {

constexpr int WARPS = 4;

// int4 codes with groups of 64 along k; row-major words of eight codes. One row a block, its k split over the warps.
extern "C" __global__ void gemv_w4(const uint32_t* codes, const uint16_t* scales, const float* x, float* y, int k) {
  MXQ_SHARED(float, sums, WARPS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = blockIdx.x;
  float sum = 0.0f;
  for (int word = threadIdx.x; word < k / 8; word += blockDim.x) {
    const uint32_t w = mxq::ptx::ld_global_nc_4(codes + static_cast<size_t>(row) * (k / 8) + word);
    const float scale = mxq::ptx::half_to_float(scales[row * (k / 64) + word / 8]);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += scale * (static_cast<float>(w >> (4 * i) & 15) - 8.0f) * x[8 * word + i];
  }
#pragma unroll
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();  // MARK: sums
  if (threadIdx.x == 0) {
    float all = 0.0f;
    for (int i = 0; i < WARPS; i++) all += sums[i];
    y[row] = all;
  }
}

// Sum of x over all blocks in a fixed order: each leaves a part, and the last one to draw a ticket adds them and resets the ticket.
extern "C" __global__ void sum_parts(const float* x, float* parts, unsigned* ticket, float* out, int n) {
  MXQ_SHARED(float, mine, 64);
  MXQ_SHARED(unsigned, place, 1);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  mine[threadIdx.x] = i < n ? x[i] : 0.0f;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int j = 0; j < static_cast<int>(blockDim.x); j++) sum += mine[j];
    parts[blockIdx.x] = sum;
    __threadfence();  // MARK: publish
    place[0] = atomicInc(ticket, gridDim.x - 1);
    __threadfence();
  }
  __syncthreads();
  if (place[0] == gridDim.x - 1 && threadIdx.x == 0) {
    float sum = 0.0f;
    for (unsigned b = 0; b < gridDim.x; b++) sum += parts[b];
    out[0] = sum;
  }
}

}  // namespace

extern "C" int run_gemv_w4(const uint32_t* codes, const uint16_t* scales, const float* x, float* y, int n, int k) {
  return MXQ_LAUNCH(gemv_w4, dim3(n), dim3(32 * WARPS), 0, nullptr, codes, scales, x, y, k);
}

extern "C" int run_sum_parts(const float* x, float* parts, unsigned* ticket, float* out, int n) {
  return MXQ_LAUNCH(sum_parts, dim3((n + 63) / 64), dim3(64), 0, nullptr, x, parts, ticket, out, n);
}
