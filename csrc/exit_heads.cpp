// exit_heads for the CPU: checks, allocation and parallel launch.
//
// The public function checks with better messages; torch.ops can be called without it, so everything the
// kernels rely on to stay inside memory is checked again here.
#include "exit_heads.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

namespace odn_fast::exit_heads {
namespace {

using at::Tensor;
using at::TensorList;

// Below these, a second thread costs more than it brings.
constexpr int64_t elements_worth_a_thread = 1 << 15;
constexpr int64_t multiply_adds_worth_a_thread = 1 << 19;

bool is_floating(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16 || type == at::kDouble; }

at::ScalarType compute_type(at::ScalarType feature_type) {
  return feature_type == at::kDouble ? at::kDouble : at::kFloat;
}

const Functions& functions_for(at::ScalarType feature_type) {
  const Kernels& table = kernels.chosen();
  switch (feature_type) {
    case at::kBFloat16: return table.bfloat16;
    case at::kDouble: return table.float64;
    default: return table.float32;
  }
}

void check_parameter(const char* name, int64_t depth, const Tensor& tensor, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected && tensor.device().is_cpu() && is_floating(tensor.scalar_type()),
                    "exit_heads: ", name, "[", depth, "] has shape ", tensor.sizes(), " and dtype ", tensor.dtype(),
                    " on ", tensor.device(), ", expected ", expected, " of a floating dtype on the CPU");
}

void check_forward(TensorList features, TensorList weights, TensorList biases, const Tensor& target) {
  TORCH_CHECK_VALUE(!features.empty(), "exit_heads: features is empty, expected one feature map per depth");
  TORCH_CHECK_VALUE(weights.size() == features.size() && biases.size() == features.size(), "exit_heads: ",
                    weights.size(), " weights and ", biases.size(), " biases for ", features.size(), " features");
  TORCH_CHECK_VALUE(weights[0].dim() == 2 && weights[0].size(0) >= 1, "exit_heads: weights[0] has shape ",
                    weights[0].sizes(), ", expected (K, C) with K >= 1");
  TORCH_CHECK_VALUE(target.dim() == 1 && target.scalar_type() == at::kLong && target.device().is_cpu(),
                    "exit_heads: target has shape ", target.sizes(), " and dtype ", target.dtype(), " on ",
                    target.device(), ", expected (N,) int64 on the CPU");
  const int64_t batch = target.size(0), classes = weights[0].size(0);
  for (size_t depth = 0; depth < features.size(); ++depth) {
    const Tensor& feature = features[depth];
    TORCH_CHECK_VALUE(feature.dim() == 4 && feature.size(0) == batch && feature.device().is_cpu() &&
                          is_floating(feature.scalar_type()) && feature.dtype() == features[0].dtype(),
                      "exit_heads: features[", depth, "] has shape ", feature.sizes(), " and dtype ", feature.dtype(),
                      " on ", feature.device(), ", expected (", batch, ", C, H, W) of one floating dtype on the CPU");
    check_parameter("weights", depth, weights[depth], {classes, feature.size(1)});
    check_parameter("biases", depth, biases[depth], {classes});
  }
}

// Describes `feature` to the kernel, or its channels_last copy where neither channels nor positions are adjacent;
// `kept` keeps it alive.
ForwardHead describe(const Tensor& feature, std::vector<Tensor>& kept) {
  const int64_t channels = feature.size(1), height = feature.size(2), width = feature.size(3);
  const int64_t channel_stride = channels == 1 ? 1 : feature.stride(1);
  const int64_t position_stride = width == 1 ? feature.stride(2) : feature.stride(3);
  const bool even = height == 1 || width == 1 || feature.stride(2) == width * feature.stride(3);
  if (feature.numel() != 0 && (!even || (channel_stride != 1 && position_stride != 1))) {
    return describe(feature.contiguous(at::MemoryFormat::ChannelsLast), kept);
  }
  ForwardHead head{};
  head.feature = kept.emplace_back(feature).const_data_ptr();
  head.image_stride = feature.stride(0);
  head.channel_stride = channel_stride;
  head.position_stride = position_stride;
  head.channels = channels;
  head.positions = height * width;
  return head;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(TensorList features, TensorList weights, TensorList biases,
                                                   const Tensor& target_any_strides) {
  check_forward(features, weights, biases, target_any_strides);
  const at::ScalarType feature_type = features[0].scalar_type(), type = compute_type(feature_type);
  const int64_t depths = static_cast<int64_t>(features.size());
  const int64_t batch = target_any_strides.size(0), classes = weights[0].size(0);

  const Tensor target = target_any_strides.contiguous();
  const int64_t* targets = target.const_data_ptr<int64_t>();
  for (int64_t image = 0; image < batch; ++image) {
    TORCH_CHECK_VALUE(0 <= targets[image] && targets[image] < classes, "exit_heads: target[", image, "] is ",
                      targets[image], ", expected a class in [0, ", classes, ")");
  }

  std::vector<Tensor> kept;  // what the kernels read
  std::vector<ForwardHead> heads;
  int64_t width = 0, elements_per_image = 0;
  for (int64_t depth = 0; depth < depths; ++depth) {
    ForwardHead& head = heads.emplace_back(describe(features[depth], kept));
    head.column = width;
    head.weight = kept.emplace_back(weights[depth].to(type).contiguous()).const_data_ptr();
    head.bias = kept.emplace_back(biases[depth].to(type).contiguous()).const_data_ptr();
    width += head.channels;
    elements_per_image += head.channels * (head.positions + classes);
  }

  const auto options = features[0].options().dtype(type).memory_format(at::MemoryFormat::Contiguous);
  const Tensor pooled = at::empty({batch, width}, options);
  const Tensor logit_gradients = at::empty({depths, batch, classes}, options);
  std::vector<double> image_losses(depths * batch);
  std::vector<int64_t> image_correct(depths * batch);

  const Forward parameters{heads.data(), depths, batch, classes, width, targets, pooled.data_ptr(),
                           logit_gradients.data_ptr(), image_losses.data(), image_correct.data()};
  const auto kernel = functions_for(feature_type).forward;
  const int64_t chunks = (batch + images_per_chunk - 1) / images_per_chunk;
  const int64_t grain = elements_worth_a_thread / (images_per_chunk * elements_per_image + 1) + 1;
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * images_per_chunk;
      kernel(parameters, first, std::min(first + images_per_chunk, batch));
    }
  });

  std::vector<double> losses(depths);
  std::vector<int64_t> correct(depths);
  for (int64_t depth = 0; depth < depths; ++depth) {  // in the order of the images, whatever the threads did
    const double* first_loss = image_losses.data() + depth * batch;
    const int64_t* first_correct = image_correct.data() + depth * batch;
    losses[depth] = std::accumulate(first_loss, first_loss + batch, 0.0) / static_cast<double>(batch);
    correct[depth] = std::accumulate(first_correct, first_correct + batch, int64_t{0});
  }
  return {at::tensor(losses, options), at::tensor(correct, target.options()), pooled, logit_gradients};
}

