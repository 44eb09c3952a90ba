// separable_conv's backward pass for CUDA devices: an op of its own, which odn_fast/ops chooses for what it can take.
#include "separable_conv_cuda_backward_torch.h"

#include <torch/library.h>

#include <string>
#include <tuple>

namespace odn_fast::separable_conv_cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& dw, const Tensor& pw, const Tensor& bn_weight, const Tensor& bn_bias,
    const optional<Tensor>& y, const Tensor& z, const Tensor& z_mean, const Tensor& var, int64_t stride, double eps, bool relu,
    bool x_needs_grad) {
  const char* op = "separable_conv_train_backward_cuda";
  const c10::cuda::OptionalCUDAGuard guard(x.is_cuda() ? optional(x.device()) : std::nullopt);
  const Layer layer(op, x, dw, pw, bn_weight, bn_bias, z, z_mean, var, stride);
  check_map(op, "grad_y", grad_y, layer.prepared.shape, x);
  if (y) check_map(op, "y", *y, layer.prepared.shape, x);
  const Tensor grad_x = x_needs_grad ? at::empty_like(layer.prepared.x) : at::empty({0}, x.options());
  const Tensor grad_residual = y ? at::empty_like(layer.z) : at::empty({0}, x.options());
  if (z.numel() == 0) {
    layer.zero_gradients();
    return {grad_x, layer.grad_dw, layer.grad_pw, layer.grad_weight, layer.grad_bias, grad_residual};
  }
  const Tensor grad = dense(grad_y);
  const optional<Tensor> result = dense(y);
  const float eps_ = static_cast<float>(eps);
  Scratch scratch(layer, stride, false, x);

  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  NormBackward norm = layer.norm_backward(scratch, eps_);
  norm.grad_y = grad.const_data_ptr();
  norm.y = data(result);
  norm.relu = relu;
  norm.masked = y ? grad_residual.mutable_data_ptr() : nullptr;
  norm.counter = counter(x);
  C10_CUDA_CHECK(launch(norm, stream));

  ConvolutionBackward convolution = layer.convolution_backward(scratch, stride, eps_);
  convolution.grad = y ? norm.masked : norm.grad_y;
  convolution.masks = relu && !y;
  convolution.grad_x = x_needs_grad ? grad_x.mutable_data_ptr() : nullptr;
  C10_CUDA_CHECK(launch(convolution, stream));

  WeightSums sums{};
  layer.sum_weights(scratch, sums);
  C10_CUDA_CHECK(launch(sums, stream));
  return {grad_x, layer.grad_dw, layer.grad_pw, layer.grad_weight, layer.grad_bias, grad_residual};
}

// Of the current device: "" where it has a kernel for these channels, else the reason.
std::string why_not_here(int64_t in_channels, int64_t out_channels, int64_t stride) {
  const char* reason = why_not(in_channels, out_channels, stride);  // what the ops check too
  if (!reason) reason = why_not_backward(in_channels, out_channels, stride);
  return reason ? reason : "";
}

}  // namespace
}  // namespace odn_fast::separable_conv_cuda

TORCH_LIBRARY_FRAGMENT(odn_fast, m) {
  m.def("separable_conv_cuda_backward_why_not(int in_channels, int out_channels, int stride) -> str",
        &odn_fast::separable_conv_cuda::why_not_here);
  m.def("separable_conv_train_backward_cuda(Tensor grad_y, Tensor x, Tensor dw, Tensor pw, Tensor bn_weight, Tensor bn_bias,"
        " Tensor? y, Tensor z, Tensor z_mean, Tensor var, int stride, float eps, bool relu, bool x_needs_grad)"
        " -> (Tensor grad_x, Tensor grad_dw, Tensor grad_pw, Tensor grad_bn_weight, Tensor grad_bn_bias, Tensor grad_residual)");
}

TORCH_LIBRARY_IMPL(odn_fast, CUDA, m) {
  m.impl("separable_conv_train_backward_cuda", &odn_fast::separable_conv_cuda::train_backward);
}
