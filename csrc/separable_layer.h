// One layer of separable_conv and separable_unit as tensors: allocation and parallel launch of its kernels.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "separable_conv.h"

namespace odn_fast::separable_conv {

using at::Tensor;
using Values = std::vector<double>;  // one per channel

int64_t output_size(int64_t size, int64_t stride);

// ValueError unless `tensor` is a floating CPU tensor of that shape, and of that dtype where one is asked for.
void check_tensor(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef expected,
                  std::optional<at::ScalarType> dtype = std::nullopt);
// ValueError unless x, dw and pw fit; gives the shape of the output.
std::vector<int64_t> check_convolutions(const char* op, const Tensor& x, const Tensor& dw, const Tensor& pw, int64_t stride);

at::ScalarType compute_type(const Tensor& x);
Tensor dense(const Tensor& map);                       // channels_last
Tensor dense_as(const Tensor& map, const Tensor& x);   // and of x's dtype
Values values_of(const Tensor& vector);

// What a layer reads: x, or relu(scale * x + shift).
struct Affine {
  Values scale, shift;
};

struct LayerInput {
  Tensor x;  // dense
  std::optional<Affine> transform;
};

struct Weights {
  std::optional<Tensor> dw;  // (C_in, 1, 3, 3), or none: averages over windows of `stride`
  Tensor pw;
  int64_t stride;
};

struct Normalised {
  Tensor z;  // the pointwise output, less one constant per channel
  Tensor mean, var;
  Tensor z_mean;  // of the stored z
};

Normalised forward_layer(const LayerInput& input, const Weights& weights);

// The same without statistics: act_pw(pw * act_dw(dw * x + dw_bias) + pw_bias + residual).
Tensor infer_layer(const Tensor& x, const Weights& weights, const std::optional<Tensor>& dw_bias, Activation act_dw,
                   const std::optional<Tensor>& pw_bias, const std::optional<Tensor>& residual, Activation act_pw);

// Batch norm as scale * z + shift.
Affine affine(const Tensor& z_mean, const Tensor& var, const Tensor& bn_weight, const Tensor& bn_bias, double eps);

// relu(affine(z) + residual), where the residual has an affine of its own or none.
Tensor finish(const Tensor& z, const Affine& affine, const Tensor* residual, const Affine* residual_affine, bool relu);

// The gradient at y, and what y was: the mask is y > 0 if y is given, else mask(z) > 0 if relu.
struct OutputGradient {
  Tensor grad;  // dense
  const Tensor* y;
  bool relu;
};

// Sums over all pixels of the masked gradient and of its products with z - mean and other - other_mean.
struct GradientSums {
  Values grad, product, other_product;
};

GradientSums reduce(const OutputGradient& gradient, const Tensor& z, const Values& z_mean, const Affine& mask,
                    const Tensor* other, const Values& other_mean, Tensor* masked);

// Batch norm's gradients: of weight and bias, and of z as scale * masked + constant + slope * z.
struct NormGradient {
  Values weight, bias;
  Values scale, constant, slope;
};

NormGradient norm_gradient(const Values& grad, const Values& product, const Tensor& z_mean, const Tensor& var,
                           const Tensor& bn_weight, double eps, int64_t values_per_channel);

struct Skip {  // what is added to the gradient of x
  const Tensor* grad = nullptr;    // counts where y > 0: the identity
  const Tensor* y = nullptr;
  const Tensor* pooled = nullptr;  // over windows
  int64_t window = 0;
};

struct LayerGradients {
  Tensor x;  // of shape (0,) if not needed; where the input has a transform, at what the transform's ReLU takes
  Tensor dw, pw;
  Values sums, products;  // where the input has a transform: of x's gradient, and of its products with x - x_mean
};

LayerGradients backward_layer(const LayerInput& input, const Values& x_mean, const Weights& weights,
                              const OutputGradient& gradient, const Affine& mask, const Tensor& z, const NormGradient& norm,
                              bool x_needs_grad, const Skip& skip);

// A parameter's gradient in its dtype.
Tensor like(const Values& values, const Tensor& parameter);

}  // namespace odn_fast::separable_conv