void check_backward(const Tensor& grad_losses, const Tensor& pooled, const Tensor& logit_gradients, TensorList weights,
                    at::IntArrayRef positions, at::ScalarType feature_type) {
  TORCH_CHECK_VALUE(is_floating(feature_type), "exit_heads_backward: feature_dtype is ", feature_type);
  const at::ScalarType type = compute_type(feature_type);
  const int64_t depths = static_cast<int64_t>(weights.size());
  TORCH_CHECK_VALUE(logit_gradients.dim() == 3 && logit_gradients.size(0) == depths &&
                        logit_gradients.scalar_type() == type && logit_gradients.device().is_cpu(),
                    "exit_heads_backward: logit_gradients has shape ", logit_gradients.sizes(), " and dtype ",
                    logit_gradients.dtype(), ", expected (", depths, ", N, K) of ", type, " on the CPU");
  const int64_t batch = logit_gradients.size(1), classes = logit_gradients.size(2);
  TORCH_CHECK_VALUE(positions.size() == weights.size(), "exit_heads_backward: ", positions.size(), " positions for ",
                    weights.size(), " weights");
  TORCH_CHECK_VALUE(grad_losses.sizes() == at::IntArrayRef{depths} && grad_losses.device().is_cpu(),
                    "exit_heads_backward: grad_losses has shape ", grad_losses.sizes(), ", expected (", depths, ")");
  int64_t width = 0;
  for (int64_t depth = 0; depth < depths; ++depth) {
    const Tensor& weight = weights[depth];
    TORCH_CHECK_VALUE(weight.dim() == 2, "exit_heads_backward: weights[", depth, "] has shape ", weight.sizes(),
                      ", expected (K, C)");
    check_parameter("weights", depth, weight, {classes, weight.size(1)});
    width += weight.size(1);
  }
  TORCH_CHECK_VALUE(pooled.sizes() == at::IntArrayRef({batch, width}) && pooled.scalar_type() == type &&
                        pooled.device().is_cpu(),
                    "exit_heads_backward: pooled has shape ", pooled.sizes(), " and dtype ", pooled.dtype(),
                    ", expected (", batch, ", ", width, ") of ", type, " on the CPU");
}

