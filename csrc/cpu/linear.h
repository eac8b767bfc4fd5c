// y = x W^T + bias over a prepacked weight: what the driver (linear.cpp) and the kernels of each target (linear.inl) share.
#pragma once

#include "../blob.h"

namespace mxq {

enum Type : int { F32 = 0, BF16 = 1, F16 = 2 };  // of activations, outputs and bias

// One pass over the weight for up to MAX_ROWS rows of x. They are processed in blocks of nearly equal size; a block is what a micro-kernel
// takes at once.
struct Job {
  const uint8_t* blob;
  const void* x;      // [m][ldx], first k columns used
  int64_t ldx;
  int type;           // of x and y
  void* y;            // [m][n]
  const void* bias;   // [n] or null
  int bias_type;
  int64_t m;
  int64_t blocks;
  bool gemm;          // its panels have rows as lanes for every format, so that all slots are interleaved
  bool a8;            // integer mode: x in int8 for all but fp16 pieces and the sparse part
  float* xs;          // slots: the input as the kernels want it, see blob.h
  float* sums;        // slots: sums of the input over each group
  float* units;       // int8 slots: scales, sums of codes, codes
  int32_t* byte_sums;
  int8_t* bytes;
  int8_t* apart;       // int8 slots of a target that wants signs_apart: magnitudes and signs of the codes,
  int32_t* negatives;  // and sums of the magnitudes of negative ones
};

static inline int64_t block_start(const Job& j, int64_t b) {
  const int64_t size = j.m / j.blocks, rest = j.m % j.blocks;
  return b * size + (b < rest ? b : rest);
}

// Rows of x in one pass: bounds the scratch (MAX_ROWS * K floats) and keeps a chunk's accumulators (MAX_ROWS * 64 floats at most) in L2.
static constexpr int64_t MAX_ROWS = 512;
// Up to this M the weights are decoded in registers (gemv), once per block of rows of x; above it into a panel of float32 that a plain
// matrix kernel reads (gemm), once in all. Measured at 4096 x 4096 with AVX-512: gemv takes 0.14 ms a row (lut 0.2), gemm 0.13 and 0.6 for
// the panels (lut 1.9), so that they meet between 25 and 45 rows; 16 is where every format and target still gains.
static constexpr int64_t GEMV_ROWS = 16;
static constexpr int64_t GEMV8_ROWS = 8;  // the same in integer mode; where gemv serves more (GEMV8_MOST), beyond it tables are unpacked first
static constexpr int64_t DIRECT8_ROWS = 2;  // and for bytes that gemm multiplies where they lie: there is no panel to pay for

// Sizes of the micro-kernels: rows of x at most, and row tiles of a gemm chunk.
struct Blocking {
  int gemv_block, gemm_block, gemm_tiles;
};

// The kernels of one instruction set. Chunks are runs of row tiles of one band; any number of threads may take them in any order.
struct Target {
  const char* name;
  Blocking a16, a8;
  int64_t gemv8_rows;  // up to this M gemv serves in integer mode
  bool direct8;        // gemm in integer mode reads codes of 8 bits where they lie
  bool signs_apart;    // integer mode reads codes of x by magnitude and sign, too
  void (*prepare)(const Job&, int64_t block);
  void (*gemv)(const Job&, int64_t tile0, int64_t tile1, float* scratch);
  void (*gemm)(const Job&, int64_t tile0, int64_t tile1, float* scratch);
  int64_t (*scratch_floats)(const Job&);  // of either, for each thread
};

// Tiles tile0 .. tile1-1 (of one band) of band `band`.
struct TileRun {
  const Band* band;
  int64_t first, count;  // within the band
};
static inline TileRun find_tiles(const uint8_t* blob, int64_t tile0, int64_t tile1) {
  const Header& h = header(blob);
  const Band* band = at<Band>(blob, h.off_bands);
  for (uint32_t i = 1; i < h.bands && band[1].first_tile <= tile0; i++) band++;
  return {band, tile0 - band->first_tile, tile1 - tile0};
}

extern const Target target_scalar;
#if defined(__x86_64__)
extern const Target target_avx2;
extern const Target target_avx512;
extern const Target target_avx512vnni;
#endif

}  // namespace mxq
