// Training batch norm + residual + ReLU on the CPU: what the kernels are told, and the tables through which they are
// launched. Free of torch headers, so that each kernel can be compiled for its own instruction set.
//
// Maps are dense and channels_last, (pixels, channels). Storage is their element type; Real is double where Storage is
// double, float otherwise. Vectors over channels are padded with zeros to whole blocks of `lanes` channels: "padded".
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace odn_fast::batch_norm_act {

// sum and sum of squares of z - pivot.
struct Statistics {
  int64_t channels;
  const void* z;      // Storage (pixels, channels)
  const void* pivot;  // Real, padded; near the mean, or digits of the variance are lost
};

// y = relu(scale * z + shift + residual), each part where it is given.
struct Finish {
  int64_t channels;
  const void* z;      // Storage (pixels, channels)
  const void* scale;  // Real, padded
  const void* shift;
  const void* residual;        // Storage (pixels, channels), or null
  const void* residual_scale;  // Real, padded, or null: the residual is residual_scale * residual + residual_shift
  const void* residual_shift;
  bool relu;
  void* y;  // Storage (pixels, channels), out
};

// The gradient at z from the gradient at relu(mask_scale * z + mask_shift), or at relu(... + something) = y:
//   masked = (y > 0, or mask_scale * z + mask_shift > 0, or always) ? grad : 0
//   gradient at z = scale * masked + constant + slope * z
struct Gradient {
  const void* grad;  // Storage (pixels, channels), as z and y
  const void* z;     // Storage
  const void* y;     // Storage, or null
  bool relu;
  const void* mask_scale;  // Real, padded, as all below
  const void* mask_shift;
  const void* scale;
  const void* constant;
  const void* slope;
};

// sum of the masked gradient, of its products with z - mean, and of those with other - other_mean.
struct Reduce {
  int64_t channels;
  Gradient gradient;  // scale, constant and slope are not read
  const void* mean;   // Real, padded
  const void* other;  // Storage (pixels, channels), or null
  const void* other_mean;
  void* masked;  // Storage (pixels, channels), out, or null
};

// The gradient at z, with z - mean in place of z in its last term: z may be large against its deviation from the mean.
struct Apply {
  int64_t channels;
  Gradient gradient;
  const void* mean;  // Real, padded
  void* grad_z;      // Storage (pixels, channels), out
};

struct Functions {
  int64_t lanes;
  // Adds to sums (2, padded channels).
  void (*statistics)(const Statistics&, int64_t first_pixel, int64_t last_pixel, double* sums);
  void (*finish)(const Finish&, int64_t first_pixel, int64_t last_pixel);
  // Adds to sums (3, padded channels), or (2, padded channels) where `other` is null.
  void (*reduce)(const Reduce&, int64_t first_pixel, int64_t last_pixel, double* sums);
  void (*apply)(const Apply&, int64_t first_pixel, int64_t last_pixel);
};

struct Kernels {  // by Storage
  Functions float32;
  Functions bfloat16;
  Functions float64;
};

ODN_FAST_KERNEL_TABLE(Kernels, kernels);

}  // namespace odn_fast::batch_norm_act
