// Python module mxq_ext._cpu. Pointers and sizes come in as integers, so that neither torch nor numpy is needed to build it.
// Everything is checked by the caller (mxq_ext/ops.py); what is checked here is only what Python cannot see: the blob's own header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/attention.h"
#include "cpu/driver.h"
#include "cpu/layer.h"
#include "cpu/linear_group.h"
#include "cpu/parallel.h"
#include "cpu/prepack.h"
#include "cpu/reference.h"
#include "cpu/targets.h"

namespace py = pybind11;
using namespace mxq;

namespace {

template <class T>
T* ptr(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

// (kind, bits, zero, bf16, group)
Format format_of(const py::tuple& t) {
  return {t[0].cast<uint8_t>(), t[1].cast<uint8_t>(), t[2].cast<uint8_t>(), t[3].cast<uint8_t>(), t[4].cast<uint32_t>()};
}

// (r0, r1, c0, c1, format, codes, scales, zeros)
Canonical canonical_of(const py::tuple& t) {
  return {{t[0].cast<uint32_t>(), t[1].cast<uint32_t>(), t[2].cast<uint32_t>(), t[3].cast<uint32_t>(), format_of(t[4].cast<py::tuple>())},
          ptr<uint8_t>(t[5].cast<uintptr_t>()), ptr<uint8_t>(t[6].cast<uintptr_t>()), ptr<uint8_t>(t[7].cast<uintptr_t>())};
}

// (n, k, [rectangles], perm_rows, perm_cols, rowptr, cols, values, nnz); absent parts are 0
Weight weight_of(const py::tuple& t) {
  Weight w{t[0].cast<int64_t>(), t[1].cast<int64_t>(), {}};
  for (const py::handle r : t[2].cast<py::list>()) w.rects.push_back(canonical_of(py::reinterpret_borrow<py::tuple>(r)));
  w.perm_rows = ptr<int32_t>(t[3].cast<uintptr_t>());
  w.perm_cols = ptr<int32_t>(t[4].cast<uintptr_t>());
  w.rowptr = ptr<int32_t>(t[5].cast<uintptr_t>());
  w.cols = ptr<int32_t>(t[6].cast<uintptr_t>());
  w.values = ptr<uint16_t>(t[7].cast<uintptr_t>());
  w.nnz = t[8].cast<int64_t>();
  return w;
}

const Header& checked(uintptr_t blob, int64_t nbytes) {
  const Header& h = header(ptr<uint8_t>(blob));
  if (nbytes < int64_t(sizeof(Header)) || h.magic != BLOB_MAGIC || h.nbytes != uint64_t(nbytes))
    throw py::value_error("these bytes are no prepacked weight of this version");
  return h;
}

// What is needed to allocate the canonical tensors again.
py::dict describe(uintptr_t blob, int64_t nbytes) {
  const Header& h = checked(blob, nbytes);
  const uint8_t* b = ptr<uint8_t>(blob);
  py::list rects;
  for (uint32_t i = 0; i < h.rects; i++) {
    const Rect& r = at<Rect>(b, h.off_rects)[i];
    rects.append(py::make_tuple(r.r0, r.r1, r.c0, r.c1, format_name(r.format)));
  }
  py::dict d;
  d["n"] = h.n, d["k"] = h.k, d["rectangles"] = rects, d["format_name"] = blob_format_name(b);
  d["perm_rows"] = h.off_perm_rows, d["perm_cols"] = h.off_perm_cols;  // offsets of int32 data; 0: none
  d["rowptr"] = h.off_rowptr, d["cols"] = h.off_cols, d["values"] = h.off_values, d["nnz"] = h.nnz;
  return d;
}

// (side, bits, group, head dimension, outliers)
PageFormat page_format_of(const py::tuple& t) {
  return {t[0].cast<uint8_t>(), t[1].cast<uint8_t>(), t[2].cast<int32_t>(), t[3].cast<int32_t>(), t[4].cast<int32_t>()};
}

// (data, type, tokens, strides of batch, head and token)
Rows rows_of(const py::tuple& t) {
  return {ptr<void>(t[0].cast<uintptr_t>()), t[1].cast<int>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(), t[4].cast<int64_t>(), t[5].cast<int64_t>()};
}

// q: (batch, heads, tokens, address of lse); pages: (address of PageParts, pages, heads of all sequences, levels of keys and of values, turns of pages and of
// tokens, half, () or the other kind: (formats of keys and values, their levels, high, round)); mask: (data, strides of batch and query), data 0 for none
Attend attend_of(const py::tuple& key, const py::tuple& value, const py::tuple& shape, const py::tuple& q, const py::tuple& out, const py::tuple& pages,
                 const py::tuple& sink_k, const py::tuple& sink_v, const py::tuple& tail_k, const py::tuple& tail_v, int64_t total, float scale, bool causal,
                 int64_t window, float cap, const py::tuple& mask) {
  Attend a{};
  const auto levels = [](const py::handle& address) { return ptr<float>(address.cast<uintptr_t>()); };
  a.kind = {page_format_of(key), page_format_of(value), levels(pages[3]), levels(pages[4])};
  if (const py::tuple low = pages[8].cast<py::tuple>(); !low.empty()) {
    a.low = {page_format_of(low[0].cast<py::tuple>()), page_format_of(low[1].cast<py::tuple>()), levels(low[2]), levels(low[3])};
    a.high = low[4].cast<int64_t>(), a.round = low[5].cast<int64_t>();
  }
  a.batch = shape[0].cast<int64_t>(), a.q_heads = shape[1].cast<int64_t>(), a.queries = shape[2].cast<int64_t>();
  a.lse = ptr<float>(shape[3].cast<uintptr_t>());
  a.q = rows_of(q), a.out = rows_of(out);
  a.pages = ptr<PageParts>(pages[0].cast<uintptr_t>()), a.page_count = pages[1].cast<int64_t>(), a.kv_heads = pages[2].cast<int64_t>() / a.batch;
  a.turns = {ptr<float>(pages[5].cast<uintptr_t>()), ptr<float>(pages[6].cast<uintptr_t>()), pages[7].cast<int64_t>()};
  a.sink_k = rows_of(sink_k), a.sink_v = rows_of(sink_v), a.tail_k = rows_of(tail_k), a.tail_v = rows_of(tail_v);
  a.total = total, a.scale = scale, a.cap = cap, a.causal = causal, a.window = window;
  a.mask = ptr<uint8_t>(mask[0].cast<uintptr_t>()), a.mask_batch = mask[1].cast<int64_t>(), a.mask_query = mask[2].cast<int64_t>();
  return a;
}

// (blob, bias, type of bias, a8)
LayerLinear layer_linear_of(const py::handle& h) {
  const py::tuple t = py::reinterpret_borrow<py::tuple>(h);
  return {ptr<uint8_t>(t[0].cast<uintptr_t>()), ptr<void>(t[1].cast<uintptr_t>()), t[2].cast<int>(), t[3].cast<bool>()};
}

// shape: (type, hidden, q_heads, kv_heads, dim, inner, eps, final norm); layers: (both norms, q_norm, k_norm, scale, window, (q, k, v, o, gate, up, down))
LayerStack layer_stack_of(const py::tuple& shape, const py::list& layers) {
  LayerStack s{shape[0].cast<int>(), shape[1].cast<int64_t>(), shape[2].cast<int64_t>(), shape[3].cast<int64_t>(), shape[4].cast<int64_t>(),
               shape[5].cast<int64_t>(), shape[6].cast<float>(), ptr<void>(shape[7].cast<uintptr_t>()), {}};
  for (const py::handle h : layers) {
    const py::tuple t = py::reinterpret_borrow<py::tuple>(h), w = t[6].cast<py::tuple>();
    const auto norm = [&](int i) { return ptr<void>(t[i].cast<uintptr_t>()); };
    s.layers.push_back({norm(0), norm(1), norm(2), norm(3), layer_linear_of(w[0]), layer_linear_of(w[1]), layer_linear_of(w[2]), layer_linear_of(w[3]),
                        layer_linear_of(w[4]), layer_linear_of(w[5]), layer_linear_of(w[6]), t[4].cast<float>(), t[5].cast<int64_t>()});
  }
  return s;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of mxq_ext; call them through mxq_ext.ops.";

  m.def("targets", usable_targets);
  m.def("target", [] { return std::string(current_target().name); });
  m.def("set_target", set_target);
  m.def("uses_gemm", [](uintptr_t blob, int64_t m, bool a8) { return uses_gemm(reinterpret_cast<const uint8_t*>(blob), m, a8); });

  m.def("blob_nbytes", [](const py::tuple& w) { return blob_nbytes(weight_of(w)); });
  m.def("prepack", [](const py::tuple& t, uintptr_t blob, int threads) {
    const Weight w = weight_of(t);
    py::gil_scoped_release release;
    prepack(w, ptr<uint8_t>(blob), threads);
  });
  m.def("describe", describe);
  m.def("shape", [](uintptr_t blob, int64_t nbytes) {
    const Header& h = checked(blob, nbytes);
    return std::make_pair(h.n, h.k);
  });
  m.def("unpack", [](uintptr_t blob, const py::list& rects, int threads) {
    std::vector<Canonical> out;
    for (const py::handle r : rects) out.push_back(canonical_of(py::reinterpret_borrow<py::tuple>(r)));
    py::gil_scoped_release release;
    for (size_t i = 0; i < out.size(); i++) unpack(ptr<uint8_t>(blob), uint32_t(i), out[i], threads);
  });

  m.def("linear", [](uintptr_t blob, uintptr_t x, int64_t ldx, int type, int64_t rows, uintptr_t y, uintptr_t bias, int bias_type, bool a8,
                    int threads) {
    py::gil_scoped_release release;
    linear(ptr<uint8_t>(blob), ptr<void>(x), ldx, type, rows, ptr<void>(y), ptr<void>(bias), bias_type, a8, threads);
  });
  m.def("linear_group", [](const py::list& group, uintptr_t x, int64_t ldx, int type, int64_t rows, int threads) {
    std::vector<GroupItem> items;
    for (const py::handle h : group) {
      const LayerLinear w = layer_linear_of(h);
      items.push_back({w.blob, w.bias, w.bias_type, w.a8, ptr<void>(py::reinterpret_borrow<py::tuple>(h)[4].cast<uintptr_t>())});
    }
    py::gil_scoped_release release;
    linear_group(items.data(), int(items.size()), ptr<void>(x), ldx, type, rows, threads);
  });
  m.def("embedding", [](uintptr_t blob, uintptr_t ids, int64_t count, uintptr_t y, int type, int threads) {
    py::gil_scoped_release release;
    embedding(ptr<uint8_t>(blob), ptr<int64_t>(ids), count, ptr<void>(y), type, threads);
  });

  m.def("ref_dequantize", [](const py::tuple& t, uintptr_t y) {
    const Weight w = weight_of(t);
    py::gil_scoped_release release;
    ref::dequantize(w, ptr<float>(y));
  });
  m.def("ref_linear", [](const py::tuple& t, uintptr_t x, int64_t ldx, int type, int64_t rows, uintptr_t y, uintptr_t bias, int bias_type,
                        bool a8) {
    const Weight w = weight_of(t);
    py::gil_scoped_release release;
    ref::linear(w, ptr<void>(x), ldx, type, rows, ptr<void>(y), ptr<void>(bias), bias_type, a8);
  });
  m.def("ref_embedding", [](const py::tuple& t, uintptr_t ids, int64_t count, uintptr_t y, int type) {
    const Weight w = weight_of(t);
    py::gil_scoped_release release;
    ref::embedding(w, ptr<int64_t>(ids), count, ptr<void>(y), type);
  });

  m.def("kv_pack", [](const py::tuple& f, const py::tuple& x, int64_t batch, int64_t heads, uintptr_t codes, uintptr_t params, uintptr_t levels,
                     int threads) {
    const PageFormat format = page_format_of(f);
    const Rows rows = rows_of(x);
    py::gil_scoped_release release;
    pack_page(format, ptr<float>(levels), rows, batch, heads, ptr<uint8_t>(codes), ptr<uint16_t>(params), threads);
  });
  m.def("kv_unpack", [](const py::tuple& f, uintptr_t codes, uintptr_t params, uintptr_t levels, int64_t heads, uintptr_t out, int type, int threads) {
    const PageFormat format = page_format_of(f);
    py::gil_scoped_release release;
    unpack_page(format, ptr<float>(levels), ptr<uint8_t>(codes), ptr<uint16_t>(params), heads, ptr<void>(out), type, threads);
  });
  m.def("kv_attend", [](const py::tuple& key, const py::tuple& value, const py::tuple& shape, const py::tuple& q, const py::tuple& out, const py::tuple& pages,
                       const py::tuple& sink_k, const py::tuple& sink_v, const py::tuple& tail_k, const py::tuple& tail_v, int64_t total, float scale,
                       bool causal, int64_t window, float cap, const py::tuple& mask, int threads) {
    const Attend a = attend_of(key, value, shape, q, out, pages, sink_k, sink_v, tail_k, tail_v, total, scale, causal, window, cap, mask);
    py::gil_scoped_release release;
    attend(a, threads);
  });
  m.def("kv_pack_ref", [](const py::tuple& f, const py::tuple& x, int64_t batch, int64_t heads, uintptr_t codes, uintptr_t params, uintptr_t levels) {
    const PageFormat format = page_format_of(f);
    const Rows rows = rows_of(x);
    py::gil_scoped_release release;
    ref::pack_page(format, ptr<float>(levels), rows, batch, heads, ptr<uint8_t>(codes), ptr<uint16_t>(params));
  });
  m.def("kv_unpack_ref", [](const py::tuple& f, uintptr_t codes, uintptr_t params, uintptr_t levels, int64_t heads, uintptr_t out, int type) {
    const PageFormat format = page_format_of(f);
    py::gil_scoped_release release;
    ref::unpack_page(format, ptr<float>(levels), ptr<uint8_t>(codes), ptr<uint16_t>(params), heads, ptr<void>(out), type);
  });
  m.def("kv_attend_ref", [](const py::tuple& key, const py::tuple& value, const py::tuple& shape, const py::tuple& q, const py::tuple& out,
                           const py::tuple& pages, const py::tuple& sink_k, const py::tuple& sink_v, const py::tuple& tail_k, const py::tuple& tail_v,
                           int64_t total, float scale, bool causal, int64_t window, float cap, const py::tuple& mask) {
    const Attend a = attend_of(key, value, shape, q, out, pages, sink_k, sink_v, tail_k, tail_v, total, scale, causal, window, cap, mask);
    py::gil_scoped_release release;
    ref::attend(a);
  });

  py::class_<LayerStack>(m, "LayerStack").def(py::init(&layer_stack_of));
  m.def("run_layers", [](const LayerStack& stack, uintptr_t x, int64_t batch, int64_t tokens, uintptr_t caches, int64_t first, int64_t last, bool finish,
                         uintptr_t cos, uintptr_t sin, int64_t positions, uintptr_t position, int64_t position_batch, uintptr_t mask, int64_t mask_batch,
                         int threads) {
    const LayerCall call{ptr<void>(x), batch, tokens, ptr<LayerCache>(caches), first, last, finish, ptr<void>(cos), ptr<void>(sin), positions,
                         ptr<int64_t>(position), position_batch, ptr<uint8_t>(mask), mask_batch};
    py::gil_scoped_release release;
    return run_layers(stack, call, threads);
  });

  // formats.h and kv_formats.h as data, for the test that holds it to mxq_ext/formats.py.
  m.attr("NF4_LEVELS") = std::vector<float>(NF4_LEVELS, NF4_LEVELS + 16);
  m.def("format_name", [](const py::tuple& f) { return format_name(format_of(f)); });
  m.def("canonical_row_bytes", [](const py::tuple& f, int64_t cols) {
    const Format g = format_of(f);
    return py::make_tuple(code_row_bytes(g, cols), scale_row_bytes(g, cols), zero_row_bytes(g, cols));
  });
  m.attr("OUTLIER_BYTES") = OUTLIER_BYTES;
  m.def("kv_page", [](const py::tuple& f) {  // bytes of codes and outliers, fp16 numbers of params
    const PageFormat g = page_format_of(f);
    return py::make_tuple(page_bytes(g), page_params(g));
  });
  m.def("canonical_nbytes", [](const py::tuple& f, int64_t rows, int64_t cols) { return canonical_nbytes(format_of(f), rows, cols); });
}
