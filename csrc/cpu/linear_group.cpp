#include "linear_group.h"

#include "driver.h"

namespace mxq {

void linear_group(const GroupItem* items, int count, const void* x, int64_t ldx, int type, int64_t m, int threads) {
  for (const GroupItem* i = items; i < items + count; i++) linear(i->blob, x, ldx, type, m, i->y, i->bias, i->bias_type, i->a8, threads);
}

}  // namespace mxq
