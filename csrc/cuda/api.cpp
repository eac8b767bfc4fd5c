// The C functions of the CUDA library: what csrc/bind_cuda.cpp gives to Python, and what the tests call through ctypes, both in the library that nvcc
// built and in the one that runs the same kernels on the CPU. Structs are those of prepack.h, launch.h, attention.h and layer.h, field for field.
#include "api.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <string>

#include "attention.h"
#include "launch.h"
#include "layer.h"
#include "prepack.h"

using namespace mxq;
using namespace mxq::cuda;

namespace {

int64_t copy_text(const std::string& text, char* out, int64_t size) {  // as much as fits, always ended
  if (size > 0) {
    const size_t n = std::min(text.size(), size_t(size - 1));
    std::memcpy(out, text.data(), n);
    out[n] = 0;
  }
  return int64_t(text.size());
}

struct Field {
  const char* name;
  size_t offset;
};

std::string layout(const char* name, size_t nbytes, std::initializer_list<Field> fields) {
  std::string text = name;
  for (const Field& f : fields) text += std::string(" ") + f.name + "=" + std::to_string(f.offset);
  return text + " sizeof=" + std::to_string(nbytes);
}

}  // namespace

MXQ_API void mxq_cuda_blob_sizes(const WeightDesc* w, int64_t* nbytes, int64_t* head_nbytes) {
  const Sizes s = blob_sizes(*w);
  *nbytes = s.nbytes, *head_nbytes = s.head_nbytes;
}
MXQ_API void mxq_cuda_prepack(const WeightDesc* w, uint8_t* blob, int64_t threads) { prepack(*w, blob, int(threads)); }
MXQ_API void mxq_cuda_unpack(const uint8_t* blob, int64_t rect, const RectDesc* out, int64_t threads) { unpack(blob, rect, *out, int(threads)); }

MXQ_API int64_t mxq_cuda_workspace_nbytes(const LinearCall* c) { return workspace_nbytes(*c); }
MXQ_API int64_t mxq_cuda_linear(const LinearCall* c) { return linear(*c); }
MXQ_API int64_t mxq_cuda_dequantize(const uint8_t* head, const uint8_t* blob, void* out, int64_t type, int64_t begin, int64_t count, int64_t stored_cols,
                                    void* stream) {
  return dequantize(head, blob, out, int(type), begin, count, stored_cols != 0, stream);
}
MXQ_API int64_t mxq_cuda_embedding(const uint8_t* head, const uint8_t* blob, const int64_t* ids, int64_t count, void* out, int64_t type, void* stream) {
  return embedding(head, blob, ids, count, out, int(type), stream);
}

MXQ_API int64_t mxq_cuda_explain(const LinearCall* c, char* text, int64_t size) {
  const Desc d = desc_of(*c);
  const Config config = config_of(*c, d);
  copy_text(describe(d, config), text, size);
  return config.ok ? config.path : 0;
}
MXQ_API int64_t mxq_cuda_kernel_name(const LinearCall* c, const char* format, char* text, int64_t size) {
  const Config config = config_of(*c, desc_of(*c));
  return copy_text(config.ok ? kernel_name(config, format, {int32_t(c->capability), int32_t(c->sms)}) : config.reason, text, size);
}

MXQ_API int64_t mxq_cuda_kv_workspace_nbytes(const AttendCall* c) { return attend_workspace_nbytes(*c); }
MXQ_API int64_t mxq_cuda_kv_attend(const AttendCall* c) { return attend(*c); }
MXQ_API int64_t mxq_cuda_kv_pack(const PageDesc* format, const Rows* x, int64_t batch, int64_t heads, uint8_t* codes, uint16_t* params, void* stream) {
  return pack_page(*format, *x, batch, heads, codes, params, stream);
}
MXQ_API int64_t mxq_cuda_kv_explain(const AttendCall* c, char* name, char* text, int64_t size) {
  const AttendDesc d = attend_desc(*c);
  const AttendConfig config = attend_config(*c);
  copy_text(config.ok ? attend_name(d) : "", name, size);
  copy_text(describe(d, config, c->bandwidth), text, size);
  return config.ok;
}

MXQ_API int64_t mxq_cuda_layers_workspace_nbytes(const LayersCall* c) { return layers_workspace_nbytes(*c); }
MXQ_API int64_t mxq_cuda_run_layers(const LayersCall* c) { return run_layers(*c); }

MXQ_API int64_t mxq_cuda_layouts(char* text, int64_t size) {
#define F(name) Field{#name, offsetof(S, name)}
  std::string all;
  {
    using S = RectDesc;
    all += layout("RectDesc", sizeof(S),
                  {F(r0), F(r1), F(c0), F(c1), F(kind), F(bits), F(zero), F(bf16), F(group), F(codes), F(scales), F(zeros)});
  }
  {
    using S = WeightDesc;
    all += "; " + layout("WeightDesc", sizeof(S),
                  {F(n), F(k), F(rect_count), F(nnz), F(rects), F(perm_rows), F(perm_cols), F(rowptr), F(cols), F(values)});
  }
  {
    using S = Output;
    all += "; " + layout("Output", sizeof(S), {F(head), F(blob), F(y), F(bias), F(ldy), F(bias_type)});
  }
  {
    using S = LinearCall;
    all += "; " + layout("LinearCall", sizeof(S),
                  {F(x), F(ldx), F(x_type), F(y_type), F(m), F(outputs), F(output), F(workspace), F(stream), F(path), F(capability), F(sms),
                   F(warps), F(blocks), F(batch), F(splits)});
  }
  {
    using S = PageDesc;
    all += "; " + layout("PageDesc", sizeof(S), {F(side), F(bits), F(group), F(head)});
  }
  {
    using S = Rows;
    all += "; " + layout("Rows", sizeof(S), {F(data), F(type), F(tokens), F(batch), F(head), F(token)});
  }
  {
    using S = AttendCall;
    all += "; " + layout("AttendCall", sizeof(S),
                  {F(key), F(value), F(batch), F(q_heads), F(kv_heads), F(queries), F(q), F(out), F(sink_k), F(sink_v), F(tail_k), F(tail_v),
                   F(pages), F(page_count), F(counts), F(scale), F(cap), F(causal), F(window), F(mask), F(mask_batch), F(mask_query), F(workspace),
                   F(stream), F(capability), F(sms), F(splits), F(bandwidth)});
  }
  {
    using S = LayerLinear;
    all += "; " + layout("LayerLinear", sizeof(S), {F(head), F(blob), F(bias), F(bias_type)});
  }
  {
    using S = LayerDesc;
    all += "; " + layout("LayerDesc", sizeof(S),
                  {F(attention_norm), F(mlp_norm), F(q_norm), F(k_norm), F(q), F(k), F(v), F(o), F(gate), F(up), F(down), F(scale), F(window),
                   F(key), F(value), F(sink_k), F(sink_v), F(tail_k), F(tail_v), F(pages), F(page_room), F(counts)});
  }
  {
    using S = LayersCall;
    all += "; " + layout("LayersCall", sizeof(S),
                  {F(layer), F(layers), F(x), F(type), F(batch), F(hidden), F(q_heads), F(kv_heads), F(dim), F(inner), F(eps), F(final_norm),
                   F(cos), F(sin), F(positions), F(position), F(mask), F(mask_batch), F(workspace), F(stream), F(capability), F(sms)});
  }
#undef F
  return copy_text(all, text, size);
}
