// Integer kernels for many rows of x: a panel of the weight is unpacked to bytes once, and all blocks of x are multiplied by it. Included by linear.inl.

namespace mxq {
namespace MXQ_TARGET {

// Panel: DEPTH8 columns of GEMM8_TILES row tiles as bytes, [tile][column/4][row][4].
// Codes of 8 bits lie like that in memory already, and are read from there (direct8). 256 x 64 bytes are 16 KB: it stays in L1 beside the block of
// x and the sums of one block, while all rows of x pass by it.
static constexpr int DEPTH8 = 256;
static constexpr int TILE8 = DEPTH8 * 16;                 // bytes of a tile in the panel
static constexpr int PANEL8 = GEMM8_TILES * TILE8;

// Columns c0 .. c1 of a tile as bytes. A small integer zero is taken out here already: value - zero + 2^bits lies in 1 .. 2^(bits+1) - 1.
template <class D>
static void unpack_tile(const Tile& t, const Bytes& table, int64_t group, int64_t c0, int64_t c1, uint8_t* out) {
  const bool fold = D::LARGEST && t.format.zero == INT;
  W moved = ints(0);
  for (int64_t c = c0; c < c1; c += STRIPE, out += 512) {
    if (fold && (c == c0 || c % group == 0)) {  // code + (2^(bits-1) - stored zero): both below 2^bits
      int32_t v[16];
      const uint8_t* z = t.zeros + (t.format.group ? c / group : 0) * 16;
      for (int i = 0; i < 16; i++) v[i] = ((1 << (t.format.bits - 1)) - (int8_t)z[i]) * 0x01010101;
      moved = load_words(v);
    }
    D::step(t.codes + c / STRIPE * D::BYTES, table, [&](auto q, auto, W u) MXQ_LAMBDA { store_words(out + 64 * decltype(q)::value, iadd(u, moved)); });
  }
}

// The codes that the next panel will take from the place of `tile`: the same tile's next columns, or the next chunk's first ones. (At the very
// end that is no weight at all; it is only prefetched.)
static const uint8_t* next_codes(const Job& j, const Piece& p, int64_t tile, int64_t c0) {
  const int64_t lanes = column_lanes(p.format) ? 1 : 16, step = (int64_t)p.code_step * (16 / lanes), end = c0 + DEPTH8;
  const bool last = end >= padded_cols(p.format, p.c1 - p.c0);
  return j.blob + p.codes + tile * step + (last ? GEMM8_TILES * step : end * p.format.bits / 8 * lanes);
}

// The same for scales and zeros: those of the group at column c of the tile, or, if c is negative, the first ones of the next chunk.
static void fetch_scales(const Job& j, const Piece& p, int64_t tile, int64_t c) {
  if (c < 0) tile += GEMM8_TILES;
  const int64_t g = c < 0 || !p.format.group ? 0 : c / p.format.group;
  const uint8_t* scales = j.blob + p.scales + tile * p.scale_step + 32 * g;
  const int64_t bytes = p.format.group ? 32 * DEPTH8 / p.format.group : 32;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(scales + i);
  if (p.format.zero != SYM) __builtin_prefetch(j.blob + p.zeros + tile * p.zero_step + (p.format.zero == INT ? 16 : 32) * g);
}

static void unpack_panel(const Job& j, const Piece& p, int64_t tile, int64_t rows, int64_t group, int64_t c0, int64_t c1, uint8_t* out) {
  const int64_t unit = column_lanes(p.format) ? 16 : 1;  // steps per tile
  const uint8_t *words = j.blob + p.codes + tile * unit * p.code_step, *tables = j.blob + p.scales + tile * unit * p.scale_step;
  const uint8_t* next = next_codes(j, p, tile, c0);
  if (p.format.kind == LUT) return unpack_rows(p.format.bits, words, p.code_step, tables, rows, c0, c1, next, out);
  const Tile t = tile_of(j.blob, p, tile);
  if (c1 > t.padded) c1 = t.padded;  // x is padded further; what is behind the tile's last column is multiplied by its zeros
  const Bytes table = nf_table();
  switch (p.format.kind == NF ? 0 : p.format.bits) {
    case 0: return unpack_tile<NfQuads>(t, table, group, c0, c1, out);
    case 1: return unpack_tile<Quads<1, false>>(t, table, group, c0, c1, out);
    case 2: return unpack_tile<Quads<2, false>>(t, table, group, c0, c1, out);
    case 3: return unpack_tile<Quads<3, false>>(t, table, group, c0, c1, out);
    case 4: return unpack_tile<Quads<4, false>>(t, table, group, c0, c1, out);
    case 5: return unpack_tile<Quads<5, false>>(t, table, group, c0, c1, out);
    case 6: return unpack_tile<Quads<6, false>>(t, table, group, c0, c1, out);
    default: return unpack_tile<Quads<8, false>>(t, table, group, c0, c1, out);
  }
}

// How the panel of a piece is to be read.
struct Reading {
  Format format;  // zero: INT only if it has not been folded into the bytes
  int offset;
  bool small;
  float unit;     // 1/127 for nf
  bool late;      // scales_late()
};
static Reading reading(Format f, bool late) {
  const bool small = f.kind == UNIFORM && f.bits < 8, fold = small && f.zero == INT;
  Reading r{f, small ? 1 << (f.bits - 1) : OFFSET8, small, f.kind == NF ? 1.0f / 127.0f : 1.0f, late};
  if (fold) r.format.zero = SYM, r.offset = 1 << f.bits;
  if (f.zero == FLOATZERO) r.offset -= 1 << (f.bits - 1);
  return r;
}

// acc[m][lda] += one group, or = if it is the `first`: `quads` quads of NV tiles times MR rows of x, `stride` bytes apart. Meanwhile the codes at `next` and `other`,
// if not null, are prefetched, 64 bytes of each a quad: as one burst while unpacking they would overrun the queue of outstanding loads, and the
// next panel would wait for memory. A block that is ALONE has no other to share that with: it also fetches what lies `third` bytes behind each of the two.
template <int NV, int MR, bool SMALL, bool ALONE>
static void gemm8_block(const uint8_t* panel, int64_t tile_step, const int8_t* x, int64_t stride, int64_t quads, Reading how, const GroupScale* scales, const float* units,
                        const int32_t* sums, bool first, float* acc, int64_t lda, const uint8_t* next, const uint8_t* other, int64_t third) {
  W d[MR * NV];
  unroll<MR>([&](auto m) MXQ_LAMBDA {
    const W start = ints(-how.offset * sums[decltype(m)::value]);
    unroll<NV>([&](auto v) MXQ_LAMBDA { d[decltype(m)::value * NV + decltype(v)::value] = start; });
  });
  // Four quads a turn: the end of a loop of 64 turns is not foreseen, that of one of 16 is.
  for (int64_t q = 0; q < quads; q += 4, panel += 256, x += 16) {
    if (next) {
      unroll<4>([&](auto i) MXQ_LAMBDA {
        __builtin_prefetch(next + 64 * decltype(i)::value, 0, 2);
        __builtin_prefetch(other + 64 * decltype(i)::value, 0, 2);
        if constexpr (ALONE) {
          __builtin_prefetch(next + third + 64 * decltype(i)::value, 0, 2);
          __builtin_prefetch(other + third + 64 * decltype(i)::value, 0, 2);
        }
      });
      next += 256, other += 256;
    }
    unroll<4>([&](auto i) MXQ_LAMBDA {
      constexpr int I = decltype(i)::value;
      W u[NV];
      unroll<NV>([&](auto v) MXQ_LAMBDA { u[decltype(v)::value] = load_words(panel + tile_step * decltype(v)::value + 64 * I); });
      unroll<MR>([&](auto m) MXQ_LAMBDA {
        constexpr int M = decltype(m)::value;
        W b = four_bytes(x + M * stride + 4 * I);
        if constexpr (NV > 1) pin(b);  // one load for all tiles
        unroll<NV>([&](auto v) MXQ_LAMBDA {
          constexpr int D = M * NV + decltype(v)::value;
          d[D] = dot_value<SMALL>(d[D], u[decltype(v)::value], b);
        });
      });
    });
  }
  // The common cases without a question per vector.
  const auto add = [&](Format f, auto late, auto begin) MXQ_LAMBDA {
    unroll<MR>([&](auto m) MXQ_LAMBDA {
      constexpr int M = decltype(m)::value;
      const float unit = how.unit * units[M];
      const int32_t sum = sums[M];
      unroll<NV>([&](auto v) MXQ_LAMBDA {
        constexpr int N = decltype(v)::value;
        float* to = acc + M * lda + 16 * N;
        GroupScale s = scales[N];
        if constexpr (decltype(late)::value) s.scale = set1(1.0f);
        store(to, add_group(f, s, to_float(d[M * NV + N]), unit, sum, decltype(begin)::value ? zero() : load(to)));
      });
    });
  };
  Format symmetric = how.format;
  symmetric.zero = SYM;
  if (how.format.zero != SYM) {
    if (first) add(how.format, Int<0>{}, Int<1>{});
    else add(how.format, Int<0>{}, Int<0>{});
  } else if (how.late) {
    if (first) add(symmetric, Int<1>{}, Int<1>{});
    else add(symmetric, Int<1>{}, Int<0>{});
  } else {
    if (first) add(symmetric, Int<0>{}, Int<1>{});
    else add(symmetric, Int<0>{}, Int<0>{});
  }
}

// All blocks of x times the panel of columns c0 .. c1.
struct PanelJob {
  const uint8_t* panel;
  int64_t tile_step;  // bytes from tile to tile
  const int8_t* x;
  int64_t c0, c1;
  Reading how;
  Input8 in;
  const GroupScale* scales;
  const uint8_t* next[GEMM8_TILES];  // where each tile goes on
  int64_t next_bytes;                // of each of them
  bool first, last;                  // of the sums' panels
  const float* late;                 // what the sums are multiplied with at their end, or null
};

template <int NV, bool SMALL>
static void gemm8_all_blocks(const Job& j, const GemmChunk& k, const PanelJob& a) {
  // No division in here: a micro-kernel takes some 400 cycles, and its addresses would wait for one.
  const Input8& in = a.in;
  const int64_t size = j.m / j.blocks, larger = j.m % j.blocks, first = a.c0 / in.group;
  int64_t tile = a.next_bytes ? 0 : NV, fetched = 0;
  for (int64_t b = 0, m0 = 0, mr; b < j.blocks; b++, m0 += mr) {
    mr = size + (b < larger);
    const float* units = in.units + first * in.step + m0;
    const int32_t* sums = in.sums + first * in.step + m0;
    const GroupScale* scales = a.scales;
    float* acc = k.acc + m0 * k.lda;
    bool begin = a.first;
    for (int64_t c = a.c0; c < a.c1; c += in.group, begin = false) {  // the groups of the panel, while the sums are in L1
      const int64_t width = a.c1 - c < in.group ? a.c1 - c : in.group, full = in.stride - c < in.group ? in.stride - c : in.group;
      const int8_t* x = a.x + c * j.m + m0 * full;
      const uint8_t* panel = a.panel + (c - a.c0) * 16;
      const uint8_t* next = tile < NV ? a.next[tile] + fetched : nullptr;  // two tiles at a time
      const uint8_t* other = tile + 1 < NV ? a.next[tile + 1] + fetched : next;
      unroll<GEMM8_BLOCK>([&](auto m) MXQ_LAMBDA {
        constexpr int MR = decltype(m)::value + 1;
        if (mr != MR) return;
        if constexpr (NV == 4) {
          if (next && j.blocks == 1)
            return gemm8_block<NV, MR, SMALL, true>(panel, a.tile_step, x, full, width / 4, a.how, scales, units, sums, begin, acc, k.lda, next, other, a.next[2] - a.next[0]);
        }
        gemm8_block<NV, MR, SMALL, false>(panel, a.tile_step, x, full, width / 4, a.how, scales, units, sums, begin, acc, k.lda, next, other, 0);
      });
      units += in.step, sums += in.step, scales += GEMM8_TILES;
      fetched += width / 4 * 64;
      if (fetched >= a.next_bytes) tile += 2, fetched = 0;
    }
    if (a.last) finish_block(j, k, m0, mr, a.late);  // now, while its sums are in L1
  }
}

// What piece `index` of `pieces` adds to the sums of a chunk; the first piece begins them, the last one writes y.
static void gemm8_piece(const Job& j, const GemmChunk& k, uint32_t index, uint32_t pieces, uint8_t* panel) {
  const Piece& p = k.pieces[index];
  const Input8 in = input8(j, p, 0);
  const int64_t padded = padded_cols(p.format, p.c1 - p.c0);
  GroupScale scales[DEPTH8 / 32 * GEMM8_TILES];
  float late[16 * GEMM8_TILES];
  const int64_t next_bytes = column_lanes(p.format) ? 0 : DEPTH8 * 16 * p.format.bits / 8;  // the rows of a lut tile lie apart: see unpack_rows
  const bool direct = VNNI && p.format.kind == UNIFORM && p.format.bits == 8;  // lie in memory as in a panel
  PanelJob a{panel, direct ? (int64_t)p.code_step : TILE8, in.bytes, 0, 0, reading(p.format, scales_late(j, p.format, pieces)), in, scales, {}, next_bytes, false, false, nullptr};
  for (int64_t c0 = 0; c0 < padded; c0 += DEPTH8) {
    const int64_t c1 = c0 + DEPTH8 < padded ? c0 + DEPTH8 : padded;
    a.c0 = c0, a.c1 = c1, a.first = index == 0 && c0 == 0, a.last = index + 1 == pieces && c1 == padded;
    if (direct) a.panel = j.blob + p.codes + k.first * p.code_step + 16 * c0;
    for (int64_t t = 0; t < k.count; t++) {
      const int64_t tile = k.first + t, tile_rows = k.rows - 16 * t < 16 ? k.rows - 16 * t : 16;
      a.next[t] = next_codes(j, p, tile, c0);
      fetch_scales(j, p, tile, c1 < padded ? c1 : -1);
      if (!direct) unpack_panel(j, p, tile, tile_rows, in.group, c0, c1, panel + TILE8 * t);
      for (int64_t c = c0, i = 0; c < c1; c += in.group, i++) {
        GroupScale& to = scales[i * GEMM8_TILES + t];
        if (p.format.kind != LUT) {
          to = group_scale(tile_of(j.blob, p, tile), c / in.group);
        } else {
          float unit[16] = {0};
          for (int64_t r = 0; r < tile_rows; r++) unit[r] = lut_unit(j.blob + p.scales + (tile * 16 + r) * p.scale_step);
          to = {load(unit), zero()};
        }
      }
    }
    if (a.last && a.how.late) {
      for (int64_t t = 0; t < k.count; t++) store(late + 16 * t, scales[t].scale);
      a.late = late;
    }
    unroll<GEMM8_TILES>([&](auto n) MXQ_LAMBDA {
      constexpr int NV = decltype(n)::value + 1;
      if (k.count != NV) return;
      if (a.how.small) gemm8_all_blocks<NV, true>(j, k, a);
      else gemm8_all_blocks<NV, VNNI>(j, k, a);
    });
  }
}

}  // namespace MXQ_TARGET
}  // namespace mxq
