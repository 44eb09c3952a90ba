// separable_conv for CUDA devices: ops of their own, which odn_fast/ops chooses for what they can take.
//
// Built where there is nvcc and a CUDA build of torch. torch.ops can be called without the chooser, so everything the
// kernels rely on to stay inside memory is checked here.
#include "separable_conv_cuda_torch.h"

#include <torch/library.h>

#include <string>
#include <string_view>
#include <tuple>
#include <utility>

namespace odn_fast::separable_conv_cuda {
namespace {

Activation activation_named(const char* argument, std::string_view name) {
  constexpr std::pair<std::string_view, Activation> names[] = {{"none", Activation::none},
                                                               {"relu", Activation::relu},
                                                               {"relu6", Activation::relu6},
                                                               {"hard_swish", Activation::hard_swish},
                                                               {"silu", Activation::silu}};
  for (const auto& [known, activation] : names) {
    if (name == known) return activation;
  }
  TORCH_CHECK_VALUE(false, "separable_conv_infer_cuda: ", argument, " is '", name, "', expected none, relu, relu6, hard_swish or silu");
}

Tensor infer(const Tensor& x, const Tensor& dw, const optional<Tensor>& dw_bias, const Tensor& pw,
             const optional<Tensor>& pw_bias, const optional<Tensor>& residual, int64_t stride, std::string_view act_dw,
             std::string_view act_pw) {
  const char* op = "separable_conv_infer_cuda";
  const c10::cuda::OptionalCUDAGuard guard(x.is_cuda() ? optional(x.device()) : std::nullopt);
  const Prepared prepared(op, x, dw, pw, stride);
  if (dw_bias) check_parameter(op, "dw_bias", *dw_bias, {x.size(1)}, x);
  if (pw_bias) check_parameter(op, "pw_bias", *pw_bias, {prepared.shape[1]}, x);
  if (residual) check_map(op, "residual", *residual, prepared.shape, x);
  const Tensor y = prepared.empty_map();
  const optional<Tensor> of_dw = contiguous(dw_bias), of_pw = contiguous(pw_bias), added = dense(residual);
  const Inference inference{prepared.convolution(stride), parameter(of_dw), activation_named("act_dw", act_dw),
                            parameter(of_pw), data(added), activation_named("act_pw", act_pw), y.mutable_data_ptr()};
  if (y.numel()) C10_CUDA_CHECK(launch(inference, c10::cuda::getCurrentCUDAStream()));
  return y;
}

// With in_scale and in_shift, relu(in_scale * x + in_shift) is convolved.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> train(const Tensor& x, const Tensor& dw, const Tensor& pw,
                                                         const Tensor& bn_weight, const Tensor& bn_bias,
                                                         const optional<Tensor>& residual, int64_t stride, double eps,
                                                         bool relu, const optional<Tensor>& in_scale,
                                                         const optional<Tensor>& in_shift) {
  const char* op = "separable_conv_train_cuda";
  const c10::cuda::OptionalCUDAGuard guard(x.is_cuda() ? optional(x.device()) : std::nullopt);
  const Prepared prepared(op, x, dw, pw, stride);
  const int64_t channels = prepared.shape[1];
  TORCH_CHECK_VALUE(in_scale.has_value() == in_shift.has_value(), op, ": in_scale and in_shift, expected both or neither");
  for (const auto& [name, vector] : {std::pair("in_scale", in_scale), std::pair("in_shift", in_shift)}) {
    if (vector) check(op, name, *vector, {x.size(1)}, x, vector->scalar_type() == at::kFloat, "float32");
  }
  check_parameter(op, "bn_weight", bn_weight, {channels}, x);
  check_parameter(op, "bn_bias", bn_bias, {channels}, x);
  if (residual) check_map(op, "residual", *residual, prepared.shape, x);

  const auto floats = x.options().dtype(at::kFloat);
  const Tensor y = prepared.empty_map(), z = prepared.empty_map();
  TORCH_CHECK_VALUE(y.numel() != channels, op, ": x has shape ", x.sizes(), ", expected more than 1 value per channel when training");
  if (y.numel() == 0) return {y, at::zeros({channels}, floats), at::zeros({channels}, floats), z, at::zeros({channels}, floats)};
  const Tensor mean = at::empty({channels}, floats), var = at::empty({channels}, floats), z_mean = at::empty({channels}, floats);
  const Tensor partials = at::empty({static_cast<int64_t>(partial_bytes(channels) / sizeof(float))}, floats);
  const optional<Tensor> scale = contiguous(in_scale), shift = contiguous(in_shift), added = dense(residual);
  const Tensor weight = bn_weight.contiguous(), bias = bn_bias.contiguous();

  Training training{};
  training.convolution = prepared.convolution(stride);
  training.in_scale = static_cast<const float*>(data(scale));
  training.in_shift = static_cast<const float*>(data(shift));
  training.z = z.mutable_data_ptr();
  training.mean = mean.mutable_data_ptr<float>();
  training.var = var.mutable_data_ptr<float>();
  training.z_mean = z_mean.mutable_data_ptr<float>();
  training.bn_weight = parameter(weight);
  training.bn_bias = parameter(bias);
  training.eps = static_cast<float>(eps);
  training.residual = data(added);
  training.relu = relu;
  training.y = y.mutable_data_ptr();
  training.partials = partials.mutable_data_ptr<float>();
  training.counter = counter(x);
  C10_CUDA_CHECK(launch(training, c10::cuda::getCurrentCUDAStream()));
  return {y, mean, var, z, z_mean};
}

// Of the current device: "" where it has a kernel for these channels, else the reason.
std::string why_not_here(int64_t in_channels, int64_t out_channels, int64_t stride) {
  const char* reason = why_not(in_channels, out_channels, stride);
  return reason ? reason : "";
}

}  // namespace
}  // namespace odn_fast::separable_conv_cuda

TORCH_LIBRARY_FRAGMENT(odn_fast, m) {
  namespace ops = odn_fast::separable_conv_cuda;
  m.def("separable_conv_cuda_why_not(int in_channels, int out_channels, int stride) -> str", &ops::why_not_here);
  m.def("separable_conv_infer_cuda(Tensor x, Tensor dw, Tensor? dw_bias, Tensor pw, Tensor? pw_bias, Tensor? residual,"
        " int stride, str act_dw, str act_pw) -> Tensor");
  m.def("separable_conv_train_cuda(Tensor x, Tensor dw, Tensor pw, Tensor bn_weight, Tensor bn_bias, Tensor? residual,"
        " int stride, float eps, bool relu, Tensor? in_scale=None, Tensor? in_shift=None)"
        " -> (Tensor y, Tensor mean, Tensor var, Tensor z, Tensor z_mean)");
}

TORCH_LIBRARY_IMPL(odn_fast, CUDA, m) {
  m.impl("separable_conv_infer_cuda", &odn_fast::separable_conv_cuda::infer);
  m.impl("separable_conv_train_cuda", &odn_fast::separable_conv_cuda::train);
}
