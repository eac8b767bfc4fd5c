// Python module mxq_ext._cuda: the functions of cuda/api.h. Addresses come in as integers, so that neither torch nor numpy is needed to build it, and
// mxq_ext/cuda.py, which checks everything, can hand the same calls to another library with these functions.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/api.h"

namespace py = pybind11;
using namespace mxq::cuda;

namespace {

template <class T>
T* ptr(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

constexpr int64_t TEXT = 1024;

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Native CUDA kernels of mxq_ext; call them through mxq_ext.ops.";

  m.def("blob_sizes", [](uintptr_t weight) {
    int64_t nbytes, head_nbytes;
    mxq_cuda_blob_sizes(ptr<WeightDesc>(weight), &nbytes, &head_nbytes);
    return py::make_tuple(nbytes, head_nbytes);
  });
  m.def("prepack", [](uintptr_t weight, uintptr_t blob, int64_t threads) {
    py::gil_scoped_release release;
    mxq_cuda_prepack(ptr<WeightDesc>(weight), ptr<uint8_t>(blob), threads);
  });
  m.def("unpack", [](uintptr_t blob, int64_t rect, uintptr_t out, int64_t threads) {
    py::gil_scoped_release release;
    mxq_cuda_unpack(ptr<uint8_t>(blob), rect, ptr<RectDesc>(out), threads);
  });

  m.def("workspace_nbytes", [](uintptr_t call) { return mxq_cuda_workspace_nbytes(ptr<LinearCall>(call)); });
  m.def("linear", [](uintptr_t call) {
    py::gil_scoped_release release;
    return mxq_cuda_linear(ptr<LinearCall>(call));
  });
  m.def("dequantize", [](uintptr_t head, uintptr_t blob, uintptr_t out, int64_t type, int64_t begin, int64_t count, int64_t stored_cols, uintptr_t stream) {
    py::gil_scoped_release release;
    return mxq_cuda_dequantize(ptr<uint8_t>(head), ptr<uint8_t>(blob), ptr<void>(out), type, begin, count, stored_cols, ptr<void>(stream));
  });
  m.def("embedding", [](uintptr_t head, uintptr_t blob, uintptr_t ids, int64_t count, uintptr_t out, int64_t type, uintptr_t stream) {
    py::gil_scoped_release release;
    return mxq_cuda_embedding(ptr<uint8_t>(head), ptr<uint8_t>(blob), ptr<int64_t>(ids), count, ptr<void>(out), type, ptr<void>(stream));
  });

  m.def("explain", [](uintptr_t call) {
    char text[TEXT];
    const int64_t path = mxq_cuda_explain(ptr<LinearCall>(call), text, TEXT);
    return py::make_tuple(path, std::string(text));
  });
  m.def("kernel_name", [](uintptr_t call, const std::string& format) {
    char text[TEXT];
    mxq_cuda_kernel_name(ptr<LinearCall>(call), format.c_str(), text, TEXT);
    return std::string(text);
  });
  m.def("kv_workspace_nbytes", [](uintptr_t call) { return mxq_cuda_kv_workspace_nbytes(ptr<AttendCall>(call)); });
  m.def("kv_attend", [](uintptr_t call) {
    py::gil_scoped_release release;
    return mxq_cuda_kv_attend(ptr<AttendCall>(call));
  });
  m.def("kv_pack", [](uintptr_t format, uintptr_t x, int64_t batch, int64_t heads, uintptr_t codes, uintptr_t params, uintptr_t stream) {
    py::gil_scoped_release release;
    return mxq_cuda_kv_pack(ptr<PageDesc>(format), ptr<Rows>(x), batch, heads, ptr<uint8_t>(codes), ptr<uint16_t>(params), ptr<void>(stream));
  });
  m.def("kv_explain", [](uintptr_t call) {
    char name[TEXT], text[TEXT];
    const bool ok = mxq_cuda_kv_explain(ptr<AttendCall>(call), name, text, TEXT);
    return py::make_tuple(ok, std::string(name), std::string(text));
  });
  m.def("layers_workspace_nbytes", [](uintptr_t call) { return mxq_cuda_layers_workspace_nbytes(ptr<LayersCall>(call)); });
  m.def("run_layers", [](uintptr_t call) {
    py::gil_scoped_release release;
    return mxq_cuda_run_layers(ptr<LayersCall>(call));
  });
  m.def("layouts", [] {
    std::string text(size_t(mxq_cuda_layouts(nullptr, 0)) + 1, 0);  // its end is written too
    mxq_cuda_layouts(text.data(), int64_t(text.size()));
    text.pop_back();
    return text;
  });
  m.def("error_text", [](int64_t code) { return std::string(mxq_cuda_error_text(code)); });
  m.def("devices", [] {
    int64_t code, driver, runtime;
    const int64_t count = mxq_cuda_devices(&code, &driver, &runtime);
    return py::make_tuple(count, code, driver, runtime);
  });
  m.attr("archs") = MXQ_CUDA_ARCH_NAMES;  // what it was compiled for, for example "7.5 8.0 9.0+PTX"
}
