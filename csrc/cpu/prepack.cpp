#include "prepack.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../bitstream.h"
#include "convert.h"
#include "parallel.h"

namespace mxq {
namespace {

// ------------------------------------------------------------------------------------------------------------ single codes

// Where a part of a code lies: its bits from `from` on, `count` of them, at bit `bit` of vector `word` of the stripe.
struct Part {
  int word, bit, from, count;
};
struct Place {
  Part parts[3];
  int count;
};
// Of quad i, byte k (drawn in formats.h).
Place place_of(int i, int k, int bits) {
  const int byte = 8 * k;
  if (bits == 3 && i >= 6) return {{{i == 6 ? 0 : 2, byte + 6, 0, 2}, {1, byte + i, 2, 1}}, 2};
  if (bits == 5 && i == 7) return {{{2, byte + 5, 2, 3}, {3, byte + 7, 1, 1}, {4, byte + 7, 0, 1}}, 3};
  if (bits == 5 && i >= 5) return {{{i - 5, byte + 5, 2, 3}, {i - 2, byte + 5, 0, 2}}, 2};
  if (bits == 6 && i >= 6) return {{{3 * (i - 6), byte + 6, 4, 2}, {3 * (i - 6) + 1, byte + 6, 2, 2}, {3 * (i - 6) + 2, byte + 6, 0, 2}}, 3};
  const int per = quads_per_word(bits);
  return {{{i / per, byte + bits * (i % per), 0, bits}}, 1};
}

// Code p of lane l of the stripe at `words`.
uint32_t stripe_get(const uint8_t* words, int p, int lane, int bits) {
  const Place place = place_of(p / 4, p % 4, bits);
  uint32_t code = 0;
  for (int n = 0; n < place.count; n++) {
    const Part& part = place.parts[n];
    uint32_t w;
    std::memcpy(&w, words + 64 * part.word + 4 * lane, 4);
    code |= (w >> part.bit & ((1u << part.count) - 1)) << part.from;
  }
  return code;
}

void stripe_put(uint8_t* words, int p, int lane, int bits, uint32_t code) {  // into zeroed words
  const Place place = place_of(p / 4, p % 4, bits);
  for (int n = 0; n < place.count; n++) {
    const Part& part = place.parts[n];
    uint32_t w;
    std::memcpy(&w, words + 64 * part.word + 4 * lane, 4);
    w |= (code >> part.from & ((1u << part.count) - 1)) << part.bit;
    std::memcpy(words + 64 * part.word + 4 * lane, &w, 4);
  }
}

// ------------------------------------------------------------------------------------------------------------------ layout

struct Layout {
  Header header{};
  std::vector<Band> bands;
  std::vector<Piece> pieces;
  std::vector<Slot> slots;
  std::vector<Slot8> slots8;
};

uint32_t add_slot(Layout& l, uint32_t c0, uint32_t c1, SlotLayout layout, uint64_t padded, uint32_t group, bool a8) {
  for (uint32_t i = 0; i < l.slots.size(); i++) {
    Slot& s = l.slots[i];
    if (s.c0 == c0 && s.c1 == c1 && s.layout == layout && (s.group == group || (!group && layout != ORIGINAL))) {
      s.a8 |= a8;
      return i;
    }
  }
  const uint64_t sums = group ? uint64_t(ceil_div(padded, group)) : 0;
  Slot s{c0, c1, layout, group, padded, l.header.slot_floats, sums, l.header.slot_sums, a8, 0};
  l.header.slot_floats += padded;
  l.header.slot_sums += s.groups;
  l.slots.push_back(s);
  return uint32_t(l.slots.size() - 1);
}

uint32_t add_slot8(Layout& l, uint32_t c0, uint32_t c1, Format f) {
  const uint32_t group = a8_group(f);
  for (uint32_t i = 0; i < l.slots8.size(); i++)
    if (l.slots8[i].c0 == c0 && l.slots8[i].c1 == c1 && l.slots8[i].group == group) return i;
  const uint64_t padded = uint64_t(round_up(c1 - c0, SLICE));
  Slot8 s{c0, c1, group, 0, padded, l.header.slot8_bytes, uint64_t(ceil_div(padded, group)), l.header.slot8_scales};
  l.header.slot8_bytes += s.padded;
  l.header.slot8_scales += s.groups;
  l.slots8.push_back(s);
  return uint32_t(l.slots8.size() - 1);
}

// Row r of a tile that begins at stored row `row0`: where its sparse values begin and end.
std::pair<int32_t, int32_t> sparse_row(const Weight& w, uint32_t row0, uint32_t r) {
  const int32_t row = w.perm_rows ? w.perm_rows[row0 + r] : int32_t(row0 + r);
  return {w.rowptr[row], w.rowptr[row + 1]};
}

// Calls f(row0, rows, steps) for each tile.
template <class F>
void for_sparse_tiles(const Weight& w, const std::vector<Band>& bands, F&& f) {
  for (const Band& b : bands)
    for (uint32_t row0 = b.r0; row0 < b.r1; row0 += LANES) {
      const uint32_t rows = std::min<uint32_t>(LANES, b.r1 - row0);
      int32_t steps = 0;
      for (uint32_t r = 0; r < rows; r++) {
        const auto [begin, end] = sparse_row(w, row0, r);
        steps = std::max(steps, end - begin);
      }
      f(row0, rows, uint32_t(steps));
    }
}

Layout plan(const Weight& w) {
  Layout l;
  Header& h = l.header;
  h.magic = BLOB_MAGIC;
  h.n = uint32_t(w.n), h.k = uint32_t(w.k);
  h.nnz = uint64_t(w.nnz);

  std::vector<uint32_t> cuts{0, h.n};
  for (const Canonical& c : w.rects) cuts.insert(cuts.end(), {c.rect.r0, c.rect.r1});
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  for (size_t i = 0; i + 1 < cuts.size(); i++) {
    Band b{cuts[i], cuts[i + 1], h.tiles, uint32_t(l.pieces.size()), 0, 0};
    for (uint32_t r = 0; r < w.rects.size(); r++) {
      const Rect& rect = w.rects[r].rect;
      if (rect.r0 > b.r0 || rect.r1 < b.r1) continue;
      const Format f = rect.format;
      const int64_t cols = rect.c1 - rect.c0, padded = padded_cols(f, cols);
      const uint32_t sums = f.zero == SYM ? 0 : f.group && f.group < padded ? f.group : uint32_t(padded);
      Piece p{};
      p.rect = r, p.c0 = rect.c0, p.c1 = rect.c1, p.format = f, p.groups = uint64_t(groups(f, cols));
      p.slot = add_slot(l, rect.c0, rect.c1, column_lanes(f) ? SLICED : INTERLEAVED, uint64_t(padded), sums, f.kind == FLOAT);
      p.slot8 = f.kind == FLOAT ? 0 : add_slot8(l, rect.c0, rect.c1, f);
      p.code_step = uint64_t(column_lanes(f) ? row_vectors(f.bits, cols) * 64 : tile_code_bytes(f, cols));
      p.scale_step = uint64_t(column_lanes(f) ? LUT_BYTES : tile_scale_bytes(f, cols));
      p.zero_step = uint64_t(tile_zero_bytes(f, cols));
      l.pieces.push_back(p);
      b.pieces++;
    }
    h.tiles += uint32_t(tiles(b.r1 - b.r0));
    l.bands.push_back(b);
  }
  if (w.rowptr) add_slot(l, 0, h.k, ORIGINAL, uint64_t(w.k), 0, true);

  h.bands = uint32_t(l.bands.size()), h.pieces = uint32_t(l.pieces.size());
  h.rects = uint32_t(w.rects.size()), h.slots = uint32_t(l.slots.size()), h.slots8 = uint32_t(l.slots8.size());
  uint64_t end = 0;
  const auto place = [&](uint64_t bytes) {
    const uint64_t start = end;
    end += (bytes + 63) / 64 * 64;
    return start;
  };
  place(sizeof(Header));
  h.off_bands = place(l.bands.size() * sizeof(Band));
  h.off_pieces = place(l.pieces.size() * sizeof(Piece));
  h.off_rects = place(w.rects.size() * sizeof(Rect));
  h.off_slots = place(l.slots.size() * sizeof(Slot));
  h.off_slots8 = place(l.slots8.size() * sizeof(Slot8));
  if (w.perm_rows) h.off_perm_rows = place(4 * uint64_t(h.n)), h.off_row_of = place(4 * uint64_t(h.n));
  if (w.perm_cols) h.off_perm_cols = place(4 * uint64_t(h.k));
  if (w.rowptr) {
    h.off_rowptr = place(4 * (uint64_t(h.n) + 1)), h.off_cols = place(4 * h.nnz), h.off_values = place(2 * h.nnz);
    uint64_t steps = 0;
    for_sparse_tiles(w, l.bands, [&](uint32_t, uint32_t, uint32_t n) { steps += n; });
    h.off_sparse_tiles = place(4 * (uint64_t(h.tiles) + 1)), h.off_sparse = place(with_columns(h.k, [](auto c) { return sizeof(SparseStep<decltype(c)>); }) * steps);
  }
  for (const Band& b : l.bands)
    for (uint32_t i = 0; i < b.pieces; i++) {
      Piece& p = l.pieces[b.first_piece + i];
      const uint64_t units = column_lanes(p.format) ? b.r1 - b.r0 : uint64_t(tiles(b.r1 - b.r0));
      p.codes = place(units * p.code_step);
      p.scales = place(units * p.scale_step);
      p.zeros = place(units * p.zero_step);
      h.work += units * p.code_step;
    }
  h.nbytes = end;
  return l;
}

// ----------------------------------------------------------------------------------------------------- one row of one piece

// Where row `row` of a band lies in a piece, and its codes there one by one.
struct RowView {
  const Piece& p;
  uint8_t *codes, *scales, *zeros;
  int lane;  // in its tile; unused for column lanes

