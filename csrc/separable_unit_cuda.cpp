// separable_unit for CUDA devices: the launches of the separable convolution, chained. Two forward, four backward.
//
// The map between the two convolutions is never stored: the second one normalises the first one's z as it reads it, and
// in the backward pass leaves the gradient of the first one's batch norm with the sums that this needs. Skips with
// weights are not taken.
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "separable_conv_cuda_backward_torch.h"

namespace odn_fast::separable_conv_cuda {
namespace {

using at::TensorList;

struct Strides {
  int64_t first, second;
};

Strides strides_of(const char* op, int64_t stride) {
  TORCH_CHECK_VALUE(stride == 1 || stride == 2 || stride == 4, op, ": stride is ", stride, ", expected 1, 2 or 4");
  return {stride == 1 ? 1 : 2, stride == 4 ? 2 : 1};
}

void check_lists(const char* op, TensorList first, TensorList second, TensorList skip) {
  TORCH_CHECK_VALUE(first.size() == 4 && second.size() == 4, op, ": first has ", first.size(), " entries and second ", second.size(),
                    ", expected 4: dw, pw, bn_weight and bn_bias");
  TORCH_CHECK_VALUE(skip.empty(), op, ": skip has ", skip.size(), " entries, expected none");
}

void check_identity(const char* op, bool identity, const Prepared& first) {
  TORCH_CHECK_VALUE(!identity || first.x.sizes() == first.shape, op, ": identity with x of shape ", first.x.sizes(),
                    ", expected ", first.shape);
}

// One layer of the forward pass.
struct Half {
  Prepared prepared;
  Tensor weight, bias, z, mean, var, z_mean, scratch;

  Half(const char* op, const Tensor& x, TensorList layer, int64_t stride) : prepared(op, x, layer[0], layer[1], stride) {
    const int64_t channels = prepared.shape[1];
    check_parameter(op, "bn_weight", layer[2], {channels}, x);
    check_parameter(op, "bn_bias", layer[3], {channels}, x);
    const auto floats = x.options().dtype(at::kFloat);
    weight = layer[2].contiguous(), bias = layer[3].contiguous(), z = prepared.empty_map();
    mean = at::empty({channels}, floats), var = at::empty({channels}, floats), z_mean = at::empty({channels}, floats);
    scratch = at::empty({static_cast<int64_t>(partial_bytes(channels) / sizeof(float)) + 2 * channels}, floats);
  }

