// Separable convolution on the CPU: what the kernels are told, and the tables through which they are launched.
// Free of torch headers, so that each kernel can be compiled for its own instruction set.
//
// Maps are dense and channels_last, (N, H, W, C). Storage is their element type; Real is double where Storage is
// double, float otherwise. Vectors over channels are padded with zeros to whole blocks of `lanes` channels: "padded".
#pragma once

#include <cstdint>

#include "batch_norm_act.h"
#include "instruction_set.h"

namespace odn_fast::separable_conv {

using batch_norm_act::Gradient;

enum class Activation : int64_t { none, relu, relu6, hard_swish, silu };

// One layer: x -> gather -> pointwise -> z. The gather is a depthwise 3x3 convolution with padding 1 and a stride
// of 1 or 2, or, where window > 0, the average over windows of that size (the skip connection of a residual unit).
struct Layer {
  int64_t batch, in_channels, out_channels;
  int64_t height, width;          // of x
  int64_t out_height, out_width;  // of z
  int64_t stride;
  int64_t window;
  int64_t ranges;          // work units of an image: ranges of output rows
  int64_t rows_per_range;

  const void* x;         // Storage (N, height, width, in_channels)
  const void* in_scale;  // Real, padded, or null: not x but relu(in_scale * x + in_shift) is gathered
  const void* in_shift;
  const void* dw;        // Real, as pack_depthwise gives; unused where window > 0
};

struct Forward {
  Layer layer;
  const void* dw_bias;   // Real, padded, or null
  Activation act_dw;
  const void* pw;        // as pack_pointwise gives
  const void* start;     // Real, padded: what the sum over input channels begins with
  const void* residual;  // Storage, as z, or null
  Activation act_pw;
  void* z;               // Storage (N, out_height, out_width, out_channels), out
};

struct Backward {
  Layer layer;
  Gradient gradient;
  const void* pw;  // as pack_pointwise gives, transposed
  void* grad_x;    // Storage (N, height, width, in_channels), or of z's height and width where window > 0, or null

  // What is added to grad_x: the masked gradient of the identity skip, or that of the pooled skip.
  const void* skip_grad;    // Storage, as x, or null
  const void* skip_y;       // Storage, as x: skip_grad counts where skip_y > 0
  const void* pooled_grad;  // Storage (N, ceil(height / pooled_window), ..., in_channels), or null
  int64_t pooled_window;

  // Where in_scale is given, grad_x is the gradient at in_scale * x + in_shift, and sums receives, per input channel,
  // its sum and the sum of its products with x - in_mean.
  const void* in_mean;  // Real, padded
};

// What one chunk of work units adds up. Padded over channels, zero before the first unit.
struct BackwardSums {
  void* grad_dw;  // Real (in blocks, 9, lanes)
  void* grad_pw;  // Real (padded out_channels, padded in_channels)
  double* sums;   // (2, padded in_channels)
};

struct Functions {
  int64_t lanes;
  int64_t (*pointwise_bytes)(int64_t inputs, int64_t outputs);  // that pack_pointwise writes
  // From Real (channels, 9).
  void (*pack_depthwise)(int64_t channels, const void* weight, void* packed);
  // weight[input * input_stride + output * output_stride], Real.
  void (*pack_pointwise)(int64_t inputs, int64_t outputs, const void* weight, int64_t input_stride,
                         int64_t output_stride, void* packed);

  int64_t (*forward_workspace)(const Forward&);  // bytes; the workspace is aligned to 64 bytes
  // Units [first, last) of the batch * ranges; adds the sum and the sum of squares of z before rounding to
  // sums (2, padded out_channels) unless it is null.
  void (*forward)(const Forward&, int64_t first, int64_t last, void* workspace, double* sums);

  int64_t (*backward_workspace)(const Backward&);
  void (*backward)(const Backward&, const BackwardSums&, int64_t first, int64_t last, void* workspace);
  // Adds Real (chunks, size) to sums (size), in the order of the chunks.
  void (*add_chunks)(int64_t chunks, int64_t size, const void* of_chunks, double* sums);
};

struct Kernels {  // by Storage
  Functions float32;
  Functions bfloat16;
  Functions float64;
};

ODN_FAST_KERNEL_TABLE(Kernels, kernels);

}  // namespace odn_fast::separable_conv
