// Entry points for tests that run in another process, where only numbers and arrays can be passed: the structs of a call are filled here.
// Blobs are in "device" memory, which is host memory in the executor, so they serve as heads too.
#include "launch.h"
#include "prepack.h"

using namespace mxq::cuda;

extern "C" {

// Up to three weights that read the same x; those that are not there are null. y of each is [m, n], contiguous.
int flat_linear(const uint8_t* blob0, const uint8_t* blob1, const uint8_t* blob2, void* y0, void* y1, void* y2, const void* bias0, const void* bias1, const void* bias2,
                const void* x, int ldx, int x_type, int y_type, int bias_type, int m, void* workspace, int workspace_bytes, int path, int warps, int blocks, int batch, int splits) {
  const uint8_t* blobs[3] = {blob0, blob1, blob2};
  void* ys[3] = {y0, y1, y2};
  const void* biases[3] = {bias0, bias1, bias2};
  Output outputs[3];
  LinearCall c{};
  for (int i = 0; i < 3 && blobs[i]; i++) outputs[c.outputs++] = {blobs[i], blobs[i], ys[i], biases[i], head_of(blobs[i]).n, bias_type};
  c.x = x, c.ldx = ldx, c.x_type = x_type, c.y_type = y_type, c.m = m, c.output = outputs, c.workspace = workspace;
  c.path = path, c.warps = warps, c.blocks = blocks, c.batch = batch, c.splits = splits;
  if (workspace_nbytes(c) > workspace_bytes) return -2;
  return linear(c);
}

int flat_dequantize(const uint8_t* blob, void* out, int type, int begin, int count) { return dequantize(blob, blob, out, type, begin, count, false, nullptr); }

int flat_embedding(const uint8_t* blob, const int64_t* ids, int count, void* out, int type) { return embedding(blob, blob, ids, count, out, type, nullptr); }

}  // extern "C"
