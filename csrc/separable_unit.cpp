// separable_unit for the CPU: the dispatcher ops, made of the layers of separable_conv.
//
// The map between the two convolutions is never stored: the second layer normalises the first one's output as it
// reads it, forward and again backward.
#include <torch/library.h>

#include <tuple>

#include "separable_layer.h"

namespace odn_fast::separable_conv {
namespace {

using at::TensorList;

struct Unit {
  Weights first, second;
  std::optional<Weights> skip;
  bool identity;
  std::vector<int64_t> between, output;  // shapes
};

Unit check_unit(const char* op, const Tensor& x, TensorList first, TensorList second, TensorList skip, bool identity,
                int64_t stride) {
  TORCH_CHECK_VALUE(stride == 1 || stride == 2 || stride == 4, op, ": stride is ", stride, ", expected 1, 2 or 4");
  TORCH_CHECK_VALUE(first.size() == 4 && second.size() == 4 && (skip.empty() || skip.size() == 3), op, ": first, second and skip have ",
                    first.size(), ", ", second.size(), " and ", skip.size(), " entries, expected 4, 4 and none or 3");
  Unit unit{{first[0], first[1], stride == 1 ? 1 : 2}, {second[0], second[1], stride == 4 ? 2 : 1}, std::nullopt, identity, {}, {}};
  unit.between = check_convolutions(op, x, first[0], first[1], unit.first.stride);
  const int64_t channels = unit.between[1];
  check_tensor(op, "second[0]", second[0], {channels, 1, 3, 3});
  check_tensor(op, "second[1]", second[1], {channels, channels, 1, 1});
  for (const TensorList& tensors : {first, second}) {
    check_tensor(op, "bn_weight", tensors[2], {channels});
    check_tensor(op, "bn_bias", tensors[3], {channels});
  }
  if (!skip.empty()) {
    check_tensor(op, "skip[0]", skip[0], {channels, x.size(1), 1, 1});
    check_tensor(op, "skip[1]", skip[1], {channels});
    check_tensor(op, "skip[2]", skip[2], {channels});
    unit.skip = Weights{std::nullopt, skip[0], stride};
  }
  TORCH_CHECK_VALUE(!identity || (skip.empty() && stride == 1 && x.size(1) == channels), op, ": identity with x of shape ",
                    x.sizes(), ", stride ", stride, " and ", skip.size(), " entries in skip, expected ", channels,
                    " channels, stride 1 and an empty skip");
  unit.output = {x.size(0), channels, output_size(unit.between[2], unit.second.stride),
                 output_size(unit.between[3], unit.second.stride)};
  TORCH_CHECK_VALUE(x.size(0) * unit.output[2] * unit.output[3] != 1, op, ": x has shape ", x.sizes(),
                    ", expected more than 1 value per channel when training");
  return unit;
}

using Tensors = std::vector<Tensor>;

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors> train(const Tensor& x_any_strides, TensorList first,
                                                             TensorList second, TensorList skip, bool identity,
                                                             int64_t stride, double eps) {
  const Unit unit = check_unit("separable_unit_train", x_any_strides, first, second, skip, identity, stride);
  const Tensor x = dense(x_any_strides);
  std::vector<Normalised> layers;
  std::vector<Affine> norms;
  const auto layer = [&](const LayerInput& input, const Weights& weights, const Tensor& bn_weight, const Tensor& bn_bias) {
    const Normalised& result = layers.emplace_back(forward_layer(input, weights));
    norms.push_back(affine(result.z_mean, result.var, bn_weight, bn_bias, eps));
  };
  layer({x, std::nullopt}, unit.first, first[2], first[3]);
  layer({layers[0].z, norms[0]}, unit.second, second[2], second[3]);
  if (unit.skip) layer({x, std::nullopt}, *unit.skip, skip[1], skip[2]);

  const Tensor* residual = unit.skip ? &layers[2].z : identity ? &x : nullptr;
  const Tensor y = finish(layers[1].z, norms[1], residual, unit.skip ? &norms[2] : nullptr, true);
  Tensors means, vars, zs, z_means;
  for (const Normalised& each : layers) {
    means.push_back(each.mean);
    vars.push_back(each.var);
    zs.push_back(each.z);
    z_means.push_back(each.z_mean);
  }
  return {y, means, vars, zs, z_means};
}

std::tuple<Tensor, Tensors, Tensors, Tensors> train_backward(const Tensor& grad_y, const Tensor& x_any_strides,
                                                             TensorList first, TensorList second, TensorList skip,
                                                             const Tensor& y_any_strides, TensorList zs_any_strides,
                                                             TensorList z_means, TensorList vars, bool identity,
                                                             int64_t stride, double eps, bool x_needs_grad) {
  const char* op = "separable_unit_train_backward";
  const Unit unit = check_unit(op, x_any_strides, first, second, skip, identity, stride);
  const at::ScalarType type = x_any_strides.scalar_type();
  check_tensor(op, "grad_y", grad_y, unit.output);
  check_tensor(op, "y", y_any_strides, unit.output, type);
  const size_t layers = unit.skip ? 3 : 2;
  TORCH_CHECK_VALUE(zs_any_strides.size() == layers && z_means.size() == layers && vars.size() == layers, op,
                    ": zs, z_means and vars have ",
                    zs_any_strides.size(), ", ", z_means.size(), " and ", vars.size(), " entries, expected ", layers);
  Tensors zs;
  for (size_t i = 0; i < layers; ++i) {
    check_tensor(op, "zs", zs_any_strides[i], i == 0 ? unit.between : unit.output, type);
    check_tensor(op, "z_means", z_means[i], {unit.output[1]}, compute_type(x_any_strides));
    check_tensor(op, "vars", vars[i], {unit.output[1]}, compute_type(x_any_strides));
    zs.push_back(dense(zs_any_strides[i]));
  }

  const Tensor x = dense(x_any_strides), y = dense(y_any_strides);
  const OutputGradient gradient{dense_as(grad_y, x), &y, true};
  const int64_t values = unit.output[0] * unit.output[2] * unit.output[3];
  const Affine none, norm = affine(z_means[0], vars[0], first[2], first[3], eps);

  // Both branches meet in y, so one sweep over it serves both batch norms.
  const GradientSums sums = reduce(gradient, zs[1], values_of(z_means[1]), none, unit.skip ? &zs[2] : nullptr,
                                   unit.skip ? values_of(z_means[2]) : Values(), nullptr);
  const NormGradient norm_2 = norm_gradient(sums.grad, sums.product, z_means[1], vars[1], second[2], eps, values);
  const LayerGradients layer_2 = backward_layer({zs[0], norm}, values_of(z_means[0]), unit.second, gradient, none, zs[1],
                                                norm_2, true, {});
  Tensors grad_skip;
  LayerGradients pooled;
  if (unit.skip) {
    const NormGradient of_skip = norm_gradient(sums.grad, sums.other_product, z_means[2], vars[2], skip[1], eps, values);
    pooled = backward_layer({x, std::nullopt}, {}, *unit.skip, gradient, none, zs[2], of_skip, x_needs_grad, {});
    grad_skip = {pooled.pw, like(of_skip.weight, skip[1]), like(of_skip.bias, skip[2])};
  }
  const Skip added{identity ? &gradient.grad : nullptr, identity ? &y : nullptr, unit.skip ? &pooled.x : nullptr, stride};
  const NormGradient norm_1 = norm_gradient(layer_2.sums, layer_2.products, z_means[0], vars[0], first[2], eps,
                                            unit.between[0] * unit.between[2] * unit.between[3]);
  const LayerGradients layer_1 =
      backward_layer({x, std::nullopt}, {}, unit.first, {layer_2.x, nullptr, false}, none, zs[0], norm_1, x_needs_grad, added);
  return {layer_1.x,
          {layer_1.dw, layer_1.pw, like(norm_1.weight, first[2]), like(norm_1.bias, first[3])},
          {layer_2.dw, layer_2.pw, like(norm_2.weight, second[2]), like(norm_2.bias, second[3])},
          grad_skip};
}

}  // namespace
}  // namespace odn_fast::separable_conv

TORCH_LIBRARY_IMPL(odn_fast, CPU, m) {
  m.impl("separable_unit_train", &odn_fast::separable_conv::train);
  m.impl("separable_unit_train_backward", &odn_fast::separable_conv::train_backward);
}
