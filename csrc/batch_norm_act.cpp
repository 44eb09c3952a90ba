// batch_norm_act for the CPU: the dispatcher ops.
//
// The public function checks with better messages; torch.ops can be called without it, so everything the kernels rely
// on to stay inside memory is checked again here.
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "batch_norm.h"

namespace odn_fast::batch_norm_act {
namespace {

using namespace batch_norm;
using std::optional;

const Functions& functions_for(const Tensor& x) { return by_storage(kernels.chosen(), x); }

void check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, op, ": x has shape ", x.sizes(),
                    ", expected (N, C, H, W) with C, H and W at least 1");
  check_tensor(op, "x", x, x.sizes());
  check_tensor(op, "weight", weight, {x.size(1)});
  check_tensor(op, "bias", bias, {x.size(1)});
  TORCH_CHECK_VALUE(x.numel() != x.size(1), op, ": x has shape ", x.sizes(),
                    ", expected more than 1 value per channel when training");
}

// The mean over a few pixels of x, as the type of arithmetic can hold it.
Values pivot(const Tensor& x) {
  constexpr int64_t most_samples = 16;
  const int64_t channels = x.size(1), pixels = x.numel() / channels, samples = std::min(pixels, most_samples);
  Values result(channels, 0.0);
  with_elements(x, [&](const auto* from) {
    for (int64_t sample = 0; sample < samples; ++sample) {
      const auto* pixel = from + (2 * sample + 1) * pixels / (2 * samples) * channels;
      for (int64_t c = 0; c < channels; ++c) result[c] += static_cast<double>(pixel[c]);
    }
  });
  const bool single = compute_type(x) == at::kFloat;
  for (double& value : result) {
    value /= std::max<int64_t>(samples, 1);
    if (single) value = static_cast<float>(value);
  }
  return result;
}

struct Moments {
  Tensor mean, var;
};

Moments moments(const Tensor& x) {
  const int64_t channels = x.size(1), pixels = x.numel() / channels, stride = 2 * padded(x, channels);
  const Values near_mean = pivot(x);
  const Vectors vectors(x, channels, {&near_mean});
  const Statistics statistics{channels, x.const_data_ptr(), vectors[0]};
  const Chunks chunks{pixels, most_chunks};
  std::vector<double> sums(most_chunks * stride, 0.0);
  run(chunks, pixels * channels, Order::forward, [&](int64_t chunk) {
    functions_for(x).statistics(statistics, chunks.first(chunk), chunks.first(chunk + 1), sums.data() + chunk * stride);
  });
  const Values total = added(sums, stride);
  Values mean(channels), var(channels);
  for (int64_t c = 0; c < channels && pixels > 0; ++c) {
    const double offset = total[c] / pixels, variance = total[stride / 2 + c] / pixels - offset * offset;
    mean[c] = near_mean[c] + offset;
    var[c] = variance < 0 ? 0 : variance;  // NaN stays NaN
  }
  return {vector_of(mean, compute_type(x)), vector_of(var, compute_type(x))};
}

Tensor apply(const OutputGradient& gradient, const Tensor& x, const Tensor& mean, const Affine& mask,
             const NormGradient& norm) {
  const int64_t channels = x.size(1), pixels = x.numel() / channels;
  const Values means = values_of(mean);
  const Vectors vectors(x, channels, {&mask.scale, &mask.shift, &norm.scale, &norm.constant, &norm.slope, &means});
  Tensor grad_x = empty_map(x, x.sizes());
  const Apply apply{channels,
                    {gradient.grad.const_data_ptr(), x.const_data_ptr(), gradient.y ? gradient.y->const_data_ptr() : nullptr,
                     gradient.relu, vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]},
                    vectors[5],
                    grad_x.mutable_data_ptr()};
  const Chunks chunks{pixels, most_chunks};
  run(chunks, 2 * pixels * channels, Order::backward, [&](int64_t chunk) {
    functions_for(x).apply(apply, chunks.first(chunk), chunks.first(chunk + 1));
  });
  return grad_x;
}

std::tuple<Tensor, Tensor, Tensor> train(const Tensor& x_any_strides, const Tensor& weight, const Tensor& bias,
                                         const optional<Tensor>& residual, double eps, bool relu) {
  const char* op = "batch_norm_act_train";
  check(op, x_any_strides, weight, bias);
  if (residual) check_tensor(op, "residual", *residual, x_any_strides.sizes());

  const Tensor x = dense(x_any_strides), added = residual ? dense_as(*residual, x) : Tensor();
  const Moments of_x = moments(x);
  const Tensor y = finish(x, affine(of_x.mean, of_x.var, weight, bias, eps), residual ? &added : nullptr, nullptr, relu);
  return {y, of_x.mean, of_x.var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_backward(const Tensor& grad_y, const Tensor& x_any_strides,
                                                          const Tensor& weight, const Tensor& bias,
                                                          const optional<Tensor>& y_any_strides, const Tensor& mean,
                                                          const Tensor& var, double eps, bool relu, bool x_needs_grad) {
  const char* op = "batch_norm_act_train_backward";
  check(op, x_any_strides, weight, bias);
  check_tensor(op, "grad_y", grad_y, x_any_strides.sizes());
  if (y_any_strides) check_tensor(op, "y", *y_any_strides, x_any_strides.sizes(), x_any_strides.scalar_type());
  check_tensor(op, "mean", mean, {x_any_strides.size(1)}, compute_type(x_any_strides));
  check_tensor(op, "var", var, {x_any_strides.size(1)}, compute_type(x_any_strides));

  const Tensor x = dense(x_any_strides), y = y_any_strides ? dense(*y_any_strides) : Tensor();
  OutputGradient gradient{dense_as(grad_y, x), y.defined() ? &y : nullptr, relu};
  const Affine mask = affine(mean, var, weight, bias, eps);
  Tensor grad_residual = y.defined() ? empty_map(x, x.sizes()) : at::empty({0}, x.options());
  const GradientSums sums = reduce(gradient, x, values_of(mean), mask, nullptr, {}, y.defined() ? &grad_residual : nullptr);
  if (y.defined()) gradient = {grad_residual, nullptr, false};  // masked already
  const NormGradient norm =
      norm_gradient(sums.grad, sums.product, at::zeros_like(mean), var, weight, eps, x.numel() / x.size(1));
  return {x_needs_grad ? apply(gradient, x, mean, mask, norm) : at::empty({0}, x.options()), like(norm.weight, weight),
          like(norm.bias, bias), grad_residual};
}

}  // namespace
}  // namespace odn_fast::batch_norm_act

TORCH_LIBRARY_IMPL(odn_fast, CPU, m) {
  m.impl("batch_norm_act_train", &odn_fast::batch_norm_act::train);
  m.impl("batch_norm_act_train_backward", &odn_fast::batch_norm_act::train_backward);
}
