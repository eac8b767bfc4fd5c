// Problem -> configuration: what is launched is a pure function of shapes, formats and a few facts about the device. No timing, and no state but
// answers that a thread remembers; runs without a GPU.
#pragma once

#include <string>

#include "params.h"

namespace mxq::cuda {

// Which kernel reads a format; MIXED reads all of them, for weights of several formats.
enum Decoder : int32_t { W1, W2, W3, W4, W5, W6, W8, LUT2, LUT3, LUT4, NF4, FP16W, MIXED, DECODERS };
Decoder decoder_of(Format f);

enum Path : int32_t { AUTO = 0, SCALAR = 1, MV = 2, MM = 3, BIG = 4 };

// The most rows of x that each path takes.
constexpr int MV_ROWS = 16, MM_ROWS = 256;
// Up to that many, mm takes less time than dequant (as long as about 64 rows take in mm) and a product of torch.
constexpr int MM_BEST = 128;

struct Device {
  int32_t capability;  // 10 * major + minor, for example 86; 0: unknown
  int32_t sms;         // 0: unknown
};

constexpr int DEFAULT_SMS = 108;     // of a device that is not known
constexpr int BLOCK_SHARED = 1024;  // bytes of shared memory that a block takes beside those that it asks for, from 8.0 on
// Bytes of shared memory of an SM; what is not known has as many as all but 7.5.
int64_t shared_of(int32_t capability);

// The whole launch: all weights that read the same x.
struct Desc {
  int64_t m, n, k;           // n: rows of all weights
  int64_t row_blocks;        // of 16 rows, over all bands
  int64_t padded;            // columns of the widest band, each piece in whole super-tiles
  int64_t cost;              // bytes of all row blocks
  int32_t slot;              // of the largest super-tile (shape.h)
  int32_t super_cols;        // of the widest super-tile
  int32_t x_type;
  int32_t decoder;           // the one of all pieces, or MIXED
  int32_t most_pieces;       // of a band
  int32_t sparse;
  Device device;
};

struct Config {
  Path path;
  int32_t tiles;    // 8 * tiles rows of x in a block
  int32_t splits;   // blocks that share the columns
  int32_t blocks;   // mv: blocks for each split, which share the row blocks
  int32_t warps, batch, depth, columns;  // mv: see MvShape in shape.h; `columns` for at most so many splits, mm: columns of a stage
  int32_t ok;       // 0: `reason` says why there is no kernel
  std::string reason;
};

// `forced`: AUTO, or the path to take.
Config choose(const Desc& d, Path forced);
// For example "mv_w4g128_a16__sm80", with the format's own name.
std::string kernel_name(const Config& c, const std::string& format, const Device& device);
// All decisions in one line, for people.
std::string describe(const Desc& d, const Config& c);

}  // namespace mxq::cuda
