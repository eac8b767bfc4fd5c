// Self-test of the executors: c = a b^T in fp16 with cp.async in two stages, swizzled shared tiles, ldmatrix and mma.
#include "ptx.cuh"

namespace {

using namespace mxq;

constexpr int BM = 32, BN = 32, BK = 32, THREADS = 64;  // two warps, each 16 rows of c by 32 columns

// Halves of a [rows, 32] tile: 16-byte chunks, permuted so that eight rows of one column lie in different banks.
__device__ __forceinline__ int place(int row, int chunk) { return row * BK + ((chunk ^ (row >> 1 & 3)) * 8); }

__device__ __forceinline__ void fetch(uint16_t* tile, const uint16_t* from, int row0, int rows, int k0, int k) {
  for (int i = threadIdx.x; i < 32 * 4; i += THREADS) {
    const int row = i / 4, chunk = i % 4;
    const bool in = row0 + row < rows && k0 + 8 * chunk < k;
    ptx::cp_async_16(tile + place(row, chunk), in ? from + static_cast<size_t>(row0 + row) * k + k0 + 8 * chunk : from, in ? 16 : 0);
  }
}

// a [m, k], b [n, k], c [m, n] in float; k a multiple of 8, the rest any.
extern "C" __global__ void __launch_bounds__(THREADS) gemm_f16(const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k) {
  MXQ_DYN_SMEM(uint16_t, tiles);  // [2 stages][a, b][32 * 32]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row0 = blockIdx.y * BM, col0 = blockIdx.x * BN;
  float acc[4][4] = {};
  const int steps = (k + BK - 1) / BK;
  fetch(tiles, a, row0, m, 0, k);
  fetch(tiles + BM * BK, b, col0, n, 0, k);
  ptx::cp_async_commit();
  for (int step = 0; step < steps; step++) {
    uint16_t* const now = tiles + (step & 1) * (BM + BN) * BK;
    uint16_t* const next = tiles + (~step & 1) * (BM + BN) * BK;
    if (step + 1 < steps) {
      fetch(next, a, row0, m, (step + 1) * BK, k);
      fetch(next + BM * BK, b, col0, n, (step + 1) * BK, k);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();  // MARK: wait
    __syncthreads();  // MARK: filled
#pragma unroll
    for (int kk = 0; kk < BK / 16; kk++) {
      uint32_t left[4];
      ptx::ldmatrix_x4(left, now + place(16 * warp + (lane & 15), 2 * kk + (lane >> 4)));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint32_t right[2];
        ptx::ldmatrix_x2(right, now + BM * BK + place(8 * j + (lane & 7), 2 * kk + (lane >> 3 & 1)));
        ptx::mma_m16n8k16_f16(acc[j], left, right, acc[j]);
      }
    }
    __syncthreads();  // MARK: refill
  }
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < 4; i++) {
      const int row = row0 + 16 * warp + lane / 4 + 8 * (i / 2), col = col0 + 8 * j + 2 * (lane % 4) + i % 2;
      if (row < m && col < n) c[static_cast<size_t>(row) * n + col] = acc[j][i];
    }
}

}  // namespace

extern "C" int run_gemm_f16(const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k) {
  const int bytes = 2 * (BM + BN) * BK * sizeof(uint16_t);
  return MXQ_LAUNCH(gemm_f16, dim3((n + BN - 1) / BN, (m + BM - 1) / BM), dim3(THREADS), bytes, nullptr, a, b, c, m, n, k);
}
