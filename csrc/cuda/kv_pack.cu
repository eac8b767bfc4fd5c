// Quantize-and-pack: 64 tokens of keys or values of every head become a page. The formulas are those of csrc/kv_formats.h, each operation rounded to
// nearest by itself, so that the bits are those of the CPU kernels.
#include "attention.h"
#include "numbers.cuh"
#include "simt.hpp"

namespace mxq::cuda {
namespace {

constexpr int PACK_THREADS = 256;
constexpr uint16_t HALF_NAN = 0x7e00;
constexpr int MAX_RANGES = MAX_HEAD * 2;  // keys: 2 groups of 512 channels; values: 16 groups of 64 tokens

struct PackParams {
  RowsView x;
  int32_t heads, side, bits, head, group_rows;
  int64_t code_bytes, params_halves, tile_bytes;
  uint8_t* codes;
  uint16_t* params;
};

// A group of one column as the codes need it; inverse 0 where all codes are 0.
struct Range {
  float zero, inverse;
  bool finite;
};

__device__ __forceinline__ bool finite(float v) { return (__float_as_uint(v) & 0x7fffffffu) < 0x7f800000u; }

struct Page {
  const PackParams& p;
  int64_t first;  // element of token 0, channel 0
  __device__ float number(int row, int col) const {
    const int token = p.side == KEYS ? row : col, channel = p.side == KEYS ? col : row;
    return number_at(p.x.data, first + token * p.x.token + channel, p.x.type);
  }
};

__device__ Range range_of(const Page& page, int row0, int row1, int col, uint16_t& s, uint16_t& z) {
  float least = page.number(row0, col), most = least;
  bool good = finite(least);
  for (int row = row0 + 1; row < row1; row++) {
    const float v = page.number(row, col);
    least = fminf(least, v), most = fmaxf(most, v), good = good && finite(v);
  }
  if (!good) {
    s = z = HALF_NAN;
    return {0.0f, 0.0f, false};
  }
  least = __fadd_rn(least, 0.0f), most = __fadd_rn(most, 0.0f);  // -0 becomes 0
  s = ptx::float_to_half(fminf(__fdiv_rn(__fsub_rn(most, least), float((1 << page.p.bits) - 1)), MAX_HALF));
  z = ptx::float_to_half(fminf(fmaxf(least, -MAX_HALF), MAX_HALF));
  const float scale = ptx::half_to_float(s);
  return {ptx::half_to_float(z), scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale), true};
}

// The code of a number, centred: its low `bits` bits.
__device__ __forceinline__ uint32_t code_of(float v, const Range& r, int bits) {
  const float steps = __fmul_rn(__fsub_rn(v, r.zero), r.inverse);
  const uint32_t code = r.finite ? uint32_t(rintf(fminf(fmaxf(steps, 0.0f), float((1 << bits) - 1)))) : 0;
  return code ^ 1u << (bits - 1);
}

// A row's 32 codes of a stripe, into its words as csrc/formats.h draws them.
template <int BITS>
__device__ __forceinline__ void pack_stripe(const Page& page, int row, int col0, int cols, const Range* ranges, uint8_t* to) {
  uint32_t w[BITS] = {};
#pragma unroll
  for (int i = 0; i < STRIPE; i++) {
    if (col0 + i >= cols) break;  // padding: code 0
    const uint32_t code = code_of(page.number(row, col0 + i), ranges[col0 + i], BITS);
    const int quad = i / 4, byte = 8 * (i % 4);
    if (BITS == 3 && quad >= 6) {
      w[quad == 6 ? 0 : 2] |= (code & 3) << (byte + 6);
      w[BITS / 2] |= (code >> 2) << (byte + quad);
    } else {
      constexpr int PER = BITS == 3 ? 2 : 8 / BITS;
      w[quad / PER] |= code << (byte + BITS * (quad % PER));
    }
  }
#pragma unroll
  for (int i = 0; i < BITS; i++) *reinterpret_cast<uint32_t*>(to + 64 * i) = w[i];
}

// grid: all heads of all sequences.
__global__ void __launch_bounds__(PACK_THREADS) kv_pack(const __grid_constant__ PackParams p) {
  const int index = int(blockIdx.x), tid = int(threadIdx.x);
  const Page page{p, index / p.heads * p.x.batch + index % p.heads * p.x.head};
  const int rows = p.side == KEYS ? PAGE : p.head, cols = p.side == KEYS ? p.head : PAGE;
  uint8_t* const codes = p.codes + index * p.code_bytes;
  if (p.bits == 16) {
    for (int i = tid; i < rows * cols; i += PACK_THREADS) {  // [tile][column][16 rows]
      const float v = page.number(i / (LANES * cols) * LANES + i % LANES, i / LANES % cols);
      const uint16_t half = ptx::float_to_half(finite(v) ? fminf(fmaxf(v, -MAX_HALF), MAX_HALF) : v);
      reinterpret_cast<uint16_t*>(codes)[i] = v == v ? half : HALF_NAN;
    }
    return;
  }
  MXQ_SHARED(Range, ranges, MAX_RANGES);  // [group][column]
  uint16_t* const params = p.params + index * p.params_halves;
  const int groups = (rows + p.group_rows - 1) / p.group_rows;
  for (int i = tid; i < groups * cols; i += PACK_THREADS) {
    const int group = i / cols, col = i % cols, row0 = group * p.group_rows;
    uint16_t s, z;
    ranges[i] = range_of(page, row0, min(row0 + p.group_rows, rows), col, s, z);
    params[2 * group * cols + col] = s, params[(2 * group + 1) * cols + col] = z;
  }
  __syncthreads();
  const int stripes = (cols + STRIPE - 1) / STRIPE;
  for (int i = tid; i < rows * stripes; i += PACK_THREADS) {
    const int tile = i / (LANES * stripes), stripe = i / LANES % stripes, lane = i % LANES, row = tile * LANES + lane;
    uint8_t* to = codes + tile * p.tile_bytes + stripe * 64 * p.bits + 4 * lane;
    const Range* of = ranges + row / p.group_rows * cols;
    switch (p.bits) {
      case 2: pack_stripe<2>(page, row, stripe * STRIPE, cols, of, to); break;
      case 3: pack_stripe<3>(page, row, stripe * STRIPE, cols, of, to); break;
      case 4: pack_stripe<4>(page, row, stripe * STRIPE, cols, of, to); break;
      default: pack_stripe<8>(page, row, stripe * STRIPE, cols, of, to);
    }
  }
}

}  // namespace

int pack_page(const PageDesc& format, const Rows& x, int64_t batch, int64_t heads, uint8_t* codes, uint16_t* params, void* stream) {
  const PageFormat f = page_format(format);
  PackParams p{};
  p.x = {x.data, x.batch, x.head, x.token, int32_t(x.type)};
  p.heads = int32_t(heads), p.side = f.side, p.bits = f.bits, p.head = f.head, p.group_rows = int32_t(page_group_rows(f));
  p.code_bytes = page_bytes(f), p.params_halves = page_params(f), p.tile_bytes = page_tile_bytes(f);
  p.codes = codes, p.params = params;
  return MXQ_LAUNCH(kv_pack, dim3(unsigned(batch * heads)), dim3(PACK_THREADS), 0, stream, p);
}

}  // namespace mxq::cuda
