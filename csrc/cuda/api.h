// The C functions of the CUDA library; api.cpp and device.cu have them. Addresses of structs and of memory, 64-bit numbers, nothing else.
#pragma once

#include <stdint.h>

#define MXQ_API extern "C" __attribute__((visibility("default")))

namespace mxq::cuda {
struct RectDesc;    // prepack.h
struct WeightDesc;  // prepack.h
struct LinearCall;  // launch.h
struct AttendCall;  // attention.h
struct PageDesc;    // attention.h
struct Rows;        // attention.h
struct LayersCall;  // layer.h
}  // namespace mxq::cuda

MXQ_API void mxq_cuda_blob_sizes(const mxq::cuda::WeightDesc* w, int64_t* nbytes, int64_t* head_nbytes);
MXQ_API void mxq_cuda_prepack(const mxq::cuda::WeightDesc* w, uint8_t* blob, int64_t threads);
MXQ_API void mxq_cuda_unpack(const uint8_t* blob, int64_t rect, const mxq::cuda::RectDesc* out, int64_t threads);

// Bytes of device memory that a call needs as workspace.
MXQ_API int64_t mxq_cuda_workspace_nbytes(const mxq::cuda::LinearCall* c);
// These return a cudaError_t, 0 for success, or -1 where there is no kernel; launch.h says what they do.
MXQ_API int64_t mxq_cuda_linear(const mxq::cuda::LinearCall* c);
MXQ_API int64_t mxq_cuda_dequantize(const uint8_t* head, const uint8_t* blob, void* out, int64_t type, int64_t begin, int64_t count, int64_t stored_cols,
                                    void* stream);
MXQ_API int64_t mxq_cuda_embedding(const uint8_t* head, const uint8_t* blob, const int64_t* ids, int64_t count, void* out, int64_t type, void* stream);

// The path that a call takes (enum Path; 0: none) and, as text, its configuration or why there is none.
MXQ_API int64_t mxq_cuda_explain(const mxq::cuda::LinearCall* c, char* text, int64_t size);
// The kernel's name for a weight format of that name; returns the length.
MXQ_API int64_t mxq_cuda_kernel_name(const mxq::cuda::LinearCall* c, const char* format, char* text, int64_t size);

// Attention over the packed KV cache; as for linear.
MXQ_API int64_t mxq_cuda_kv_workspace_nbytes(const mxq::cuda::AttendCall* c);
MXQ_API int64_t mxq_cuda_kv_attend(const mxq::cuda::AttendCall* c);
MXQ_API int64_t mxq_cuda_kv_pack(const mxq::cuda::PageDesc* format, const mxq::cuda::Rows* x, int64_t batch, int64_t heads, uint8_t* codes, uint16_t* params,
                                 void* stream);
// 1, or 0 where there is no kernel; `name` and `text`: the kernel's name, and its configuration or why there is none.
MXQ_API int64_t mxq_cuda_kv_explain(const mxq::cuda::AttendCall* c, char* name, char* text, int64_t size);

// Whole decoder layers (layer.h); as for linear.
MXQ_API int64_t mxq_cuda_layers_workspace_nbytes(const mxq::cuda::LayersCall* c);
MXQ_API int64_t mxq_cuda_run_layers(const mxq::cuda::LayersCall* c);

// The structs that callers fill, as text: "Name field=offset ... sizeof=bytes; Name ...". A caller with structs of its own compares: a module of another
// version would read other fields without anything to be seen. Returns the length.
MXQ_API int64_t mxq_cuda_layouts(char* text, int64_t size);

// device.cu
MXQ_API const char* mxq_cuda_error_text(int64_t code);
// Devices that can be used. `code`: what the runtime said (0: fine, 35: no driver or one that is too old, 100: no device); `driver`: newest CUDA version
// that the driver knows, 1000 * major + 10 * minor, 0 without one; `runtime`: the version that this library was built with.
MXQ_API int64_t mxq_cuda_devices(int64_t* code, int64_t* driver, int64_t* runtime);
