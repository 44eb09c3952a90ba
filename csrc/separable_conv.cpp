// separable_conv for the CPU: the dispatcher ops.
//
// The public function checks with better messages; torch.ops can be called without it, so everything the kernels rely
// on to stay inside memory is checked again here.
#include <torch/library.h>

#include <string>
#include <tuple>

#include "separable_layer.h"

namespace odn_fast::separable_conv {
namespace {

using std::optional;

Activation activation_named(const char* argument, std::string_view name) {
  constexpr std::pair<std::string_view, Activation> names[] = {{"none", Activation::none},
                                                               {"relu", Activation::relu},
                                                               {"relu6", Activation::relu6},
                                                               {"hard_swish", Activation::hard_swish},
                                                               {"silu", Activation::silu}};
  for (const auto& [known, activation] : names) {
    if (name == known) return activation;
  }
  TORCH_CHECK_VALUE(false, "separable_conv_infer: ", argument, " is '", name, "', expected none, relu, relu6, hard_swish or silu");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> train(const Tensor& x, const Tensor& dw, const Tensor& pw,
                                                         const Tensor& bn_weight, const Tensor& bn_bias,
                                                         const optional<Tensor>& residual, int64_t stride, double eps,
                                                         bool relu) {
  const char* op = "separable_conv_train";
  const std::vector<int64_t> shape = check_convolutions(op, x, dw, pw, stride);
  check_tensor(op, "bn_weight", bn_weight, {shape[1]});
  check_tensor(op, "bn_bias", bn_bias, {shape[1]});
  if (residual) check_tensor(op, "residual", *residual, shape);
  TORCH_CHECK_VALUE(shape[0] * shape[2] * shape[3] != 1, op, ": x has shape ", x.sizes(),
                    ", expected more than 1 value per channel when training");

  const Normalised normalised = forward_layer({dense(x), std::nullopt}, {dw, pw, stride});
  const Affine norm = affine(normalised.z_mean, normalised.var, bn_weight, bn_bias, eps);
  const Tensor added = residual ? dense_as(*residual, x) : Tensor();
  const Tensor y = finish(normalised.z, norm, residual ? &added : nullptr, nullptr, relu);
  return {y, normalised.mean, normalised.var, normalised.z, normalised.z_mean};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_backward(
    const Tensor& grad_y, const Tensor& x_any_strides, const Tensor& dw, const Tensor& pw, const Tensor& bn_weight,
    const Tensor& bn_bias, const optional<Tensor>& y_any_strides, const Tensor& z_any_strides, const Tensor& z_mean,
    const Tensor& var, int64_t stride, double eps, bool relu, bool x_needs_grad) {
  const char* op = "separable_conv_train_backward";
  const std::vector<int64_t> shape = check_convolutions(op, x_any_strides, dw, pw, stride);
  check_tensor(op, "grad_y", grad_y, shape);
  check_tensor(op, "z", z_any_strides, shape, x_any_strides.scalar_type());
  if (y_any_strides) check_tensor(op, "y", *y_any_strides, shape, x_any_strides.scalar_type());
  check_tensor(op, "bn_weight", bn_weight, {shape[1]});
  check_tensor(op, "bn_bias", bn_bias, {shape[1]});
  check_tensor(op, "z_mean", z_mean, {shape[1]}, compute_type(x_any_strides));
  check_tensor(op, "var", var, {shape[1]}, compute_type(x_any_strides));

  const Tensor x = dense(x_any_strides), z = dense(z_any_strides);
  const Tensor y = y_any_strides ? dense(*y_any_strides) : Tensor();
  OutputGradient gradient{dense_as(grad_y, x), y.defined() ? &y : nullptr, relu};
  const Affine norm = affine(z_mean, var, bn_weight, bn_bias, eps);
  Tensor grad_residual = y.defined() ? empty_map(x, shape) : at::empty({0}, x.options());
  const GradientSums sums = reduce(gradient, z, values_of(z_mean), norm, nullptr, {}, y.defined() ? &grad_residual : nullptr);
  if (y.defined()) gradient = {grad_residual, nullptr, false};  // masked already
  const NormGradient of_norm =
      norm_gradient(sums.grad, sums.product, z_mean, var, bn_weight, eps, shape[0] * shape[2] * shape[3]);
  const LayerGradients gradients =
      backward_layer({x, std::nullopt}, {}, {dw, pw, stride}, gradient, norm, z, of_norm, x_needs_grad, {});
  return {gradients.x, gradients.dw,  gradients.pw, like(of_norm.weight, bn_weight), like(of_norm.bias, bn_bias),
          grad_residual};
}

Tensor infer(const Tensor& x, const Tensor& dw, const optional<Tensor>& dw_bias, const Tensor& pw,
             const optional<Tensor>& pw_bias, const optional<Tensor>& residual, int64_t stride, std::string_view act_dw,
             std::string_view act_pw) {
  const char* op = "separable_conv_infer";
  const std::vector<int64_t> shape = check_convolutions(op, x, dw, pw, stride);
  if (dw_bias) check_tensor(op, "dw_bias", *dw_bias, {x.size(1)});
  if (pw_bias) check_tensor(op, "pw_bias", *pw_bias, {shape[1]});
  if (residual) check_tensor(op, "residual", *residual, shape);
  const Activation after_dw = activation_named("act_dw", act_dw), after_pw = activation_named("act_pw", act_pw);
  const optional<Tensor> added = residual ? optional(dense_as(*residual, x)) : std::nullopt;
  return infer_layer(dense(x), {dw, pw, stride}, dw_bias, after_dw, pw_bias, added, after_pw);
}

}  // namespace
}  // namespace odn_fast::separable_conv

TORCH_LIBRARY_IMPL(odn_fast, CPU, m) {
  m.impl("separable_conv_train", &odn_fast::separable_conv::train);
  m.impl("separable_conv_train_backward", &odn_fast::separable_conv::train_backward);
  m.impl("separable_conv_infer", &odn_fast::separable_conv::infer);
}
