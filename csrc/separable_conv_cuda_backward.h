// Backward of the separable convolution on CUDA devices: what the kernels are told and how they are launched. Free of
// torch headers. Maps, parameters and pointers are as in separable_conv_cuda.h; all launches of one pass share a stream.
//
// One layer, z = pw * dw * x and y = relu(batch_norm(z) + residual), takes three launches: `NormBackward`, then
// `ConvolutionBackward`, which leaves partial sums of the weights' gradients, then `WeightSums`, once for all layers.
// The latter two start while the launch before them on the stream ends, which must be one of these.
#pragma once

#include "separable_conv_cuda.h"

namespace odn_fast::separable_conv_cuda {

struct Target {
  void* data;
  bool bfloat16;  // else float
};

// A batch norm in training, by the statistics of what it took.
struct BatchNorm {
  const float* mean;
  const float* var;
  Parameter weight, bias;
};

struct BatchNormGradients {
  float* coefficients;  // (3, channels): a, b, c of dz = a * g + b * z + c, g being the gradient of the result
  Target weight, bias;
};

// g, which is grad_y where the ReLU let it through, and the gradients of batch norm's parameters.
struct NormBackward {
  int pixels, channels;
  const void* grad_y;
  const void* y;  // what the ReLU's mask is taken from; null: batch_norm(z), where there is a ReLU
  const void* z;
  BatchNorm norm;
  float eps;
  bool relu;
  void* masked;  // g, or null
  BatchNormGradients gradients;
  float* partials;    // `norm_partial_floats` of them
  unsigned* counter;  // zeroed before it is first used; launches that may overlap need their own
};

// Gradients of x and, as partial sums, of dw and pw.
struct ConvolutionBackward {
  Convolution convolution;
  BatchNorm in_norm;  // with mean null, x is convolved; else relu(in_norm(x)) in bfloat16
  const void* grad;   // g, or with `masks` grad_y, whose mask is taken from norm(z)
  const void* z;
  BatchNorm norm;
  const float* coefficients;
  bool masks;
  float eps;
  const void* added;  // as x: what a skip connection adds to grad_x, or null
  void* grad_x;       // or null. With in_norm it is the gradient of in_norm(x), that is masked by the ReLU
  BatchNormGradients in_gradients;  // with in_norm
  float* pw_partials;  // (`partial_rows`, out_channels, in_channels)
  float* dw_partials;  // (`partial_rows`, 9, in_channels)
  float* in_partials;  // (`partial_rows`, 2, in_channels), with in_norm
  unsigned* counter;   // with in_norm, as above
};

struct WeightSums {
  struct Weight {
    const float* partials;  // (rows, size)
    int rows, size;
    int taps;  // 9: partial sums are (9, channels) and the gradient (channels, 9); else 1
    Target gradient;
  } weights[4];
  int count;
};

// Why the current device has no kernel for these channels, null if it has one.
const char* why_not_backward(int in_channels, int out_channels, int stride);

size_t norm_partial_floats(int channels);

// On the current device; 0 if it cannot be launched.
int partial_rows(const Convolution&);

// On the current device. The batch is not empty.
cudaError_t launch(const NormBackward&, cudaStream_t);
cudaError_t launch(const ConvolutionBackward&, cudaStream_t);
cudaError_t launch(const WeightSums&, cudaStream_t);

}  // namespace odn_fast::separable_conv_cuda
