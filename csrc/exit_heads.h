// Exit heads on the CPU: what the kernels are told, and the table through which they are launched.
// Free of torch headers, so that each kernel can be compiled for its own instruction set.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace odn_fast::exit_heads {

// Real is double where the features are double, float otherwise; Storage is the element type of the features.

struct ForwardHead {
  const void* feature;      // Storage (N, C, H*W), strides in elements; channel_stride or position_stride is 1
  int64_t image_stride;
  int64_t channel_stride;
  int64_t position_stride;
  int64_t channels;         // C
  int64_t positions;        // H*W
  int64_t column;           // where this depth begins in a row of `pooled`
  const void* weight;       // Real (K, C)
  const void* bias;         // Real (K)
};

struct Forward {
  const ForwardHead* heads;  // D
  int64_t depths;            // D
  int64_t batch;             // N
  int64_t classes;           // K
  int64_t width;             // sum of C over depths
  const int64_t* target;     // (N), each in [0, K)
  void* pooled;              // Real (N, width), out
  void* logit_gradients;     // Real (D, N, K), out
  double* losses;            // (D, N), out, one per image
  int64_t* correct;          // (D, N), out, 0 or 1
};

struct BackwardHead {
  int64_t depth;
  int64_t channels;
  int64_t positions;
  int64_t column;
  const void* weight;      // Real (K, C)
  void* pooled_gradient;   // Storage (N, C), out
  void* weight_gradient;   // Real (K, C), out
};

struct Backward {
  int64_t batch;
  int64_t classes;
  int64_t width;
  const void* grad_losses;      // Real (D)
  const void* pooled;           // Real (N, width)
  const void* logit_gradients;  // Real (D, N, K)
  void* bias_gradients;         // Real (D, K), out
};

// Forward works on images, backward on channels: no two calls write the same element, so nothing is summed
// across threads and the bits do not depend on their number.
inline constexpr int64_t images_per_chunk = 8;
inline constexpr int64_t channels_per_block = 64;

struct Functions {
  void (*forward)(const Forward&, int64_t first_image, int64_t last_image);
  // Channels [first, last), at most channels_per_block of them; the call with first = 0 writes the bias gradient.
  void (*backward)(const Backward&, const BackwardHead&, int64_t first_channel, int64_t last_channel);
};

struct Kernels {  // by Storage
  Functions float32;
  Functions bfloat16;
  Functions float64;
};

ODN_FAST_KERNEL_TABLE(Kernels, kernels);

}  // namespace odn_fast::exit_heads
