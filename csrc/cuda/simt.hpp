// How kernels ask for shared memory and are launched, once for nvcc and once for the executor that runs them on the CPU.
//
// Kernels include this file and ptx.cuh and nothing else of CUDA: no cuda_fp16.h, no asm, no look at the architecture. So the same source
// is compiled by nvcc for a device and by g++ for python_tests/simt, where a CUDA thread is a fiber (docs/cuda-testing.md).
//
//   MXQ_SHARED(T, name, n);                                     T name[n] in shared memory, aligned to 16 bytes
//   MXQ_DYN_SMEM(T, name);                                      T* name: the dynamic shared memory of the launch, aligned to 16 bytes
//   MXQ_LAUNCH(kernel, grid, block, bytes, stream, args...)     int: a cudaError_t, 0 for success. The kernel runs on the caller's stream (void*)
//   MXQ_LAUNCH_EARLY(early, kernel, ...)                        the same; if `early`, the kernel may start before the one ahead of it in the stream
//                                                               has ended, and calls ptx::grid_dependency_wait() before it reads or writes what that
//                                                               may write or read. For compute capability 9.0 and later; code that was compiled for less is launched in turn
// A kernel with several template arguments is put in parentheses: MXQ_LAUNCH((gemv<4, 128>), ...).
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define MXQ_SHARED(T, name, n) __shared__ __align__(16) T name[n]
#define MXQ_DYN_SMEM(T, name)                                        \
  extern __shared__ __align__(16) unsigned char mxq_dynamic_smem[]; \
  T* const name = reinterpret_cast<T*>(mxq_dynamic_smem)
#define MXQ_LAUNCH(kernel, grid, block, bytes, stream, ...) mxq::launch(false, kernel, grid, block, bytes, stream, __VA_ARGS__)
#define MXQ_LAUNCH_EARLY(early, kernel, grid, block, bytes, stream, ...) mxq::launch(early, kernel, grid, block, bytes, stream, __VA_ARGS__)

namespace mxq {

// The error of this launch only: what an earlier call of the process left behind is not taken for it.
template <class... P, class... A>
inline int launch(bool early, void (*kernel)(P...), dim3 grid, dim3 block, size_t bytes, void* stream, const A&... args) {
  if (early || bytes > 48 * 1024) {
    cudaFuncAttributes code;
    cudaError_t error = cudaFuncGetAttributes(&code, kernel);
    if (error == cudaSuccess && static_cast<size_t>(code.maxDynamicSharedSizeBytes) < bytes) {
      // More has to be asked for, on each device anew: all that it gives, and never less again, since another thread may be about to launch with more.
      int device = 0, most = 0;
      error = cudaGetDevice(&device);
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - static_cast<int>(code.sharedSizeBytes));
    }
    if (error != cudaSuccess) {
      cudaGetLastError();
      return error;
    }
    early = early && code.ptxVersion >= 90;  // code for an older capability, brought here as PTX, does not know how to wait for the kernel ahead
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  if (error != cudaSuccess) cudaGetLastError();  // handed over to the caller, so not left for the next one to find
  return error;
}

}  // namespace mxq

#else  // g++: the machine of python_tests/simt, which is in the include path of the test build only

#define MXQ_SIMT 1
#include "simt_machine.hpp"

#define MXQ_SHARED(T, name, n) \
  static char mxq_tag_##name;  \
  T(&name)[n] = *static_cast<T(*)[n]>(simt::shared_array(&mxq_tag_##name, sizeof(T) * (n), #name, MXQ_SITE_HERE))
#define MXQ_DYN_SMEM(T, name) T* const name = static_cast<T*>(simt::dynamic_shared())
#define MXQ_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  simt::launch(#kernel, MXQ_SITE_HERE, kernel, grid, block, bytes, stream, __VA_ARGS__)
#define MXQ_LAUNCH_EARLY(early, ...) (static_cast<void>(early), MXQ_LAUNCH(__VA_ARGS__))

#endif
