// The plain-loop twins of the KV cache ops: one number at a time, by the drawings in formats.h and kv_formats.h.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "attention.h"
#include "numbers.h"

namespace mxq::ref {
namespace {

double read(const Rows& r, int64_t b, int64_t h, int64_t t, int64_t d) { return read_number(r.data, b * r.batch + h * r.head + t * r.token + d, r.type); }

// Bit `j` of the code in row `row` and column `col`: its byte in the page, and its place there.
struct Bit {
  int64_t byte;
  int bit;
};
Bit bit_of(PageFormat f, int64_t row, int64_t col, int j) {
  const int64_t stripe = row / LANES * page_tile_bytes(f) + col / STRIPE * f.bits * 64, lane = row % LANES;
  const int quad = int(col % STRIPE) / 4, byte = int(col % 4);
  int word, bit;
  if (f.bits == 3 && quad >= 6) {
    word = j == 2 ? 1 : quad == 6 ? 0 : 2;
    bit = j == 2 ? quad : 6 + j;
  } else {
    const int per = quads_per_word(f.bits);
    word = quad / per;
    bit = f.bits * (quad % per) + j;
  }
  return {stripe + 64 * word + 4 * lane + byte, bit};
}

int64_t half_of(int64_t row, int64_t col, int64_t cols) { return (row / LANES * cols + col) * LANES + row % LANES; }  // of a 16-bit page

// Number of token t, channel d.
float number_at(PageFormat f, const float* levels, const uint8_t* codes, const uint16_t* params, int64_t t, int64_t d) {
  const int64_t row = f.side == KEYS ? t : d, col = f.side == KEYS ? d : t, cols = page_cols(f);
  if (f.bits == 16) return half_to_float(load_u16(codes + 2 * half_of(row, col, cols)));
  int code = 0;
  for (int j = 0; j < f.bits; j++) {
    const Bit b = bit_of(f, row, col, j);
    code |= (codes[b.byte] >> b.bit & 1) << j;
  }
  code ^= 1 << (f.bits - 1);
  const uint16_t* s = params + row / page_group_rows(f) * 2 * cols;
  return half_to_float(s[col]) * (levels ? levels[code] : float(code)) + half_to_float(s[cols + col]);
}

// Calls f(token, channel, delta) for the outliers of a page.
template <class F>
void each_outlier(PageFormat f, const uint8_t* codes, F&& call) {
  const uint8_t *index = codes + page_code_bytes(f), *delta = index + 2 * f.outliers;
  for (int64_t i = 0; i < f.outliers; i++) call(load_u16(index + 2 * i) / OUTLIER_TOKEN, load_u16(index + 2 * i) % OUTLIER_TOKEN, half_to_float(load_u16(delta + 2 * i)));
}

// Keys of one page [64][head], turned by their places in it and then by the page's own position.
void turn_page(const Turns& turns, int64_t page, int64_t head, double* keys) {
  const float* of_page = turns.pages + page * 2 * turns.half;
  for (int64_t t = 0; t < PAGE; t++) {
    for (int64_t c = 0; c < turns.half; c++) {
      const float* of_token = turns.tokens + ((t / LANES * turns.half + c) * 2) * LANES + t % LANES;
      double &a = keys[t * head + c], &b = keys[t * head + c + turns.half];
      const double angles[2][2] = {{of_token[0], of_token[LANES]}, {of_page[c], of_page[c + turns.half]}};
      for (const auto& [cos, sin] : angles) {
        const double turned = a * cos - b * sin;
        b = b * cos + a * sin, a = turned;
      }
    }
  }
}

// The nearest of n levels, the lower one of two.
int nearest(const float* levels, int n, float v) {
  int code = 0;
  for (int i = 0; i + 1 < n; i++) code += v > 0.5f * (levels[i] + levels[i + 1]);
  return code;
}

float clamp(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

// Whether each number of a page is an outlier: [row][column]; `number` gives them.
template <class N>
std::vector<bool> outliers_of(PageFormat f, N&& number) {
  const int64_t rows = page_rows(f), cols = page_cols(f), height = page_group_rows(f);
  std::vector<bool> out(size_t(rows * cols));
  std::vector<std::pair<float, int64_t>> far;  // (-distance, index): the first ones are the furthest
  for (int64_t r0 = 0; r0 < rows && f.outliers; r0 += height) {
    const int64_t r1 = std::min(rows, r0 + height);
    for (int64_t col = 0; col < cols; col++) {
      double sum = 0.0;
      bool fits = true;
      for (int64_t row = r0; row < r1; row++) sum += double(number(row, col)), fits = fits && std::fabs(number(row, col)) <= MOST_OUTLIER;
      const float mean = float(sum / double(r1 - r0));
      for (int64_t row = r0; row < r1 && fits; row++)
        if (const float distance = std::fabs(number(row, col) - mean); distance > 0.0f)
          far.emplace_back(-distance, f.side == KEYS ? OUTLIER_TOKEN * row + col : OUTLIER_TOKEN * col + row);
    }
  }
  std::sort(far.begin(), far.end());
  for (size_t i = 0; i < far.size() && i < size_t(f.outliers); i++) {
    const int64_t token = far[i].second / OUTLIER_TOKEN, channel = far[i].second % OUTLIER_TOKEN;
    out[size_t(f.side == KEYS ? token * cols + channel : channel * cols + token)] = true;
  }
  return out;
}

}  // namespace

void pack_page(PageFormat f, const float* levels, const Rows& x, int64_t batch, int64_t heads, uint8_t* codes, uint16_t* params) {
  const int64_t rows = page_rows(f), cols = page_cols(f), height = page_group_rows(f);
  for (int64_t i = 0; i < batch * heads; i++, codes += page_bytes(f), params += page_params(f)) {
    const auto number = [&](int64_t row, int64_t col) {
      return float(f.side == KEYS ? read(x, i / heads, i % heads, row, col) : read(x, i / heads, i % heads, col, row));
    };
    std::fill(codes, codes + page_bytes(f), uint8_t(0));
    const std::vector<bool> outlier = outliers_of(f, number);
    std::vector<std::pair<int64_t, uint16_t>> kept;  // (index, delta)
    for (int64_t r0 = 0; r0 < rows; r0 += height) {
      const int64_t r1 = std::min(rows, r0 + height);
      for (int64_t col = 0; col < cols; col++) {
        if (f.bits == 16) {
          for (int64_t row = r0; row < r1; row++) {
            const float v = number(row, col);
            const uint16_t half = v != v ? 0x7e00 : float_to_half(std::isfinite(v) ? clamp(v, -MAX_HALF, MAX_HALF) : v);
            store_u16(codes + 2 * half_of(row, col, cols), half);
          }
          continue;
        }
        float least = HUGE_VALF, most = -HUGE_VALF;
        bool finite = true;
        for (int64_t row = r0; row < r1; row++) {
          finite = finite && std::isfinite(number(row, col));
          if (!outlier[size_t(row * cols + col)]) least = std::min(least, number(row, col)), most = std::max(most, number(row, col));
        }
        if (finite && least > most) least = most = 0.0f;  // all of them are outliers
        least += 0.0f, most += 0.0f;  // -0 becomes 0
        const float top = float((1 << f.bits) - 1);
        uint16_t* s = params + r0 / height * 2 * cols;
        const float step = levels ? 0.5f * most - 0.5f * least : (most - least) / top, zero_point = levels ? 0.5f * most + 0.5f * least : least;
        s[col] = finite ? float_to_half(std::min(step, MAX_HALF)) : 0x7e00;
        s[cols + col] = finite ? float_to_half(clamp(zero_point, -MAX_HALF, MAX_HALF)) : 0x7e00;
        const float scale = half_to_float(s[col]), zero = half_to_float(s[cols + col]), inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
        for (int64_t row = r0; row < r1; row++) {
          const float steps = (number(row, col) - zero) * inverse;
          const int nearest_code = levels ? nearest(levels, 1 << f.bits, steps) : int(std::nearbyint(clamp(steps, 0.0f, top)));
          const int code = (finite ? nearest_code : 0) ^ 1 << (f.bits - 1);
          for (int j = 0; j < f.bits; j++) {
            const Bit b = bit_of(f, row, col, j);
            codes[b.byte] |= uint8_t((code >> j & 1) << b.bit);
          }
          if (outlier[size_t(row * cols + col)]) {
            const float read = scale * (levels ? levels[nearest_code] : float(nearest_code)) + zero;
            kept.emplace_back(f.side == KEYS ? OUTLIER_TOKEN * row + col : OUTLIER_TOKEN * col + row, float_to_half(number(row, col) - read + 0.0f));
          }
        }
      }
    }
    std::sort(kept.begin(), kept.end());
    uint8_t *const index = codes + page_code_bytes(f), *const delta = index + 2 * f.outliers;
    for (size_t i = 0, at = size_t(f.outliers) - kept.size(); i < kept.size(); i++, at++) {
      store_u16(index + 2 * at, uint16_t(kept[i].first));
      store_u16(delta + 2 * at, kept[i].second);
    }
  }
}

void unpack_page(PageFormat f, const float* levels, const uint8_t* codes, const uint16_t* params, int64_t heads, void* out, int type) {
  for (int64_t i = 0; i < heads; i++, codes += page_bytes(f), params += page_params(f)) {
    for (int64_t t = 0; t < PAGE; t++)
      for (int64_t d = 0; d < f.head; d++) write_number(out, (i * PAGE + t) * f.head + d, type, number_at(f, levels, codes, params, t, d));
    each_outlier(f, codes, [&](int64_t t, int64_t d, float delta) {
      if (delta != 0.0f) write_number(out, (i * PAGE + t) * f.head + d, type, number_at(f, levels, codes, params, t, d) + delta);
    });
  }
}

void attend(const Attend& a) {
  const int64_t dim = a.kind.key.head, group = a.q_heads / a.kv_heads;
  std::vector<double> k(size_t(a.total * dim)), v(k.size()), p(size_t(a.total));
  for (int64_t b = 0; b < a.batch; b++) {
    for (int64_t h = 0; h < a.kv_heads; h++) {
      const int64_t pair = b * a.kv_heads + h, paged = a.sink_k.tokens + PAGE * a.page_count;
      for (int64_t t = 0; t < a.total; t++) {
        for (int64_t d = 0; d < dim; d++) {
          double &key = k[size_t(t * dim + d)], &value = v[size_t(t * dim + d)];
          if (t < a.sink_k.tokens) {
            key = read(a.sink_k, b, h, t, d), value = read(a.sink_v, b, h, t, d);
          } else if (t >= paged) {
            key = read(a.tail_k, b, h, t - paged, d), value = read(a.tail_v, b, h, t - paged, d);
          } else {
            const PageParts& page = a.pages[(t - a.sink_k.tokens) / PAGE];
            const int64_t token = (t - a.sink_k.tokens) % PAGE;
            const PageKind& kind = kind_of(a, (t - a.sink_k.tokens) / PAGE);
            key = number_at(kind.key, kind.key_levels, page.k_codes + pair * page_bytes(kind.key), page.k_params + pair * page_params(kind.key), token, d);
            value = number_at(kind.value, kind.value_levels, page.v_codes + pair * page_bytes(kind.value), page.v_params + pair * page_params(kind.value),
                              token, d);
          }
        }
      }
      for (int64_t i = 0; i < a.page_count; i++) {
        const PageKind& kind = kind_of(a, i);
        const int64_t start = a.sink_k.tokens + PAGE * i;
        each_outlier(kind.key, a.pages[i].k_codes + pair * page_bytes(kind.key),
                     [&](int64_t t, int64_t d, float delta) { k[size_t((start + t) * dim + d)] += double(delta); });
        each_outlier(kind.value, a.pages[i].v_codes + pair * page_bytes(kind.value),
                     [&](int64_t t, int64_t d, float delta) { v[size_t((start + t) * dim + d)] += double(delta); });
      }
      if (a.turns.half)
        for (int64_t i = 0; i < a.page_count; i++) turn_page(a.turns, i, dim, k.data() + (a.sink_k.tokens + PAGE * i) * dim);
      for (int64_t i = 0; i < a.queries; i++) {
        const int64_t position = a.total - a.queries + i;
        for (int64_t head = h * group; head < (h + 1) * group; head++) {
          double most = -HUGE_VAL, total = 0.0;
          for (int64_t t = 0; t < a.total; t++) {
            const bool hidden = (a.causal && t > position) || (a.window && t <= position - a.window) ||
                                (a.mask && !a.mask[b * a.mask_batch + i * a.mask_query + t]);
            double score = 0.0;
            for (int64_t d = 0; d < dim; d++) score += read(a.q, b, head, i, d) * k[size_t(t * dim + d)];
            score *= double(a.scale);
            if (a.cap) score = double(a.cap) * std::tanh(score / double(a.cap));
            p[size_t(t)] = hidden ? -HUGE_VAL : score;
            most = std::max(most, p[size_t(t)]);
          }
          for (int64_t t = 0; t < a.total; t++) total += p[size_t(t)] = p[size_t(t)] == -HUGE_VAL ? 0.0 : std::exp(p[size_t(t)] - most);
          if (a.lse) a.lse[(b * a.q_heads + head) * a.queries + i] = total == 0.0 ? -HUGE_VALF : float(most + std::log(total));
          for (int64_t d = 0; d < dim; d++) {
            double sum = 0.0;
            for (int64_t t = 0; t < a.total; t++) sum += p[size_t(t)] ? p[size_t(t)] * v[size_t(t * dim + d)] : 0.0;
            const int64_t at = b * a.out.batch + head * a.out.head + i * a.out.token + d;
            write_number(const_cast<void*>(a.out.data), at, a.out.type, total == 0.0 ? 0.0f : float(sum / total));
          }
        }
      }
    }
  }
}

}  // namespace mxq::ref