  RowView(uint8_t* blob, const Piece& piece, int64_t row) : p(piece) {
    const bool cols = column_lanes(p.format);
    const int64_t unit = cols ? row : row / LANES;
    codes = blob + p.codes + unit * p.code_step;
    scales = blob + p.scales + unit * p.scale_step;
    zeros = blob + p.zeros + unit * p.zero_step;
    lane = cols ? 0 : int(row % LANES);
  }

  uint32_t get(int64_t c) const {  // the canonical code (the half of an fp16 value)
    const int bits = p.format.bits;
    if (bits == 16) return load_u16(codes + (c * LANES + lane) * 2);
    if (column_lanes(p.format)) return stripe_get(codes + c / 512 * bits * 64, slice_code(c), int(c % SLICE / 4), bits);
    return stripe_get(codes + c / STRIPE * bits * 64, int(c % STRIPE), lane, bits) ^ flip();
  }
  void put(int64_t c, uint32_t code) const {
    const int bits = p.format.bits;
    if (bits == 16) store_u16(codes + (c * LANES + lane) * 2, uint16_t(code));
    else if (column_lanes(p.format)) stripe_put(codes + c / 512 * bits * 64, slice_code(c), int(c % SLICE / 4), bits, code);
    else stripe_put(codes + c / STRIPE * bits * 64, int(c % STRIPE), lane, bits, code ^ flip());
  }
  // Uniform codes lie centred, as two's complement; those of 8 bits as they are, since vpdpbusd reads them from there as unsigned bytes.
  uint32_t flip() const { return p.format.kind == UNIFORM && p.format.bits < 8 ? 1u << (p.format.bits - 1) : 0; }
  static int slice_code(int64_t c) { return int(c / SLICE % 8 * 4 + c % 4); }
  uint8_t* half(uint8_t* base, int64_t i) const { return base + (i * LANES + lane) * 2; }
};

void pack_table(uint8_t* out, const uint8_t* table, int bits) {
  for (int i = 0; i < 16; i++) std::memcpy(out + 2 * i, table + 2 * (i & ((1 << bits) - 1)), 2);
  const ByteTable t = byte_table(out);
  std::memcpy(out + 32, t.values, 16);
  std::memcpy(out + 48, &t.unit, 4);
}

void pack_row(const RowView& v, const Canonical& c, int64_t row) {
  const Format f = v.p.format;
  const int64_t cols = v.p.c1 - v.p.c0, g = int64_t(v.p.groups);
  const uint8_t* codes = c.codes + row * code_row_bytes(f, cols);
  for (int64_t i = 0; i < cols; i++) v.put(i, f.bits == 16 ? load_u16(codes + 2 * i) : get_code(codes, i, f.bits));
  const uint8_t* scales = c.scales + (f.kind == FLOAT ? 0 : row * scale_row_bytes(f, cols));
  if (f.kind == LUT) pack_table(v.scales, scales, f.bits);
  for (int64_t i = 0; i < g; i++) std::memcpy(v.half(v.scales, i), scales + 2 * i, 2);
  const uint8_t* zeros = f.zero == SYM ? nullptr : c.zeros + row * zero_row_bytes(f, cols);
  for (int64_t i = 0; i < g && zeros; i++) {
    if (f.zero == INT) v.zeros[i * LANES + v.lane] = uint8_t(int(get_code(zeros, i, f.bits)) - (1 << (f.bits - 1)));
    else std::memcpy(v.half(v.zeros, i), zeros + 2 * i, 2);
  }
}

void unpack_row(const RowView& v, const Canonical& c, int64_t row) {
  const Format f = v.p.format;
  const int64_t cols = v.p.c1 - v.p.c0, g = int64_t(v.p.groups);
  uint8_t* codes = c.codes + row * code_row_bytes(f, cols);
  std::memset(codes, 0, size_t(code_row_bytes(f, cols)));
  for (int64_t i = 0; i < cols; i++) {
    if (f.bits == 16) store_u16(codes + 2 * i, uint16_t(v.get(i)));
    else put_code(codes, i, f.bits, v.get(i));
  }
  uint8_t* scales = c.scales + (f.kind == FLOAT ? 0 : row * scale_row_bytes(f, cols));
  if (f.kind == LUT) std::memcpy(scales, v.scales, size_t(2 << f.bits));
  for (int64_t i = 0; i < g; i++) std::memcpy(scales + 2 * i, v.half(v.scales, i), 2);
  uint8_t* zeros = f.zero == SYM ? nullptr : c.zeros + row * zero_row_bytes(f, cols);
  if (zeros) std::memset(zeros, 0, size_t(zero_row_bytes(f, cols)));
  for (int64_t i = 0; i < g && zeros; i++) {
    if (f.zero == INT) put_code(zeros, i, f.bits, uint32_t(int8_t(v.zeros[i * LANES + v.lane]) + (1 << (f.bits - 1))));
    else std::memcpy(zeros + 2 * i, v.half(v.zeros, i), 2);
  }
}

// out[original column] of a piece's columns; perm_cols may be null. The formulas of formats.h.
void dequantize_piece(const RowView& v, const int32_t* perm_cols, float* out) {
  const Format f = v.p.format;
  const int64_t cols = v.p.c1 - v.p.c0, width = f.group ? f.group : std::max<int64_t>(cols, 1);
  const auto scale = [&](const uint8_t* p) { return f.bf16 ? bf16_to_float(load_u16(p)) : half_to_float(load_u16(p)); };
  for (int64_t c = 0; c < cols; c++) {
    const uint32_t q = v.get(c);
    float& to = out[perm_cols ? perm_cols[v.p.c0 + c] : v.p.c0 + c];
    if (f.kind == FLOAT) to = half_to_float(uint16_t(q));
    else if (f.kind == LUT) to = half_to_float(load_u16(v.scales + 2 * q));
    else {
      const int64_t g = c / width;
      const float s = scale(v.half(v.scales, g));
      if (f.kind == NF) to = s * NF4_LEVELS[q];
      else if (f.zero == FLOATZERO) to = s * float(q) + scale(v.half(v.zeros, g));
      else {
        const int centre = 1 << (f.bits - 1), z = f.zero == INT ? int8_t(v.zeros[g * LANES + v.lane]) : 0;
        to = s * float(int(q) - centre - z);
      }
    }
  }
}

template <class Column>
void pack_sparse(const Weight& w, const Layout& l, uint8_t* blob) {
  uint32_t* first = reinterpret_cast<uint32_t*>(blob + l.header.off_sparse_tiles);
  auto* step = reinterpret_cast<SparseStep<Column>*>(blob + l.header.off_sparse);
  uint32_t count = 0;
  for_sparse_tiles(w, l.bands, [&](uint32_t row0, uint32_t rows, uint32_t steps) {
    *first++ = count;
    for (uint32_t r = 0; r < rows; r++) {
      const auto [begin, end] = sparse_row(w, row0, r);
      for (int32_t i = begin; i < end; i++) step[count + i - begin].column[r] = Column(w.cols[i]), step[count + i - begin].value[r] = w.values[i];
    }
    count += steps;
  });
  *first = count;
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------------ public

int64_t blob_nbytes(const Weight& w) { return int64_t(plan(w).header.nbytes); }

void prepack(const Weight& w, uint8_t* blob, int threads) {
  const Layout l = plan(w);
  const Header& h = l.header;
  std::memset(blob, 0, h.nbytes);
  const auto put = [&](uint64_t offset, const void* from, size_t bytes) {
    if (bytes) std::memcpy(blob + offset, from, bytes);
  };
  put(0, &h, sizeof h);
  put(h.off_bands, l.bands.data(), l.bands.size() * sizeof(Band));
  put(h.off_pieces, l.pieces.data(), l.pieces.size() * sizeof(Piece));
  put(h.off_slots, l.slots.data(), l.slots.size() * sizeof(Slot));
  put(h.off_slots8, l.slots8.data(), l.slots8.size() * sizeof(Slot8));
  for (size_t i = 0; i < w.rects.size(); i++) put(h.off_rects + i * sizeof(Rect), &w.rects[i].rect, sizeof(Rect));
  if (w.perm_rows) {
    put(h.off_perm_rows, w.perm_rows, 4 * size_t(w.n));
    for (int32_t i = 0; i < w.n; i++) put(h.off_row_of + 4 * uint64_t(w.perm_rows[i]), &i, 4);
  }
  if (w.perm_cols) put(h.off_perm_cols, w.perm_cols, 4 * size_t(w.k));
  if (w.rowptr) {
    put(h.off_rowptr, w.rowptr, 4 * size_t(w.n + 1));
    put(h.off_cols, w.cols, 4 * size_t(w.nnz));
    put(h.off_values, w.values, 2 * size_t(w.nnz));
    with_columns(l.header.k, [&](auto c) { pack_sparse<decltype(c)>(w, l, blob); });
  }
  for (const Band& b : l.bands)
    parallel_for(tiles(b.r1 - b.r0), threads, [&](int64_t tile, int) {
      for (uint32_t i = 0; i < b.pieces; i++) {
        const Piece& p = l.pieces[b.first_piece + i];
        const Canonical& c = w.rects[p.rect];
        const int64_t end = std::min<int64_t>((tile + 1) * LANES, b.r1 - b.r0);
        for (int64_t row = tile * LANES; row < end; row++) pack_row(RowView(blob, p, row), c, b.r0 + row - c.rect.r0);
      }
    });
}

void unpack(const uint8_t* blob, uint32_t rect, const Canonical& out, int threads) {
  const Header& h = header(blob);
  for (uint32_t i = 0; i < h.bands; i++) {
    const Band& b = at<Band>(blob, h.off_bands)[i];
    for (uint32_t k = 0; k < b.pieces; k++) {
      const Piece& p = at<Piece>(blob, h.off_pieces)[b.first_piece + k];
      if (p.rect != rect) continue;
      parallel_for(b.r1 - b.r0, threads, [&](int64_t row, int) {
        unpack_row(RowView(const_cast<uint8_t*>(blob), p, row), out, b.r0 + row - out.rect.r0);
      });
    }
  }
}

void dequantize_row(const uint8_t* blob, int64_t row, float* out) {
  const Header& h = header(blob);
  const int64_t stored = h.off_row_of ? at<int32_t>(blob, h.off_row_of)[row] : row;
  const Band* band = at<Band>(blob, h.off_bands);
  while (band->r1 <= stored) band++;
  const int32_t* perm_cols = h.off_perm_cols ? at<int32_t>(blob, h.off_perm_cols) : nullptr;
  for (uint32_t i = 0; i < band->pieces; i++) {
    const Piece& p = at<Piece>(blob, h.off_pieces)[band->first_piece + i];
    dequantize_piece(RowView(const_cast<uint8_t*>(blob), p, stored - band->r0), perm_cols, out);
  }
  if (h.off_rowptr) {
    const int32_t *ptr = at<int32_t>(blob, h.off_rowptr), *cols = at<int32_t>(blob, h.off_cols);
    for (int32_t i = ptr[row]; i < ptr[row + 1]; i++) out[cols[i]] += half_to_float(at<uint16_t>(blob, h.off_values)[i]);
  }
}

std::string format_name(Format f) {
  if (f.kind == FLOAT) return "fp16";
  std::string name = (f.kind == UNIFORM ? "w" : f.kind == NF ? "nf" : "lut") + std::to_string(f.bits);
  if (f.group) name += "g" + std::to_string(f.group);
  if (f.zero != SYM) name += f.zero == INT ? "_asym" : "_fz";
  return f.bf16 ? name + "_bf16" : name;
}

std::string blob_format_name(const uint8_t* blob) {
  const Header& h = header(blob);
  std::vector<std::string> names;
  for (uint32_t i = 0; i < h.rects; i++) {
    const std::string name = format_name(at<Rect>(blob, h.off_rects)[i].format);
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  if (h.off_rowptr) names.push_back("sparse");
  std::string out;
  for (const std::string& n : names) out += out.empty() ? n : "+" + n;
  return out;
}

}  // namespace mxq
