#include "prepack.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../bitstream.h"
#include "../cpu/convert.h"
#include "../cpu/parallel.h"

namespace mxq::cuda {
namespace {

struct Rect {  // as stored in the head
  uint32_t r0, r1, c0, c1;
  Format format;
};

struct Layout {
  CudaHead head{};
  std::vector<CudaBand> bands;
  std::vector<CudaPiece> pieces;
  std::vector<Rect> rects;
};

int64_t row_blocks(const CudaBand& b) { return ceil_div(b.r1 - b.r0, TILE_ROWS); }

Layout plan(const WeightDesc& w) {
  Layout l;
  CudaHead& h = l.head;
  h.magic = CUDA_MAGIC;
  h.n = uint32_t(w.n), h.k = uint32_t(w.k), h.nnz = uint64_t(w.nnz);
  std::vector<uint32_t> cuts{0, h.n};
  for (int64_t i = 0; i < w.rect_count; i++) {
    const RectDesc& r = w.rects[i];
    const Format f{uint8_t(r.kind), uint8_t(r.bits), uint8_t(r.zero), uint8_t(r.bf16), uint32_t(r.group)};
    l.rects.push_back({uint32_t(r.r0), uint32_t(r.r1), uint32_t(r.c0), uint32_t(r.c1), f});
    cuts.insert(cuts.end(), {uint32_t(r.r0), uint32_t(r.r1)});
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  for (size_t i = 0; i + 1 < cuts.size(); i++) {
    CudaBand b{cuts[i], cuts[i + 1], uint32_t(l.pieces.size()), 0};
    for (uint32_t r = 0; r < l.rects.size(); r++) {
      const Rect& rect = l.rects[r];
      if (rect.r0 > b.r0 || rect.r1 < b.r1) continue;
      const Format f = rect.format;
      const int64_t cols = rect.c1 - rect.c0;
      l.pieces.push_back({r, rect.c0, rect.c1, f, uint32_t(cuda_tiles(cols)), uint32_t(cuda_groups(f, cols)), 0, 0, 0, 0,
                          uint64_t(cuda_code_bytes(f, cols)), uint64_t(cuda_scale_bytes(f, cols)), uint64_t(cuda_zero_bytes(f, cols))});
      b.pieces++;
    }
    l.bands.push_back(b);
  }
  h.bands = uint32_t(l.bands.size()), h.pieces = uint32_t(l.pieces.size()), h.rects = uint32_t(l.rects.size());

  uint64_t end = 0;
  const auto place = [&](uint64_t bytes) {
    const uint64_t start = end;
    end += uint64_t(round_up(int64_t(bytes), 128));
    return start;
  };
  place(sizeof(CudaHead));
  h.off_bands = place(l.bands.size() * sizeof(CudaBand));
  h.off_pieces = place(l.pieces.size() * sizeof(CudaPiece));
  h.off_rects = place(l.rects.size() * sizeof(Rect));
  h.head_nbytes = end;
  if (w.perm_rows) h.off_perm_rows = place(4 * uint64_t(h.n)), h.off_row_of = place(4 * uint64_t(h.n));
  if (w.perm_cols) h.off_perm_cols = place(4 * uint64_t(h.k)), h.off_col_of = place(4 * uint64_t(h.k));
  if (w.rowptr) h.off_rowptr = place(4 * (uint64_t(h.n) + 1)), h.off_cols = place(4 * h.nnz), h.off_values = place(2 * h.nnz);
  for (const CudaBand& b : l.bands)
    for (uint32_t i = 0; i < b.pieces; i++) {
      CudaPiece& p = l.pieces[b.first_piece + i];
      const uint64_t blocks = uint64_t(row_blocks(b));
      p.codes = place(blocks * p.code_step), p.scales = place(blocks * p.scale_step), p.zeros = place(blocks * p.zero_step);
    }
  h.nbytes = end;
  return l;
}

// Row `r` of row block `block` of a piece and row `row` of the canonical rectangle: one is written from the other.
template <bool PACK>
void move_row(uint8_t* blob, const CudaPiece& p, int64_t block, int r, const RectDesc& c, int64_t row) {
  const Format f = p.format;
  const int64_t cols = p.c1 - p.c0, groups = mxq::groups(f, cols);
  uint32_t* words = reinterpret_cast<uint32_t*>(blob + p.codes + uint64_t(block) * p.code_step);
  uint8_t* codes = c.codes + row * code_row_bytes(f, cols);
  if (!PACK) std::memset(codes, 0, size_t(code_row_bytes(f, cols)));
  for (int64_t i = 0; i < cols; i++) {
    if (PACK) {
      const uint32_t code = f.bits == 16 ? load_u16(codes + 2 * i) : get_code(codes, i, f.bits);
      write_code(words, f.bits, quad_order(f), p.tiles, r, i, code);
    } else {
      const uint32_t code = read_code(words, f.bits, quad_order(f), p.tiles, r, i);
      if (f.bits == 16) store_u16(codes + 2 * i, uint16_t(code));
      else put_code(codes, i, f.bits, code);
    }
  }
  const auto halves = [&](uint8_t* ours, uint8_t* theirs) { PACK ? std::memcpy(ours, theirs, 2) : std::memcpy(theirs, ours, 2); };
  uint8_t* scales = blob + p.scales + uint64_t(block) * p.scale_step;
  for (int64_t i = 0; i < (f.kind == LUT ? 1 << f.bits : 0); i++)
    halves(scales + 2 * ((r << f.bits) + i), c.scales + row * scale_row_bytes(f, cols) + 2 * i);
  for (int64_t g = 0; g < groups; g++)
    halves(scales + 2 * (g * TILE_ROWS + pair_place(r)), c.scales + row * scale_row_bytes(f, cols) + 2 * g);
  if (f.zero == SYM) return;
  uint8_t *zeros = blob + p.zeros + uint64_t(block) * p.zero_step, *stored = c.zeros + row * zero_row_bytes(f, cols);
  if (!PACK) std::memset(stored, 0, size_t(zero_row_bytes(f, cols)));
  for (int64_t g = 0; g < groups; g++) {
    const int64_t place = g * TILE_ROWS + pair_place(r);
    if (f.zero == FLOATZERO) halves(zeros + 2 * place, stored + 2 * g);
    else if (PACK) zeros[place] = uint8_t(get_code(stored, g, f.bits));
    else put_code(stored, g, f.bits, zeros[place]);
  }
}

template <bool PACK>
void move_band(uint8_t* blob, const CudaBand& b, const CudaPiece* pieces, const RectDesc* rects, int64_t only, int threads) {
  parallel_for(row_blocks(b), threads, [&](int64_t block, int) {
    for (uint32_t i = 0; i < b.pieces; i++) {
      const CudaPiece& p = pieces[b.first_piece + i];
      if (!PACK && p.rect != only) continue;
      const RectDesc& c = PACK ? rects[p.rect] : *rects;
      const int64_t first = b.r0 + block * TILE_ROWS, last = std::min<int64_t>(first + TILE_ROWS, b.r1);
      for (int64_t row = first; row < last; row++) move_row<PACK>(blob, p, block, int(row - first), c, row - c.r0);
    }
  });
}

}  // namespace

Sizes blob_sizes(const WeightDesc& w) {
  const CudaHead h = plan(w).head;
  return {int64_t(h.nbytes), int64_t(h.head_nbytes)};
}

void prepack(const WeightDesc& w, uint8_t* blob, int threads) {
  const Layout l = plan(w);
  const CudaHead& h = l.head;
  std::memset(blob, 0, h.nbytes);
  const auto put = [&](uint64_t offset, const void* from, size_t bytes) {
    if (bytes) std::memcpy(blob + offset, from, bytes);
  };
  put(0, &h, sizeof h);
  put(h.off_bands, l.bands.data(), l.bands.size() * sizeof(CudaBand));
  put(h.off_pieces, l.pieces.data(), l.pieces.size() * sizeof(CudaPiece));
  put(h.off_rects, l.rects.data(), l.rects.size() * sizeof(Rect));
  const auto put_permutation = [&](uint64_t offset, uint64_t inverse, const int32_t* perm, int64_t size) {
    if (!perm) return;
    put(offset, perm, 4 * size_t(size));
    for (int32_t i = 0; i < size; i++) put(inverse + 4 * uint64_t(perm[i]), &i, 4);
  };
  put_permutation(h.off_perm_rows, h.off_row_of, w.perm_rows, w.n);
  put_permutation(h.off_perm_cols, h.off_col_of, w.perm_cols, w.k);
  if (w.rowptr) {
    put(h.off_rowptr, w.rowptr, 4 * size_t(w.n + 1));
    put(h.off_cols, w.cols, 4 * size_t(w.nnz));
    put(h.off_values, w.values, 2 * size_t(w.nnz));
  }
  for (const CudaBand& b : l.bands) move_band<true>(blob, b, l.pieces.data(), w.rects, 0, threads);
}

void unpack(const uint8_t* blob, int64_t i, const RectDesc& out, int threads) {
  const CudaHead& h = head_of(blob);
  for (uint32_t b = 0; b < h.bands; b++)
    move_band<false>(const_cast<uint8_t*>(blob), at<CudaBand>(blob, h.off_bands)[b], at<CudaPiece>(blob, h.off_pieces), &out, i, threads);
}

}  // namespace mxq::cuda
