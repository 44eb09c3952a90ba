// One layer of separable_conv and separable_unit as tensors: allocation and parallel launch of its kernels.
#pragma once

#include <optional>
#include <vector>

#include "batch_norm.h"
#include "separable_conv.h"

namespace odn_fast::separable_conv {

using namespace batch_norm;

int64_t output_size(int64_t size, int64_t stride);

// ValueError unless x, dw and pw fit; gives the shape of the output.
std::vector<int64_t> check_convolutions(const char* op, const Tensor& x, const Tensor& dw, const Tensor& pw, int64_t stride);

// What a layer reads: x, or relu(scale * x + shift).
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

}  // namespace odn_fast::separable_conv
