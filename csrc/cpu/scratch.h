// Memory of one calling thread, kept between calls because malloc and page faults would cost more than a small op. Use it as `thread_local Scratch`.
#pragma once

#include <stdint.h>

#include <cstdlib>
#include <new>

namespace mxq {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // At least `floats` floats at a multiple of 64 bytes, of any content. Throws std::bad_alloc.
  float* get(int64_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_t((floats * 4 + 4095) / 4096 * 4096)));
      if (!data_) throw std::bad_alloc();
      size_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace mxq
