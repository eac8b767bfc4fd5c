#include "dispatch.h"

#include <algorithm>

#include "shape.h"

namespace mxq::cuda {
namespace {

constexpr int STAGE_BYTES = 32 * 1024;  // of x in shared memory: leaves room for 2 blocks on every device
constexpr int DEFAULT_SMS = 108;        // of a device that is not known

const char* type_name(int32_t type) { return type == F32 ? "float32" : type == BF16 ? "bfloat16" : "float16"; }

Config refuse(const std::string& reason) {
  Config c{};
  c.reason = reason;
  return c;
}

Config choose_mv(const Desc& d) {
  Config c{};
  const int64_t sms = d.device.sms > 0 ? d.device.sms : DEFAULT_SMS;
  c.path = MV, c.ok = 1;
  c.tiles = d.m <= 8 ? 1 : 2;
  // All warps of a block on the columns of one row block, unless there are so many row blocks that each may have fewer, or too few columns.
  c.warps_k = 8;
  while (c.warps_k > 1 && (d.row_blocks * c.warps_k / 16 >= 4 * sms || ceil_div(d.k, 256) <= c.warps_k / 2)) c.warps_k /= 2;
  const int64_t fits = std::max<int64_t>(STAGE_BYTES / (2 * d.m) / 256 * 256, 256);
  c.chunk = int32_t(std::min(fits, round_up(d.widest, 256)));
  const int64_t ctas = ceil_div(d.row_blocks * c.warps_k, 8);
  c.splits = int32_t(std::clamp<int64_t>(2 * sms / std::max<int64_t>(ctas, 1), 1, std::clamp<int64_t>(d.k / (256 * c.warps_k), 1, 8)));
  if (c.splits > 1) c.chunk = int32_t(std::min<int64_t>(c.chunk, round_up(ceil_div(d.widest, c.splits), 256)));
  return c;
}

Config choose_mm(const Desc& d) {
  Config c{};
  const int64_t sms = d.device.sms > 0 ? d.device.sms : DEFAULT_SMS;
  c.path = MM, c.ok = 1;
  c.tiles = MM_TILE_M / 8, c.warps_k = 1, c.chunk = MM_TILES * TILE_COLS;
  const int64_t blocks = ceil_div(d.row_blocks, MM_WARPS) * ceil_div(d.m, MM_TILE_M);
  c.splits = int32_t(std::clamp<int64_t>(2 * sms / std::max<int64_t>(blocks, 1), 1, std::clamp<int64_t>(d.k / (4 * c.chunk), 1, 8)));
  return c;
}

}  // namespace

Decoder decoder_of(Format f) {
  if (f.kind == UNIFORM) return f.bits == 1 ? W1 : f.bits == 2 ? W2 : f.bits == 3 ? W3 : f.bits == 4 ? W4 : f.bits == 5 ? W5 : f.bits == 6 ? W6 : W8;
  if (f.kind == LUT) return f.bits == 2 ? LUT2 : f.bits == 3 ? LUT3 : LUT4;
  return f.kind == NF ? NF4 : FP16W;
}

Config choose(const Desc& d, Path forced) {
  const int32_t cc = d.device.capability;
  const std::string at = "M = " + std::to_string(d.m) + ", N = " + std::to_string(d.n) + ", K = " + std::to_string(d.k) + ", x " + type_name(d.x_type);
  if (cc && cc < 75) return refuse("there are kernels for compute capability 7.5 and later, this device has " + std::to_string(cc / 10) + "." + std::to_string(cc % 10));
  Path path = forced;
  const bool half = d.x_type != F32, fits = d.most_pieces <= MAX_PIECES;
  if (path == AUTO) path = d.m > MM_ROWS ? BIG : !fits || !half ? (d.m > MV_ROWS ? BIG : SCALAR) : d.m > MV_ROWS ? MM : MV;
  if (path == MV || path == MM) {
    const std::string name = path == MV ? "mv" : "mm";
    if (!half) return refuse(name + " multiplies float16 or bfloat16 inputs (" + at + ")");
    if (!fits) return refuse(name + " takes at most " + std::to_string(MAX_PIECES) + " rectangles side by side, this weight has " + std::to_string(d.most_pieces));
    const int most = path == MV ? MV_ROWS : MM_ROWS;
    if (d.m > most) return refuse(name + " takes at most " + std::to_string(most) + " rows of x (" + at + ")");
  }
  if (path == MV) return choose_mv(d);
  if (path == MM) return choose_mm(d);
  Config c{};
  c.path = path, c.ok = 1, c.splits = 1;
  return c;
}

std::string kernel_name(const Config& c, const std::string& format, const Device& device) {
  const char* path = c.path == MV ? "mv" : c.path == MM ? "mm" : c.path == BIG ? "big" : "scalar";
  return std::string(path) + "_" + format + "_a16__" + (device.capability && device.capability < 80 ? "sm75" : "sm80");
}

std::string describe(const Desc& d, const Config& c) {
  if (!c.ok) return c.reason;
  std::string s = "M=" + std::to_string(d.m) + " N=" + std::to_string(d.n) + " K=" + std::to_string(d.k) + " x=" + type_name(d.x_type) + ":";
  if (c.path == SCALAR) return s + " one thread per output";
  if (c.path == BIG) return s + " dequantized, then a matrix product of torch";
  const int64_t rows = c.path == MM ? MM_ROWS_W : 8 / c.warps_k * TILE_ROWS, ctas = ceil_div(d.row_blocks * TILE_ROWS, rows) * ceil_div(d.m, 8 * c.tiles);
  return s + " " + std::to_string(ctas) + " x " + std::to_string(c.splits) + " blocks of " + std::to_string(rows) + " rows by " + std::to_string(8 * c.tiles) + " rows of x, " +
         std::to_string(c.chunk) + " columns at a time, " + std::to_string(c.warps_k) + (c.warps_k == 1 ? " warp" : " warps") + " to a row";
}

}  // namespace mxq::cuda
