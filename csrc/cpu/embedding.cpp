// Rows of the weight as they are: embedding lookup, and the whole weight for dequantize. Plain loops; a token needs one row.
#include <vector>

#include "convert.h"
#include "driver.h"
#include "linear.h"
#include "parallel.h"
#include "prepack.h"

namespace mxq {

void embedding(const uint8_t* blob, const int64_t* ids, int64_t count, void* y, int type, int threads) {
  const int64_t k = header(blob).k;
  if (count * k < 100000) threads = 1;
  std::vector<float> rows(type == F32 ? 0 : size_t(threads) * size_t(k));
  parallel_for(count, threads, [&](int64_t i, int worker) {
    const int64_t row = ids ? ids[i] : i;
    if (type == F32) return dequantize_row(blob, row, static_cast<float*>(y) + i * k);
    float* in = rows.data() + worker * k;
    uint16_t* out = static_cast<uint16_t*>(y) + i * k;
    dequantize_row(blob, row, in);
    for (int64_t c = 0; c < k; c++) out[c] = type == BF16 ? float_to_bf16(in[c]) : float_to_half(in[c]);
  });
}

}  // namespace mxq
