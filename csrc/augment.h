// augment on the CPU: what the kernels are told, and the table through which they are launched.
// Free of torch headers, so that each kernel can be compiled for its own instruction set.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace odn_fast::augment {

// Storage is the element type of the batch; Real is double where Storage is double, float otherwise.
struct Batch {
  const uint8_t* images;  // (M, C, H, W), strides below, in elements
  int64_t image_stride, channel_stride, row_stride, column_stride;
  int64_t channels, height, width;
  int64_t ahead;  // bytes to ask for of an image before its turn comes, from its first on
  const int64_t* index;  // (N), each in [0, M)
  const int64_t* key;    // (2), seed and epoch; null where nothing is random
  int64_t padding;
  bool flip;
  const void* scale;  // Real (C, lanes): the values of whole vectors of channels, which repeat after C of them
  const void* shift;  // Real (C, lanes)
  void* y;            // Storage (N, H, W, C), out
};

struct Functions {
  int64_t lanes;
  // Bytes of memory of its own that a call of `run` works in.
  int64_t (*workspace)(const Batch&);
  // Images [first, last) of the batch.
  void (*run)(const Batch&, int64_t first, int64_t last, void* workspace);
};

struct Kernels {  // by Storage
  Functions float32;
  Functions bfloat16;
  Functions float64;
};

ODN_FAST_KERNEL_TABLE(Kernels, kernels);

}  // namespace odn_fast::augment