struct Block {  // of channels
  BackwardHead head;
  int64_t first, last;
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> backward(
    const Tensor& grad_losses_any_strides, const Tensor& pooled_any_strides, const Tensor& logit_gradients_any_strides,
    TensorList weights, at::IntArrayRef positions, at::ScalarType feature_type) {
  check_backward(grad_losses_any_strides, pooled_any_strides, logit_gradients_any_strides, weights, positions,
                 feature_type);
  const Tensor pooled = pooled_any_strides.contiguous(), logit_gradients = logit_gradients_any_strides.contiguous();
  const Tensor grad_losses = grad_losses_any_strides.to(pooled.scalar_type()).contiguous();
  const int64_t depths = logit_gradients.size(0), batch = logit_gradients.size(1), classes = logit_gradients.size(2);

  std::vector<Tensor> kept, pooled_gradients, weight_gradients;
  std::vector<Block> blocks;
  int64_t column = 0;
  for (int64_t depth = 0; depth < depths; ++depth) {
    const int64_t channels = weights[depth].size(1);
    const Tensor& weight = kept.emplace_back(weights[depth].to(pooled.scalar_type()).contiguous());
    pooled_gradients.push_back(at::empty({batch, channels, 1, 1}, pooled.options().dtype(feature_type)));
    weight_gradients.push_back(at::empty({classes, channels}, pooled.options()));
    const BackwardHead head{depth, channels, positions[depth], column, weight.const_data_ptr(),
                            pooled_gradients.back().data_ptr(), weight_gradients.back().data_ptr()};
    int64_t first = 0;
    do {  // once even where there is no channel: the bias has a gradient
      blocks.push_back({head, first, std::min(first + channels_per_block, channels)});
      first += channels_per_block;
    } while (first < channels);
    column += channels;
  }

  const Tensor bias_gradients = at::empty({depths, classes}, pooled.options());
  const Backward parameters{batch, classes, column, grad_losses.const_data_ptr(), pooled.const_data_ptr(),
                            logit_gradients.const_data_ptr(), bias_gradients.data_ptr()};
  const auto kernel = functions_for(feature_type).backward;
  const int64_t grain = multiply_adds_worth_a_thread / (2 * batch * classes * channels_per_block + 1) + 1;
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      kernel(parameters, blocks[block].head, blocks[block].first, blocks[block].last);
    }
  });
  for (int64_t depth = 0; depth < depths; ++depth) {
    weight_gradients[depth] = weight_gradients[depth].to(weights[depth].scalar_type());
  }
  return {std::move(pooled_gradients), std::move(weight_gradients), bias_gradients};
}

}  // namespace
}  // namespace odn_fast::exit_heads

TORCH_LIBRARY_IMPL(odn_fast, CPU, m) {
  m.impl("exit_heads", &odn_fast::exit_heads::forward);
  m.impl("exit_heads_backward", &odn_fast::exit_heads::backward);
}