  Training training(int64_t stride, double eps) const {
    const int64_t channels = prepared.shape[1];
    Training p{};
    p.convolution = prepared.convolution(stride);
    p.z = z.mutable_data_ptr();
    p.mean = mean.mutable_data_ptr<float>(), p.var = var.mutable_data_ptr<float>(), p.z_mean = z_mean.mutable_data_ptr<float>();
    p.bn_weight = parameter(weight), p.bn_bias = parameter(bias);
    p.eps = static_cast<float>(eps);
    p.scale = scratch.mutable_data_ptr<float>(), p.shift = p.scale + channels;
    p.partials = p.shift + channels;
    p.counter = counter(z);
    return p;
  }
};

using Tensors = std::vector<Tensor>;

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors> train(const Tensor& x, TensorList first, TensorList second, TensorList skip,
                                                             bool identity, int64_t stride, double eps) {
  const char* op = "separable_unit_train_cuda";
  const c10::cuda::OptionalCUDAGuard guard(x.is_cuda() ? optional(x.device()) : std::nullopt);
  const Strides strides = strides_of(op, stride);
  check_lists(op, first, second, skip);
  const Half before(op, x, first, strides.first);
  const Half after(op, before.z, second, strides.second);
  check_identity(op, identity, before.prepared);
  const int64_t channels = after.prepared.shape[1];
  const Tensor y = after.prepared.empty_map();
  TORCH_CHECK_VALUE(y.numel() != channels, op, ": x has shape ", x.sizes(), ", expected more than 1 value per channel when training");
  if (y.numel() == 0) {
    for (const Half* half : {&before, &after}) half->mean.zero_(), half->var.zero_(), half->z_mean.zero_();
  } else {
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const Training one = before.training(strides.first, eps);
    C10_CUDA_CHECK(launch(one, stream));
    Training two = after.training(strides.second, eps);
    two.in_scale = one.scale, two.in_shift = one.shift;
    two.residual = identity ? before.prepared.x.const_data_ptr() : nullptr;
    two.relu = true;
    two.y = y.mutable_data_ptr();
    C10_CUDA_CHECK(launch(two, stream));
  }
  return {y, {before.mean, after.mean}, {before.var, after.var}, {before.z, after.z}, {before.z_mean, after.z_mean}};
}

std::tuple<Tensor, Tensors, Tensors, Tensors> train_backward(const Tensor& grad_y, const Tensor& x, TensorList first, TensorList second,
                                                             TensorList skip, const Tensor& y, TensorList zs, TensorList z_means,
                                                             TensorList vars, bool identity, int64_t stride, double eps,
                                                             bool x_needs_grad) {
  const char* op = "separable_unit_train_backward_cuda";
  const c10::cuda::OptionalCUDAGuard guard(x.is_cuda() ? optional(x.device()) : std::nullopt);
  const Strides strides = strides_of(op, stride);
  check_lists(op, first, second, skip);
  TORCH_CHECK_VALUE(zs.size() == 2 && z_means.size() == 2 && vars.size() == 2, op, ": zs, z_means and vars have ", zs.size(), ", ",
                    z_means.size(), " and ", vars.size(), " entries, expected 2");
  const Layer one(op, x, first[0], first[1], first[2], first[3], zs[0], z_means[0], vars[0], strides.first);
  const Layer two(op, one.z, second[0], second[1], second[2], second[3], zs[1], z_means[1], vars[1], strides.second);
  check_identity(op, identity, one.prepared);
  check_map(op, "grad_y", grad_y, two.prepared.shape, x);
  if (identity) check_map(op, "y", y, two.prepared.shape, x);
  const Tensor grad_x = x_needs_grad ? at::empty_like(one.prepared.x) : at::empty({0}, x.options());
  const std::tuple<Tensor, Tensors, Tensors, Tensors> gradients{grad_x, {one.grad_dw, one.grad_pw, one.grad_weight, one.grad_bias},
                                                                {two.grad_dw, two.grad_pw, two.grad_weight, two.grad_bias}, {}};
  if (two.z.numel() == 0) {
    one.zero_gradients();
    two.zero_gradients();
    return gradients;
  }
  const Tensor grad = dense(grad_y);
  const Tensor result = identity ? dense(y) : Tensor(), masked = identity ? at::empty_like(two.z) : Tensor();
  const Tensor between = at::empty_like(one.z);  // the gradient of the first batch norm's result
  const float eps_ = static_cast<float>(eps);
  Scratch of_one(one, strides.first, false, x), of_two(two, strides.second, true, x);

  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  NormBackward norm = two.norm_backward(of_two, eps_);
  norm.grad_y = grad.const_data_ptr();
  norm.y = identity ? result.const_data_ptr() : nullptr;
  norm.relu = true;
  norm.masked = identity ? masked.mutable_data_ptr() : nullptr;
  norm.counter = counter(x);
  C10_CUDA_CHECK(launch(norm, stream));

  ConvolutionBackward convolution = two.convolution_backward(of_two, strides.second, eps_);
  convolution.in_norm = one.norm();
  convolution.grad = identity ? norm.masked : norm.grad_y;
  convolution.masks = !identity;
  convolution.grad_x = between.mutable_data_ptr();
  convolution.in_gradients = one.norm_gradients(of_one);
  convolution.counter = counter(x);
  C10_CUDA_CHECK(launch(convolution, stream));

  convolution = one.convolution_backward(of_one, strides.first, eps_);
  convolution.grad = between.const_data_ptr();
  convolution.added = identity ? norm.masked : nullptr;
  convolution.grad_x = x_needs_grad ? grad_x.mutable_data_ptr() : nullptr;
  C10_CUDA_CHECK(launch(convolution, stream));

  WeightSums sums{};
  one.sum_weights(of_one, sums);
  two.sum_weights(of_two, sums);
  C10_CUDA_CHECK(launch(sums, stream));
  return gradients;
}

}  // namespace
}  // namespace odn_fast::separable_conv_cuda

TORCH_LIBRARY_FRAGMENT(odn_fast, m) {
  m.def("separable_unit_train_cuda(Tensor x, Tensor[] first, Tensor[] second, Tensor[] skip, bool identity, int stride, float eps)"
        " -> (Tensor y, Tensor[] means, Tensor[] vars, Tensor[] zs, Tensor[] z_means)");
  m.def("separable_unit_train_backward_cuda(Tensor grad_y, Tensor x, Tensor[] first, Tensor[] second, Tensor[] skip, Tensor y,"
        " Tensor[] zs, Tensor[] z_means, Tensor[] vars, bool identity, int stride, float eps, bool x_needs_grad)"
        " -> (Tensor grad_x, Tensor[] grad_first, Tensor[] grad_second, Tensor[] grad_skip)");
}

TORCH_LIBRARY_IMPL(odn_fast, CUDA, m) {
  m.impl("separable_unit_train_cuda", &odn_fast::separable_conv_cuda::train);
  m.impl("separable_unit_train_backward_cuda", &odn_fast::separable_conv_cuda::train_backward);
}
