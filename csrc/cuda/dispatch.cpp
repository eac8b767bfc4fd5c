#include "dispatch.h"

#include <algorithm>

#include "shape.h"

namespace mxq::cuda {
namespace {

constexpr int DEFAULT_SMS = 108;  // of a device that is not known

const char* type_name(int32_t type) { return type == F32 ? "float32" : type == BF16 ? "bfloat16" : "float16"; }

Config refuse(const std::string& reason) {
  Config c{};
  c.reason = reason;
  return c;
}

// Bytes of shared memory that a block may ask for.
int64_t shared_bytes(int32_t capability) {
  if (capability == 75) return 64 << 10;
  if (capability == 80 || capability == 87) return 163 << 10;
  if (capability >= 90 && capability < 120) return 227 << 10;
  return 99 << 10;  // 8.6, 8.9, 12.x, and what is not known
}

// Model of an mv launch, in microseconds: what an SM takes in at most, what all of them do, and a launch that adds partial sums.
constexpr double SM_BYTES_US = 40e3, ALL_BYTES_US = 3e6, REDUCE_US = 1.5;

// Fills a device with one block an SM; false if shared memory is too small.
bool fit_mv(const Desc& d, int64_t splits, Config& c) {
  const int64_t sms = d.device.sms > 0 ? d.device.sms : DEFAULT_SMS, room = shared_bytes(d.device.capability), most = ceil_div(d.padded, d.super_cols);
  c.splits = int32_t(splits);
  c.blocks = int32_t(std::clamp<int64_t>(sms / splits, 1, std::max<int64_t>(d.row_blocks, 1)));
  c.columns = int32_t(std::min(ceil_div(most, splits) * d.super_cols + (d.most_pieces > 1 ? d.most_pieces * d.super_cols : 0), most * d.super_cols));
  for (const int warps : {MV_WARPS, MV_MIXED_WARPS}) {
    if (d.decoder == MIXED && warps > MV_MIXED_WARPS) continue;
    for (int depth = 4; depth >= 2; depth--) {
      const int64_t share = ceil_div(d.row_blocks, c.blocks), one = int64_t(warps) * d.m * TILE_ROWS * 4;
      for (int64_t batch = std::clamp<int64_t>((32 << 10) / one, 1, std::max<int64_t>(share, 1)); batch; batch /= 2) {
        const MvShape shape = {warps, int(batch), int(d.m), depth, d.slot, c.columns, d.sparse};
        if (shape.nbytes() > room) continue;
        c.warps = warps, c.depth = depth, c.batch = int32_t(batch);
        return true;
      }
    }
  }
  return false;
}

Config choose_mv(const Desc& d) {
  Config best{};
  double least = 0;
  const int64_t units = std::max<int64_t>(ceil_div(d.padded, d.super_cols), 1);
  for (int64_t splits = 1; splits <= std::min<int64_t>(units, 32); splits++) {
    Config c{};
    if (!fit_mv(d, splits, c)) continue;
    // The super-tiles of a batch are dealt to the warps in rounds.
    const int64_t share = ceil_div(d.row_blocks, c.blocks), batches = ceil_div(share, c.batch), each = ceil_div(units, splits);
    const int64_t rounds = d.most_pieces > 1 ? batches * ceil_div(std::min<int64_t>(c.batch, share) * each, c.warps) : ceil_div(share * each, c.warps);
    const double bytes = double(d.cost) / double(std::max<int64_t>(d.row_blocks * units, 1));  // of a super-tile with its scales
    const double rate = std::min(SM_BYTES_US, ALL_BYTES_US / double(c.blocks * splits));
    const double time = double(rounds * c.warps) * bytes / rate + (splits > 1 ? REDUCE_US + double(2 * 4 * splits * d.m * d.n) / ALL_BYTES_US : 0);
    if (best.ok && time >= least) continue;
    best = c, least = time;
    best.path = MV, best.ok = 1, best.tiles = d.m <= 8 ? 1 : 2;
  }
  return best;
}

Config choose_mm(const Desc& d) {
  Config c{};
  const int64_t sms = d.device.sms > 0 ? d.device.sms : DEFAULT_SMS;
  c.path = MM, c.ok = 1;
  c.tiles = MM_TILE_M / 8, c.columns = MM_TILES * TILE_COLS;
  const int64_t blocks = ceil_div(d.row_blocks, MM_WARPS) * ceil_div(d.m, MM_TILE_M);
  c.splits = int32_t(std::clamp<int64_t>(2 * sms / std::max<int64_t>(blocks, 1), 1, std::clamp<int64_t>(d.k / (4 * c.columns), 1, 8)));
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
  if (path == MV) {
    const Config c = choose_mv(d);
    if (c.ok) return c;
    if (forced == MV) return refuse("mv needs more shared memory than the device has for a weight of " + std::to_string(d.most_pieces) + " rectangles side by side (" + at + ")");
    path = MM;
  }
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
  const std::string splits = std::to_string(c.splits);
  if (c.path == MM)
    return s + " " + std::to_string(ceil_div(d.row_blocks, MM_WARPS) * ceil_div(d.m, MM_TILE_M)) + " x " + splits + " blocks of " + std::to_string(MM_ROWS_W) + " rows by " +
           std::to_string(MM_TILE_M) + " rows of x, " + std::to_string(c.columns) + " columns at a time";
  return s + " " + std::to_string(c.blocks) + " x " + splits + " blocks of " + std::to_string(c.warps) + " warps share " + std::to_string(d.row_blocks) + " x 16 rows, " +
         std::to_string(c.batch) + " x 16 at a time, with " + std::to_string(c.depth) + " super-tiles of each warp under way";
}

}  // namespace mxq::cuda
