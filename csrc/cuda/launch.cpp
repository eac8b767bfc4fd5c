#include "launch.h"

#include <algorithm>
#include <vector>

#include "prepack.h"
#include "shape.h"

namespace mxq::cuda {
namespace {

int64_t row_blocks(const CudaBand& b) { return ceil_div(b.r1 - b.r0, TILE_ROWS); }

template <class F>
void for_bands(const LinearCall& c, F&& f) {
  for (int64_t i = 0; i < c.outputs; i++) {
    const CudaHead& h = head_of(c.output[i].head);
    for (uint32_t b = 0; b < h.bands; b++) f(c.output[i], h, at<CudaBand>(c.output[i].head, h.off_bands)[b]);
  }
}

PartView part_of(const Output& o, const CudaHead& h, const CudaBand& b) {
  PartView v{};
  const auto place = [&](uint64_t offset) { return offset ? at<int32_t>(o.blob, offset) : nullptr; };
  v.y = o.y, v.bias = o.bias, v.ldy = o.ldy, v.bias_type = int32_t(o.bias_type);
  v.row_map = h.off_perm_rows ? place(h.off_perm_rows) + b.r0 : nullptr;
  v.perm_cols = place(h.off_perm_cols);
  v.rowptr = place(h.off_rowptr), v.cols = place(h.off_cols);
  v.values = h.off_rowptr ? at<uint16_t>(o.blob, h.off_values) : nullptr;
  v.row0 = b.r0, v.rows = b.r1 - b.r0, v.pieces = b.pieces;
  return v;
}

// Rows of what Params::ctas counts.
int64_t rows_of_block(const Config& c) { return c.path == MM ? MM_ROWS_W : TILE_ROWS; }

uint32_t row_block_bytes(const PieceView& p) { return uint32_t(p.code_step + p.scale_step + p.zero_step); }
int slot_of(const PieceView& p) { return int(round_up(slot_bytes(p.kind, p.bits, p.zero, p.group_shift), 128)); }
// Most columns of x that one of the splits brings into shared memory for a piece.
int64_t staged_columns(const PieceView& p, int splits) { return ceil_div(p.units, splits) * super_cols(p.bits); }

// Whether a band reads the columns of x in the order that the last part of the launch has them in; super-tiles included, which mv pads pieces to.
bool same_columns(const Params& p, const PartView& v, const std::vector<PieceView>& pieces) {
  const PartView& first = p.part[p.parts - 1];
  if (first.perm_cols != v.perm_cols || first.pieces != pieces.size()) return false;
  for (size_t i = 0; i < pieces.size(); i++) {
    const PieceView& other = p.piece[first.first_piece + i];
    if (other.c0 != pieces[i].c0 || other.cols != pieces[i].cols || super_tiles(other.bits) != super_tiles(pieces[i].bits)) return false;
  }
  return true;
}

// The call cut into launches, none of which has more parts or pieces than the kernel parameters hold.
std::vector<Params> launches(const LinearCall& c, const Config& config, const Desc& d) {
  std::vector<Params> out;
  const int64_t rows = rows_of_block(config);
  uint32_t used = 0;
  for_bands(c, [&](const Output& o, const CudaHead& h, const CudaBand& b) {
    PartView v = part_of(o, h, b);
    std::vector<PieceView> pieces;
    for (uint32_t i = 0; i < b.pieces; i++) pieces.push_back(view_of(at<CudaPiece>(o.head, h.off_pieces)[b.first_piece + i], o.blob));
    if (out.empty() || out.back().parts == MAX_PARTS || used + b.pieces > MAX_PIECES || (config.path == MM && !same_columns(out.back(), v, pieces))) {
      Params p{};
      p.x = c.x, p.ldx = c.ldx, p.x_type = int32_t(c.x_type), p.y_type = int32_t(c.y_type), p.m = int32_t(c.m), p.k = int32_t(d.k);
      p.splits = config.splits, p.blocks = config.blocks, p.warps = config.warps, p.depth = config.depth, p.batch = config.batch;
      for (const PieceView& piece : pieces) p.ld_staged += int64_t(piece.tiles) * TILE_COLS;
      out.push_back(p);
      used = 0;
    }
    Params& p = out.back();
    v.first_cta = uint32_t(p.ctas), v.first_piece = used, v.restage = !p.parts || !same_columns(p, v, pieces);
    int64_t columns = 0;
    for (const PieceView& piece : pieces) {
      v.cost += row_block_bytes(piece), columns += staged_columns(piece, p.splits);
      p.slot = std::max(p.slot, slot_of(piece));
    }
    p.columns = std::max(p.columns, int32_t(columns));
    p.ctas += int32_t(ceil_div(b.r1 - b.r0, rows));
    p.sparse |= h.off_rowptr != 0;
    p.part[p.parts++] = v;
    for (const PieceView& piece : pieces) p.piece[used++] = piece;
  });
  for (Params& p : out) {
    p.blocks = std::min(p.blocks, p.ctas);
    if (p.blocks > 0) p.each = uint32_t(p.ctas / p.blocks), p.more = uint32_t(p.ctas % p.blocks);
    for (int i = 1; i < p.parts; i++)
      if (p.part[i].cost != p.part[0].cost) p.cost = 1;
    if (!p.cost) continue;
    p.cost = 0;
    for (int i = 0; i < p.parts; i++) p.cost += uint64_t(ceil_div(p.part[i].rows, TILE_ROWS)) * p.part[i].cost;
  }
  return out;
}

// Whether x is what mm wants of the stage kernel: fp16 in the order of the weight's columns, without padding between pieces, in rows of whole 16 bytes.
bool is_staged(const Params& p) {
  const PartView& part = p.part[0];
  if (p.x_type != F16 || part.perm_cols || p.ldx % 8 || reinterpret_cast<uintptr_t>(p.x) % 16) return false;
  uint32_t column = 0;
  for (uint32_t i = 0; i < part.pieces; i++) {
    const PieceView& piece = p.piece[part.first_piece + i];
    if (piece.c0 != column || piece.cols % TILE_COLS) return false;
    column += piece.cols;
  }
  return true;
}

// Gives each launch its share of the workspace; returns the bytes of all.
int64_t place(std::vector<Params>& launches, const Config& config, void* workspace) {
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    uint8_t* start = static_cast<uint8_t*>(workspace) + end;
    end += round_up(bytes, 256);
    return static_cast<void*>(start);
  };
  for (Params& p : launches) {
    if (config.path == MM && is_staged(p)) {
      p.staged = static_cast<const uint16_t*>(p.x), p.ld_staged = p.ldx;
    } else if (config.path == MM) {
      p.staged = static_cast<uint16_t*>(take(p.m * p.ld_staged * 2));
      p.unscale = static_cast<float*>(take(p.m * 4));
    }
    if (p.splits > 1) p.partial = static_cast<float*>(take(int64_t(p.splits) * p.m * p.ctas * rows_of_block(config) * 4));
  }
  return end;
}

constexpr MvLaunch MV_LAUNCHES[DECODERS] = {mv_w1, mv_w2, mv_w3, mv_w4, mv_w5, mv_w6, mv_w8, mv_lut2, mv_lut3, mv_lut4, mv_nf4, mv_fp16, mv_mixed};
constexpr MmLaunch MM_LAUNCHES[DECODERS] = {mm_w1, mm_w2, mm_w3, mm_w4, mm_w5, mm_w6, mm_w8, mm_lut2, mm_lut3, mm_lut4, mm_nf4, mm_fp16, mm_mixed};

}  // namespace

