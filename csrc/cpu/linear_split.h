// How a pass over a weight is split: the memory of what prepare() makes of x, and chunks of row tiles for the threads.
#pragma once

#include <algorithm>

#include "linear.h"

namespace mxq {

// Codes of a gemv chunk: few, so that a thread that loses its core holds up little and all end together.
static constexpr int64_t CHUNK_BYTES = 64 << 10;

static inline int64_t aligned(int64_t floats) { return round_up(floats, 16); }

// Whether `m` rows of x are computed by gemm. `target` is the caller's, so that one call has one instruction set whenever another thread chooses another.
static inline bool uses_gemm(const Target& target, const uint8_t* blob, int64_t m, bool a8) {
  const Header& h = header(blob);
  if (!a8 || !h.slots8) return m > GEMV_ROWS;
  const Piece* pieces = at<Piece>(blob, h.off_pieces);
  const bool bytes = std::all_of(pieces, pieces + h.pieces, [](const Piece& p) { return p.format.kind == UNIFORM && p.format.bits == 8; });
  return m > (bytes && target.direct8 ? DIRECT8_ROWS : target.gemv8_rows);
}

// Floats of each part of what prepare() makes of m rows of x.
struct InputSizes {
  int64_t slots, sums, units, bytes;
  bool apart;

  InputSizes(const Header& h, int64_t m, bool a8, bool signs_apart)
      : slots(aligned(m * int64_t(h.slot_floats)) + 16),  // whole vectors are read from where the last row begins
        sums(aligned(m * int64_t(h.slot_sums))), units(a8 ? aligned(m * int64_t(h.slot8_scales)) : 0),
        bytes(a8 ? aligned(ceil_div(m * int64_t(h.slot8_bytes), 4)) : 0), apart(a8 && signs_apart) {}
  int64_t total() const { return slots + sums + 2 * units + bytes + (apart ? units + 2 * bytes : 0); }
  void place(Job& j, float* at) const {  // total() floats from `at` on
    j.xs = at, j.sums = j.xs + slots, j.units = j.sums + sums;
    j.byte_sums = reinterpret_cast<int32_t*>(j.units + units);
    j.bytes = reinterpret_cast<int8_t*>(j.units + 2 * units);
    j.apart = apart ? j.bytes + 4 * bytes : nullptr;
    j.negatives = apart ? reinterpret_cast<int32_t*>(j.apart + 8 * bytes) : nullptr;
  }
};

// Row tiles of a gemv chunk, if `all` tiles are shared by so many threads.
static inline int64_t gemv_step(const Header& h, int64_t all, int threads) {
  const int64_t tile_bytes = std::max<int64_t>(1, int64_t(h.work) / std::max<int64_t>(1, h.tiles));
  return std::min(std::max<int64_t>(1, all / (4 * threads)), ceil_div(CHUNK_BYTES, tile_bytes));
}

// Chunks of `step` tiles, none of them across two bands.
static inline int64_t chunks_of(const Band& band, int64_t step) { return ceil_div(tiles(band.r1 - band.r0), std::max<int64_t>(step, 1)); }
static inline int64_t count_chunks(const uint8_t* blob, int64_t step) {
  const Band* bands = at<Band>(blob, header(blob).off_bands);
  int64_t chunks = 0;
  for (uint32_t i = 0; i < header(blob).bands; i++) chunks += chunks_of(bands[i], step);
  return chunks;
}
struct TileRange {
  int64_t begin, end;
};
static inline TileRange chunk_tiles(const uint8_t* blob, int64_t step, int64_t i) {
  const Band* band = at<Band>(blob, header(blob).off_bands);
  for (; i >= chunks_of(*band, step); band++) i -= chunks_of(*band, step);
  const int64_t end = band->first_tile + tiles(band->r1 - band->r0), begin = band->first_tile + i * step;
  return {begin, std::min(begin + step, end)};
}

}  // namespace mxq
