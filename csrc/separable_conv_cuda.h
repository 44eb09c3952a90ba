// Separable convolution on CUDA devices: what the kernels are told and how they are launched. Free of torch headers.
//
// Maps are dense, channels_last (N, H, W, C) and bfloat16, 16-byte aligned, of fewer
// than 2^31 elements. Parameters are float or bfloat16, contiguous, save for dw, and 16-byte aligned. All
// pointers are the device's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace odn_fast::separable_conv_cuda {

enum class Activation : int { none, relu, relu6, hard_swish, silu };

struct Parameter {
  const void* data;  // null where there is none
  bool bfloat16;     // else float
};

// x -> depthwise 3x3 with padding 1 -> pointwise. Sums are in float; the depthwise output is rounded to bfloat16.
struct Convolution {
  int batch, in_channels, out_channels;
  int height, width;          // of x
  int out_height, out_width;  // of the output
  int stride;                 // 1 or 2
  const void* x;
  Parameter dw;  // (in_channels, 9)
  int dw_channel_stride, dw_tap_stride;
  Parameter pw;  // (out_channels, in_channels)
};

// y = act_pw(pw * act_dw(dw * x + dw_bias) + pw_bias + residual)
struct Inference {
  Convolution convolution;
  Parameter dw_bias;
  Activation act_dw;
  Parameter pw_bias;
  const void* residual;  // as y, or null
  Activation act_pw;
  void* y;
};

// z = pw * dw * x, its mean and biased variance per channel, and y = batch_norm(z) + residual, with ReLU or without.
struct Training {
  Convolution convolution;
  const float* in_scale;  // (in_channels) or null: not x but relu(in_scale * x + in_shift), in bfloat16, is convolved
  const float* in_shift;
  void* z;
  float* mean;  // (out_channels), of the stored z
  float* var;   // biased
  float* z_mean;  // the mean again
  float* scale;   // (out_channels) or null: scale and shift of batch norm, as in_scale and in_shift of the layer after
  float* shift;
  Parameter bn_weight, bn_bias;
  float eps;
  const void* residual;  // as y, or null
  bool relu;
  void* y;           // or null: z, mean and var are all there is to do
  float* partials;   // `partial_bytes` of them
  unsigned* counter;  // two, zeroed before they are first used; launches that may overlap need their own
};

// Why the current device has no kernel for these channels, null if it has one.
const char* why_not(int in_channels, int out_channels, int stride);

// What `Training::partials` needs at most on the current device.
size_t partial_bytes(int out_channels);

// On the current device. The batch is not empty.
cudaError_t launch(const Inference&, cudaStream_t);
cudaError_t launch(const Training&, cudaStream_t);

}  // namespace odn_fast::separable_conv_cuda