Desc desc_of(const LinearCall& c) {
  Desc d{};
  d.m = c.m, d.x_type = int32_t(c.x_type), d.device = {int32_t(c.capability), int32_t(c.sms)};
  d.decoder = -1;
  for_bands(c, [&](const Output& o, const CudaHead& h, const CudaBand& b) {
    d.n += b.r1 - b.r0, d.k = h.k, d.row_blocks += row_blocks(b);
    d.most_pieces = std::max(d.most_pieces, int32_t(b.pieces));
    d.sparse |= h.off_rowptr != 0;
    int64_t padded = 0;
    for (uint32_t i = 0; i < b.pieces; i++) {
      const CudaPiece& p = at<CudaPiece>(o.head, h.off_pieces)[b.first_piece + i];
      const PieceView view = view_of(p, nullptr);
      padded += int64_t(view.units) * super_cols(view.bits);
      d.super_cols = std::max(d.super_cols, int32_t(super_cols(view.bits)));
      d.slot = std::max(d.slot, int32_t(slot_of(view)));
      d.cost += row_blocks(b) * row_block_bytes(view);
      const int32_t one = decoder_of(p.format);
      d.decoder = d.decoder < 0 || d.decoder == one ? one : int32_t(MIXED);
    }
    d.padded = std::max(d.padded, padded);
  });
  return d;
}

