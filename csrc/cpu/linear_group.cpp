// Several gemv over one x: what each needs of x is prepared first, then the chunks of all weights are handed out as one list.
#include "linear_group.h"

#include <string.h>

#include <algorithm>

#include "driver.h"
#include "linear.h"
#include "parallel.h"
#include "scratch.h"
#include "targets.h"

namespace mxq {
namespace {

thread_local Scratch scratch;

constexpr int MAX_ITEMS = 4;
constexpr int64_t WORK_PER_THREAD = 100000, CHUNK_BYTES = 256 << 10;  // see linear.cpp

int64_t aligned(int64_t floats) { return round_up(floats, 16); }

// Floats of what prepare() makes of x.
struct Sizes {
  int64_t slots, sums, units, bytes;
  Sizes(const Header& h, int64_t m, bool a8)
      : slots(aligned(m * int64_t(h.slot_floats))), sums(aligned(m * int64_t(h.slot_sums))), units(a8 ? aligned(m * int64_t(h.slot8_scales)) : 0),
        bytes(a8 ? aligned(ceil_div(m * int64_t(h.slot8_bytes), 4)) : 0) {}
  int64_t total() const { return slots + sums + 2 * units + bytes; }
};

// Whether prepare() makes the same of x for both.
bool same_input(const Job& a, const Job& b) {
  const Header &g = header(a.blob), &h = header(b.blob);
  if (a.a8 != b.a8 || g.off_perm_cols || h.off_perm_cols || g.slots != h.slots || g.slots8 != h.slots8) return false;
  return !memcmp(at<Slot>(a.blob, g.off_slots), at<Slot>(b.blob, h.off_slots), sizeof(Slot) * g.slots) &&
         !memcmp(at<Slot8>(a.blob, g.off_slots8), at<Slot8>(b.blob, h.off_slots8), sizeof(Slot8) * g.slots8);
}

}  // namespace

void linear_group(const GroupItem* items, int count, const void* x, int64_t ldx, int type, int64_t m, int threads) {
  const auto in_integers = [&](const GroupItem& i) { return i.a8 && header(i.blob).slots8; };
  int64_t work = 0, tiles_of_all = 0;
  bool gemm = false;
  for (const GroupItem* i = items; i < items + count; i++) {
    const Header& h = header(i->blob);
    work += int64_t(h.n) * h.k * m, tiles_of_all += h.tiles;
    gemm = gemm || uses_gemm(m, in_integers(*i));
  }
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, work / WORK_PER_THREAD)));
  // Alone, one after the other is as fast and has each weight's first bytes fetched early; many rows have enough work for a section each.
  if (threads == 1 || gemm || count == 1 || count > MAX_ITEMS) {
    for (const GroupItem* i = items; i < items + count; i++) linear(i->blob, x, ldx, type, m, i->y, i->bias, i->bias_type, i->a8, threads);
    return;
  }

  const Target& target = current_target();
  Job jobs[MAX_ITEMS];
  int from[MAX_ITEMS];  // whose input an item reads
  int64_t floats = 0;
  for (int i = 0; i < count; i++) {
    Job& j = jobs[i];
    j = Job{};
    j.blob = items[i].blob, j.x = x, j.ldx = ldx, j.type = type, j.y = items[i].y, j.bias = items[i].bias, j.bias_type = items[i].bias_type;
    j.m = m, j.a8 = in_integers(items[i]);
    j.blocks = ceil_div(m, (j.a8 ? target.a8 : target.a16).gemv_block);
    for (from[i] = 0; from[i] < i && !same_input(jobs[from[i]], j);) from[i]++;
    if (from[i] == i) floats += Sizes(header(j.blob), m, j.a8).total();
  }
  float* at_float = scratch.get(floats);
  for (int i = 0; i < count; i++) {
    Job& j = jobs[i];
    if (from[i] < i) {
      const Job& other = jobs[from[i]];
      j.xs = other.xs, j.sums = other.sums, j.units = other.units, j.byte_sums = other.byte_sums, j.bytes = other.bytes;
      continue;
    }
    const Sizes s(header(j.blob), m, j.a8);
    j.xs = at_float, j.sums = j.xs + s.slots, j.units = j.sums + s.sums;
    j.byte_sums = reinterpret_cast<int32_t*>(j.units + s.units);
    j.bytes = reinterpret_cast<int8_t*>(j.units + 2 * s.units);
    at_float += s.total();
    for (int64_t b = 0; b < j.blocks; b++) target.prepare(j, b);
  }

  // A few chunks for each thread, none of them across two bands.
  struct Run {
    const Job* job;
    const Band* band;
    int64_t step, index;  // of the chunk within the band
  };
  const auto step_of = [&](const Header& h) {
    const int64_t tile_bytes = std::max<int64_t>(1, int64_t(h.work) / std::max<int64_t>(1, h.tiles)), few = std::max<int64_t>(1, tiles_of_all / (4 * threads));
    return std::min(few, ceil_div(CHUNK_BYTES, tile_bytes));
  };
  const auto find = [&](int64_t i) {
    for (int n = 0;; n++) {
      const Header& h = header(jobs[n].blob);
      const int64_t step = step_of(h);
      const Band* band = at<Band>(jobs[n].blob, h.off_bands);
      for (uint32_t b = 0; b < h.bands; b++, band++) {
        const int64_t chunks = ceil_div(tiles(band->r1 - band->r0), step);
        if (i < chunks) return Run{&jobs[n], band, step, i};
        i -= chunks;
      }
    }
  };
  int64_t chunks = 0;
  for (int n = 0; n < count; n++) {
    const Header& h = header(jobs[n].blob);
    const Band* band = at<Band>(jobs[n].blob, h.off_bands);
    for (uint32_t b = 0; b < h.bands; b++, band++) chunks += ceil_div(tiles(band->r1 - band->r0), step_of(h));
  }
  parallel_for(chunks, threads, [&](int64_t i, int) {
    const Run run = find(i);
    const int64_t end = run.band->first_tile + tiles(run.band->r1 - run.band->r0), tile0 = run.band->first_tile + run.index * run.step;
    target.gemv(*run.job, tile0, std::min(tile0 + run.step, end), nullptr);
  });
}

}  // namespace mxq
