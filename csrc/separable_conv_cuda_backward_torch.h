// What the CUDA ops of the backward passes of separable convolutions and units share: a layer, checked, with memory for
// its gradients.
#pragma once

#include "separable_conv_cuda_backward.h"
#include "separable_conv_cuda_torch.h"

namespace odn_fast::separable_conv_cuda {

inline Target target(const Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.scalar_type() == at::kBFloat16}; }

// Memory for what one layer's launches leave to each other: one tensor, because allocating takes long.
struct Scratch;

struct Layer {
  Prepared prepared;
  Tensor z, mean, var, weight, bias;
  Tensor grad_dw, grad_pw, grad_weight, grad_bias;

  Layer(const char* op, const Tensor& x, const Tensor& dw, const Tensor& pw, const Tensor& bn_weight, const Tensor& bn_bias,
        const Tensor& any_z, const Tensor& z_mean, const Tensor& any_var, int64_t stride)
      : prepared(op, x, dw, pw, stride) {
    const int64_t channels = prepared.shape[1];
    const char* reason = why_not_backward(x.size(1), channels, stride);
    TORCH_CHECK_VALUE(!reason, op, ": x has shape ", x.sizes(), " and pw ", pw.sizes(), ": ", reason);
    check_parameter(op, "bn_weight", bn_weight, {channels}, x);
    check_parameter(op, "bn_bias", bn_bias, {channels}, x);
    check_map(op, "z", any_z, prepared.shape, x);
    check(op, "z_mean", z_mean, {channels}, x, z_mean.scalar_type() == at::kFloat, "float32");
    check(op, "var", any_var, {channels}, x, any_var.scalar_type() == at::kFloat, "float32");
    z = dense(any_z);
    mean = aligned(z_mean.contiguous()), var = aligned(any_var.contiguous());
    weight = bn_weight.contiguous(), bias = bn_bias.contiguous();
    grad_dw = at::empty(dw.sizes(), dw.options()), grad_pw = at::empty(pw.sizes(), pw.options());
    grad_weight = at::empty({channels}, bn_weight.options()), grad_bias = at::empty({channels}, bn_bias.options());
  }

  void zero_gradients() const {
    for (const Tensor& gradient : {grad_dw, grad_pw, grad_weight, grad_bias}) gradient.zero_();
  }

  BatchNorm norm() const { return {mean.const_data_ptr<float>(), var.const_data_ptr<float>(), parameter(weight), parameter(bias)}; }

  BatchNormGradients norm_gradients(const Scratch&) const;
  NormBackward norm_backward(const Scratch&, float eps) const;
  ConvolutionBackward convolution_backward(const Scratch&, int64_t stride, float eps) const;
  void sum_weights(const Scratch&, WeightSums&) const;
};

struct Scratch {
  int rows;
  Tensor memory;
  float *coefficients, *norm_partials, *pw_partials, *dw_partials, *in_partials;

  // with_in: the layer before is normalised on load, and its sums are taken; not those of this layer.
  Scratch(const Layer& layer, int64_t stride, bool with_in, const Tensor& x) {
    const Convolution c = layer.prepared.convolution(stride);
    rows = partial_rows(c);
    TORCH_CHECK(rows > 0, "separable_conv's CUDA kernels cannot be launched for x of shape ", x.sizes());
    const int64_t inputs = c.in_channels, outputs = c.out_channels, norm = norm_partial_floats(c.out_channels);
    const int64_t in = with_in ? 2 * inputs * rows : 0;
    memory = at::empty({3 * outputs + norm + rows * (outputs + 9) * inputs + in}, x.options().dtype(at::kFloat));
    coefficients = memory.mutable_data_ptr<float>();
    norm_partials = coefficients + 3 * outputs;
    pw_partials = norm_partials + norm;
    dw_partials = pw_partials + rows * outputs * inputs;
    in_partials = dw_partials + rows * 9 * inputs;
  }
};

inline BatchNormGradients Layer::norm_gradients(const Scratch& scratch) const {
  return {scratch.coefficients, target(grad_weight), target(grad_bias)};
}

inline NormBackward Layer::norm_backward(const Scratch& scratch, float eps) const {
  NormBackward p{};
  p.channels = prepared.shape[1];
  p.pixels = z.numel() / p.channels;
  p.z = z.const_data_ptr();
  p.norm = norm();
  p.eps = eps;
  p.gradients = norm_gradients(scratch);
  p.partials = scratch.norm_partials;
  return p;
}

inline ConvolutionBackward Layer::convolution_backward(const Scratch& scratch, int64_t stride, float eps) const {
  ConvolutionBackward p{};
  p.convolution = prepared.convolution(stride);
  p.z = z.const_data_ptr();
  p.norm = norm();
  p.coefficients = scratch.coefficients;
  p.eps = eps;
  p.pw_partials = scratch.pw_partials;
  p.dw_partials = scratch.dw_partials;
  p.in_partials = scratch.in_partials;
  return p;
}

inline void Layer::sum_weights(const Scratch& scratch, WeightSums& sums) const {
  const int pw = grad_pw.numel(), dw = grad_dw.numel();
  sums.weights[sums.count++] = {scratch.pw_partials, scratch.rows, pw, 1, target(grad_pw)};
  sums.weights[sums.count++] = {scratch.dw_partials, scratch.rows, dw, 9, target(grad_dw)};
}

}  // namespace odn_fast::separable_conv_cuda
