// The constitution of the KV cache: a packed page of keys or values, drawn once. Kernels, twins, tests and docs/formats.md derive from this file.
// See formats.h for the comments that begin with a slash, two stars and "doc", and for why everything here is static.
#pragma once

#include "formats.h"

namespace mxq {

/**doc
# KV cache pages

The cache of attention is cut into *pages* of 64 tokens. A page belongs to one sequence, one key/value head and one *side*, keys or values, each with
2, 3, 4, 8 or 16 bits of its own. What lies before the first page (sink tokens) and behind the last one (the newest tokens) stays in floating point.

A page is stored as a small weight matrix in the prepacked layout above (row lanes, uniform or fp16), so that attention is two products with it:

| side | rows (lanes) | columns | product |
| --- | --- | --- | --- |
| keys | 64 tokens | `D` channels | scores: one column of the query for each channel |
| values | `D` channels | 64 tokens | output: one probability for each token |

`D`, the head dimension, is a multiple of 16 up to 512. The columns of codes are padded to a multiple of 32 with stored code 0; 16-bit pages are not padded.

    codes    2, 3, 4, 8 bits:  [tile of 16 rows][stripe of 32 columns]   `bits` vectors of 64 bytes, the drawing above
             16 bits:          [tile of 16 rows][column]                 16 fp16, one per row
    params   fp16 [group][2][columns]: first the scales s, then the zeros z; no params for 16 bits

Each column has a scale and a zero for each group of its rows: a group of keys is 64 tokens (the whole page) or 32, a group of values 32, 64 or 128
channels or the whole head; the last one may be ragged. Bytes of one head's page with one group, and bits per number with everything counted, at `D` = 128:

    bits                       2        3        4        8        16
    keys, group 64          2560     3584     4608     8704     16384      b + 32/64
    values, group 64        2560     3584     4608     8704     16384      b + 32/64
    values, whole head      2304     3328     4352     8448     16384      b + 32/128

Because a scale belongs to a column, it is multiplied into the vector and not into the codes, and the zeros make one number for each group:

    score[t] = sum over d of (query[d] * s[d]) * code[t][d] + sum over d of query[d] * z[d]
    out[d]   = sum over t of (p[t] * s[t]) * code[t][d]     + sum over t of p[t] * z[t]

### Rounding

`number = s * q + z` with `q` in 0 .. 2^bits - 1, stored centred like the codes of weights: `q - 2^(bits-1)` in two's complement. In float32, with every
operation rounded to nearest, ties to even, and -0 taken as 0:

    s = fp16((largest - smallest) / (2^bits - 1))       at most 65504
    z = fp16(smallest)                                  within +-65504
    q = round(min(max((number - z) * (1 / s), 0), 2^bits - 1))        0 if s is 0

with the rounded `s` and `z`. A group that holds an infinity or a NaN has the NaN 0x7e00 for `s` and `z`, and code 0: it stays visible. 16 bits store
fp16(number), finite numbers within +-65504, every NaN as 0x7e00.

### Codebooks

Pages of 2, 3 or 4 bits may have a codebook: 2^bits ascending levels within -1 .. 1 that fp16 holds, one for the keys and one for the values of a layer. It
belongs to the plan; the bytes of a page are the same. Then `number = s * level[q] + z`, so that a code is looked up where it is converted otherwise, and

    s = fp16((largest - smallest) / 2)                  halves are taken first; at most 65504
    z = fp16((largest + smallest) / 2)                  within +-65504
    q = how many of the middles of neighbouring levels lie below (number - z) * (1 / s)          0 if s is 0: then below 0

### Outliers

The page of a side may keep the numbers that its grids fit least beside their codes, `n` of them in every page, so that all pages are of one size: a spec's share
of the `64 D` numbers, to the nearest multiple of 16 that is not 0, which fills whole cache lines. Behind the codes of each head lie

    uint16 index[n]      512 * token + channel, ascending
    fp16   delta[n]      number - (s * q + z)

4 bytes each, so that a share of 1/100 costs 0.32 bits a number. They are the `n` numbers of the page that are furthest from the mean of their group,

    mean     = float32(sum of the group's numbers, in float64 and in their order / count)
    distance = |number - mean|      in float32, more than 0; of equal ones the lower index counts as further

and `s` and `z` come from what is left of the group; both are 0 where nothing is. Outliers have codes too, the nearest ones as above, and `delta` is what is missing,
in float32 and then rounded to fp16: attention adds one product for it. A group that holds a number beyond +-16384, an infinity or a NaN has no outliers, so that a
delta is always finite. Entries that a page does not need are the first ones, with index and delta 0.

### Keys before their rotary embedding

A page may hold keys before the rotary embedding, which turns the pair of channels `d` and `d + half` by an angle of position times frequency; it is applied when
the page is read. With R(p) the turn at position p, the first token of a page at p and token t of it,

    query . R(p + t) key[t] = (R(-p) query) . R(t) key[t]

so that the query is turned once for a page, and one table of 64 positions turns the keys of all pages. The bytes of a page are the same.

### Bits by token

A layer may have pages of two kinds, each with formats as above, that take turns: of each round of pages the first few are of salient tokens. Tokens then lie
in another order than in the text, an int16 for each token and sequence says in which; keys of such pages are those after the rotary embedding.

### Bits by head

The heads of a layer may have pages of different formats. Heads of one pair of formats, that of their keys and that of their values, then have pages in common,
one after the other in ascending order, and each pair has its own table of pages; all tables are of the same tokens.
*/
static constexpr int PAGE = 64;         // tokens
static constexpr int MAX_HEAD = 512;    // channels of a head
static constexpr float MAX_HALF = 65504.0f;

enum Side : uint8_t { KEYS = 0, VALUES = 1 };

struct PageFormat {
  uint8_t side;   // Side
  uint8_t bits;   // 2 3 4 8 16
  int32_t group;  // rows that share a column's scale: tokens of keys, channels of values; 0: all
  int32_t head;   // D
  int32_t outliers = 0;  // of a page: a multiple of 16
};
static constexpr int64_t OUTLIER_BYTES = 4;
static constexpr int64_t OUTLIER_TOKEN = MAX_HEAD;  // an index is so many times the token and the channel: nothing is divided by the head dimension
static constexpr float MOST_OUTLIER = 16384.0f;  // numbers of a group that has outliers

static constexpr bool has_params(PageFormat f) { return f.bits != 16; }
static constexpr int64_t page_rows(PageFormat f) { return f.side == KEYS ? PAGE : f.head; }
static constexpr int64_t page_cols(PageFormat f) { return f.side == KEYS ? f.head : PAGE; }
static constexpr int64_t padded_page_cols(PageFormat f) { return f.bits == 16 ? page_cols(f) : round_up(page_cols(f), STRIPE); }
static constexpr int64_t page_tile_bytes(PageFormat f) { return padded_page_cols(f) * LANES * f.bits / 8; }
static constexpr int64_t page_code_bytes(PageFormat f) { return tiles(page_rows(f)) * page_tile_bytes(f); }
// Of the codes and of the outliers behind them.
static constexpr int64_t page_bytes(PageFormat f) { return page_code_bytes(f) + OUTLIER_BYTES * f.outliers; }
static constexpr int64_t page_group_rows(PageFormat f) { return f.group && f.group < page_rows(f) ? f.group : page_rows(f); }
static constexpr int64_t page_groups(PageFormat f) { return has_params(f) ? ceil_div(page_rows(f), page_group_rows(f)) : 0; }
// fp16 numbers of one page's params.
static constexpr int64_t page_params(PageFormat f) { return page_groups(f) * 2 * page_cols(f); }

static constexpr int64_t whole_page_bytes(PageFormat f) { return page_bytes(f) + 2 * page_params(f); }
static_assert(whole_page_bytes({KEYS, 2, 64, 128}) * 8 == PAGE * 128 * 2.5, "2-bit keys: 2 + 32/64");
static_assert(whole_page_bytes({KEYS, 4, 32, 128}) * 8 == PAGE * 128 * 5, "4-bit keys by 32 tokens: 4 + 32/32");
static_assert(whole_page_bytes({VALUES, 4, 64, 128}) * 8 == PAGE * 128 * 4.5, "4-bit values by 64 channels: 4 + 32/64");
static_assert(whole_page_bytes({VALUES, 3, 0, 128}) * 8 == PAGE * 128 * 3.25, "3-bit values by head: 3 + 32/128");
static_assert(whole_page_bytes({KEYS, 16, 64, 80}) == PAGE * 80 * 2, "16 bits: no params, no padding");
static_assert(page_bytes({KEYS, 4, 64, 80}) == PAGE * 96 / 2 && page_bytes({VALUES, 4, 64, 80}) == PAGE * 80 / 2, "80 channels are padded as columns only");
static_assert(page_groups({VALUES, 4, 64, 80}) == 2, "a ragged last group");
static_assert(whole_page_bytes({KEYS, 4, 64, 128, 80}) * 8 == PAGE * 128 * (4.5 + 0.3125), "80 outliers of 8192 numbers: 0.3125 bits more");
static_assert(PAGE * OUTLIER_TOKEN <= 65536, "an index is 16 bits");

// Addresses of one page of all B * Hkv heads, each part contiguous over the heads.
struct PageParts {
  const uint8_t* k_codes;
  const uint16_t* k_params;
  const uint8_t* v_codes;
  const uint16_t* v_params;
};
static_assert(sizeof(PageParts) == 4 * sizeof(void*), "Python writes four addresses");

}  // namespace mxq
