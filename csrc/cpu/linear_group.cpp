// Several gemv over one x: what each needs of x is prepared first, then the chunks of all weights are handed out as one list.
#include "linear_group.h"

#include <string.h>

#include "driver.h"
#include "linear_split.h"
#include "parallel.h"
#include "scratch.h"
#include "targets.h"

namespace mxq {
namespace {

thread_local Scratch scratch;

constexpr int MAX_ITEMS = 4;

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
  const Target& target = current_target();
  int64_t work = 0, tiles_of_all = 0;
  bool apart = m > GEMV_ROWS;
  for (const GroupItem* i = items; i < items + count; i++) {
    const Header& h = header(i->blob);
    work += int64_t(h.n) * h.k * m, tiles_of_all += h.tiles;
    Job job{};
    job.blob = i->blob, job.m = m, job.a8 = in_integers(*i), job.gemm = uses_gemm(target, i->blob, m, job.a8);
    apart = apart || target.scratch_floats(job);
  }
  threads = useful_threads(work, threads);
  // Alone, one after the other is as fast and has each weight's first bytes fetched early; many rows have enough work for a section each.
  if (threads == 1 || apart || count == 1 || count > MAX_ITEMS) {
    for (const GroupItem* i = items; i < items + count; i++) linear(i->blob, x, ldx, type, m, i->y, i->bias, i->bias_type, i->a8, threads);
    return;
  }

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
    if (from[i] == i) floats += InputSizes(header(j.blob), m, j.a8, target.signs_apart).total();
  }
  float* at_float = scratch.get(floats);
  for (int i = 0; i < count; i++) {
    Job& j = jobs[i];
    if (from[i] < i) {
      const Job& other = jobs[from[i]];
      j.xs = other.xs, j.sums = other.sums, j.units = other.units, j.byte_sums = other.byte_sums, j.bytes = other.bytes;
      j.apart = other.apart, j.negatives = other.negatives;
      continue;
    }
    const InputSizes inputs(header(j.blob), m, j.a8, target.signs_apart);
    inputs.place(j, at_float);
    at_float += inputs.total();
    for (int64_t b = 0; b < j.blocks; b++) target.prepare(j, b);
  }

  int64_t step[MAX_ITEMS], chunks[MAX_ITEMS], all = 0;
  for (int n = 0; n < count; n++) {
    step[n] = gemv_step(header(jobs[n].blob), tiles_of_all, threads);
    all += chunks[n] = count_chunks(jobs[n].blob, step[n]);
  }
  parallel_for(all, threads, [&](int64_t i, int) {
    int n = 0;
    for (; i >= chunks[n]; n++) i -= chunks[n];
    const TileRange r = chunk_tiles(jobs[n].blob, step[n], i);
    target.gemv(jobs[n], r.begin, r.end, nullptr);
  });
}

}  // namespace mxq
