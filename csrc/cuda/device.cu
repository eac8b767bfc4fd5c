// Questions about the machine, for error messages and `mxq doctor`. The rest of the library never asks.
#include <cuda_runtime.h>

#include "api.h"

MXQ_API const char* mxq_cuda_error_text(int64_t code) {
  return code < 0 ? "no kernel for this call" : cudaGetErrorString(static_cast<cudaError_t>(code));
}

MXQ_API int64_t mxq_cuda_devices(int64_t* code, int64_t* driver, int64_t* runtime) {
  int count = 0, version = 0;  // both stay unwritten on an error
  *code = cudaGetDeviceCount(&count);
  *driver = cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  *runtime = CUDART_VERSION;
  cudaGetLastError();  // the answer is in `code`
  return *code ? 0 : count;
}