Config config_of(const LinearCall& c, const Desc& d) {
  Config config = choose(d, Path(c.path));
  if (c.warps) config.warps = int32_t(c.warps);
  if (c.blocks) config.blocks = int32_t(c.blocks);
  if (c.batch) config.batch = int32_t(c.batch);
  if (c.splits) config.splits = int32_t(c.splits);
  return config;
}

int64_t workspace_nbytes(const LinearCall& c) {
  const Desc d = desc_of(c);
  const Config config = config_of(c, d);
  if (!config.ok || (config.path != MV && config.path != MM)) return 0;
  std::vector<Params> all = launches(c, config, d);
  return place(all, config, nullptr);
}

int linear(const LinearCall& c) {
  const Desc d = desc_of(c);
  const Config config = config_of(c, d);
  if (!config.ok || config.path == BIG) return NO_KERNEL;
  if (config.path == SCALAR) {
    for (int64_t i = 0; i < c.outputs; i++)
      if (const int error = launch_scalar(head_of(c.output[i].head), c, c.output[i], c.stream)) return error;
    return 0;
  }
  std::vector<Params> all = launches(c, config, d);
  place(all, config, c.workspace);
  const bool early = c.capability >= 90 && config.path == MV;
  for (const Params& p : all) {
    int error = 0;
    if (config.path == MV) {
      error = MV_LAUNCHES[d.decoder](p, config.tiles, early, c.stream);
    } else {
      if (p.unscale) error = launch_stage(p, const_cast<uint16_t*>(p.staged), const_cast<float*>(p.unscale), c.stream);
      if (!error) error = MM_LAUNCHES[d.decoder](p, c.stream);
    }
    if (!error && p.splits > 1) error = launch_reduce(p, int(rows_of_block(config)), early, c.stream);
    if (error) return error;
  }
  return 0;
}

int dequantize(const uint8_t* head, const uint8_t* blob, void* out, int type, int64_t begin, int64_t count, bool stored_cols, void* stream) {
  const CudaHead& h = head_of(head);
  int64_t blocks = 0, first = -1, last = 0, most = 0;  // row blocks so far, that of row `begin`, the one behind the last row; super-tiles of a row block
  for (uint32_t b = 0; b < h.bands; b++) {
    const CudaBand& band = at<CudaBand>(head, h.off_bands)[b];
    const auto block_of = [&](int64_t row) { return blocks + (row - band.r0) / TILE_ROWS; };
    if (begin >= band.r0 && begin < band.r1) first = block_of(begin);
    if (begin + count > band.r0 && begin + count <= band.r1) last = block_of(begin + count - 1) + 1;
    blocks += row_blocks(band);
    int64_t units = 0;
    for (uint32_t i = 0; i < band.pieces; i++) {
      const CudaPiece& p = at<CudaPiece>(head, h.off_pieces)[band.first_piece + i];
      units += ceil_div(p.tiles, super_tiles(p.format.bits));
    }
    most = std::max(most, units);
  }
  return launch_dequant(h, first, last - first, most, {int(begin), int(count), count == int64_t(h.n), stored_cols}, blob, out, type, stream);
}

int embedding(const uint8_t* head, const uint8_t* blob, const int64_t* ids, int64_t count, void* out, int type, void* stream) {
  return launch_lookup(head_of(head), blob, ids, count, out, type, stream);
}

}  // namespace mxq::cuda
