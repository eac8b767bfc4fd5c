#include "dispatch.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "shape.h"

namespace mxq::cuda {
namespace {

const char* type_name(int32_t type) { return type == F32 ? "float32" : type == BF16 ? "bfloat16" : "float16"; }

Config refuse(const std::string& reason) {
  Config c{};
  c.reason = reason;
  return c;
}

// Bytes of shared memory that a block may ask for.
int64_t shared_bytes(int32_t capability) { return shared_of(capability) - (capability == 75 ? 0 : BLOCK_SHARED); }

// Model of an mv launch, in microseconds, as it fits an H100: bytes that an SM takes in at most, and all of them; what a super-tile costs a scheduler of
// an SM, for each 8 rows of x; the time from its words to its sums; a barrier with the sums of a batch; a launch that adds partial sums. With 16 rows of x it
// takes 8 warps and larger batches, which was measured to be faster there than 12 warps that meet at twice as many barriers (23.2 and 26.5 us at 4 bits, 14336 x 4096).
constexpr double SM_BYTES = 40e3, ALL_BYTES = 3e6, SUPER_TILE = 0.25, LATENCY = 0.8, BATCH = 0.25, REDUCE = 1.5;

// A configuration and how long it takes by the model.
struct Timed {
  Config config;
  double time;
};

// The best numbers of warps and row blocks of a batch for so many splits; config.ok is 0 if x and the smallest of them do not fit into shared memory.
Timed fit_mv(const Desc& d, int64_t splits) {
  const int64_t sms = d.device.sms > 0 ? d.device.sms : DEFAULT_SMS, units = ceil_div(d.padded, d.super_cols), each = ceil_div(units, splits);
  const int64_t blocks = std::clamp<int64_t>(sms / splits, 1, std::max<int64_t>(d.row_blocks, 1)), share = ceil_div(d.row_blocks, blocks);
  const int64_t columns = std::min(each * d.super_cols + (d.most_pieces > 1 ? d.most_pieces * d.super_cols : 0), std::max<int64_t>(units, 1) * d.super_cols);
  const int tiles = d.m <= 8 ? 1 : 2;
  const double bytes = double(d.cost) / double(std::max<int64_t>(d.row_blocks * units, 1));  // of a super-tile with its scales
  const double rate = std::min(SM_BYTES, ALL_BYTES / double(blocks * splits));
  Timed best{};
  for (const int warps : {mv_warps(tiles, d.decoder == MIXED), MV_MIXED_WARPS})
    for (const int64_t batch : {1, 2, 3, 4, 6, 8, 12, 16, 32}) {
      if (batch > 1 && batch >= 2 * share) break;
      // The super-tiles of a batch are dealt to the warps in rounds.
      const int64_t batches = ceil_div(share, batch), rounds = share / batch * ceil_div(batch * each, warps) + ceil_div(share % batch * each, warps);
      const double round = std::max({warps * bytes / rate, SUPER_TILE * tiles * warps / 4, LATENCY}), time = double(rounds) * round + double(batches) * BATCH;
      if (best.config.ok && time >= best.time) continue;
      for (int depth = 4; depth >= 2; depth--) {
        const MvShape shape = {warps, int(batch), int(d.m), depth, d.slot, int(columns), d.sparse};
        if (shape.nbytes() > shared_bytes(d.device.capability)) continue;
        best.config = Config{MV, tiles, int32_t(splits), int32_t(blocks), warps, int32_t(batch), depth, int32_t(columns), 1, ""};
        best.time = time;
        break;
      }
    }
  if (splits > 1) best.time += REDUCE + double(2 * 4 * splits * d.m * d.n) / ALL_BYTES;
  return best;
}

Config search_mv(const Desc& d) {
  Timed best{};
  if (d.super_cols < 1) return best.config;  // a weight without rows
  const int64_t most = std::clamp<int64_t>(ceil_div(d.padded, d.super_cols), 1, 32);
  int worse = 0;
  for (int64_t splits = 1; splits <= most && worse < 4; splits++) {
    const Timed one = fit_mv(d, splits);
    if (!one.config.ok) continue;
    if (best.config.ok && one.time >= best.time) worse++;
    else best = one, worse = 0;
  }
  return best.config;
}

// The search takes some microseconds, as long as a kernel, and a model asks the same few questions at each token: a thread remembers the answers.
Config choose_mv(const Desc& d) {
  static_assert(std::has_unique_object_representations_v<Desc>, "bytes are compared");
  struct Known {
    Desc desc;  // zeros are no weight
    Config config;
  };
  thread_local Known known[64] = {};
  const auto* bytes = reinterpret_cast<const unsigned char*>(&d);
  uint32_t hash = 2166136261u;  // FNV-1a
  for (size_t i = 0; i < sizeof d; i++) hash = (hash ^ bytes[i]) * 16777619u;
  Known& place = known[(hash ^ hash >> 16) % 64];
  if (std::memcmp(&place.desc, &d, sizeof d) != 0) place = {d, search_mv(d)};
  return place.config;
}

Config choose_mm(const Desc& d) {
  Config c{};
  const int64_t sms = d.device.sms > 0 ? d.device.sms : DEFAULT_SMS;
  c.path = MM, c.ok = 1;
  c.tiles = mm_tiles(d.m, d.decoder == MIXED), c.columns = MM_TILES * TILE_COLS;
  const int64_t blocks = ceil_div(d.row_blocks, MM_WARPS) * ceil_div(d.m, 8 * c.tiles);
  c.splits = int32_t(std::clamp<int64_t>(2 * sms / std::max<int64_t>(blocks, 1), 1, std::clamp<int64_t>(d.k / (4 * MM_SPLIT * TILE_COLS), 1, 8)));
  return c;
}

}  // namespace

int64_t shared_of(int32_t capability) {
  if (capability == 75) return 64 << 10;
  if (capability == 80 || capability == 87) return 164 << 10;
  if (capability >= 90 && capability < 120) return 228 << 10;
  return 100 << 10;  // 8.6, 8.9, 12.x, and what is not known
}

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
  if (path == AUTO) path = d.m > MM_BEST ? BIG : !fits || !half ? (d.m > MV_ROWS ? BIG : SCALAR) : d.m > MV_ROWS ? MM : MV;
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
    return s + " " + std::to_string(ceil_div(d.row_blocks, MM_WARPS) * ceil_div(d.m, 8 * c.tiles)) + " x " + splits + " blocks of " + std::to_string(MM_ROWS_W) + " rows by " +
           std::to_string(8 * c.tiles) + " rows of x, " + std::to_string(c.columns) + " columns at a time";
  return s + " " + std::to_string(c.blocks) + " x " + splits + " blocks of " + std::to_string(c.warps) + " warps share " + std::to_string(d.row_blocks) + " x 16 rows, " +
         std::to_string(c.batch) + " x 16 at a time, with " + std::to_string(c.depth) + " super-tiles of each warp under way";
}

}  // namespace mxq::cuda
