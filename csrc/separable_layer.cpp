#include "separable_layer.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

namespace odn_fast::separable_conv {
namespace {

constexpr int64_t most_partial_sums = 1 << 22;  // elements of all chunks' weight gradients together

const Functions& functions_for(const Tensor& x) { return by_storage(kernels.chosen(), x); }

// Memory that a thread keeps from call to call: what glibc is handed back and gives again costs a fault per page.
class Scratch {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(::operator new(bytes, alignment));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, alignment); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

void* workspace(int64_t bytes) {
  thread_local Scratch scratch;
  return scratch.at_least(bytes);
}

Tensor packed_depthwise(const Tensor& x, const Tensor& dw) {
  const Functions& functions = functions_for(x);
  const Tensor weight = dw.to(compute_type(x)).contiguous();
  Tensor packed = at::empty({padded(x, dw.size(0)) * 9}, weight.options());
  functions.pack_depthwise(dw.size(0), weight.const_data_ptr(), packed.mutable_data_ptr());
  return packed;
}

Tensor packed_pointwise(const Tensor& x, const Tensor& pw, bool transposed) {
  const Functions& functions = functions_for(x);
  const Tensor weight = pw.to(compute_type(x)).contiguous();
  const int64_t outputs = pw.size(0), inputs = pw.size(1);
  const int64_t rows = transposed ? outputs : inputs, columns = transposed ? inputs : outputs;
  Tensor packed = at::empty({functions.pointwise_bytes(rows, columns)}, at::kByte);
  functions.pack_pointwise(rows, columns, weight.const_data_ptr(), transposed ? inputs : 1, transposed ? 1 : inputs,
                           packed.mutable_data_ptr());
  return packed;
}

Layer describe(const Tensor& x, const Weights& weights, const void* packed_dw, const Vectors* transform) {
  Layer layer{};
  layer.batch = x.size(0);
  layer.in_channels = x.size(1);
  layer.out_channels = weights.pw.size(0);
  layer.height = x.size(2);
  layer.width = x.size(3);
  layer.out_height = output_size(x.size(2), weights.stride);
  layer.out_width = output_size(x.size(3), weights.stride);
  layer.stride = weights.dw ? weights.stride : 1;
  layer.window = weights.dw ? 0 : weights.stride;
  const int64_t wanted = layer.batch < most_chunks ? (most_chunks + layer.batch - 1) / std::max<int64_t>(layer.batch, 1) : 1;
  layer.rows_per_range = std::max<int64_t>((layer.out_height + wanted - 1) / wanted, std::min<int64_t>(layer.out_height, 4));
  layer.ranges = (layer.out_height + layer.rows_per_range - 1) / layer.rows_per_range;
  layer.x = x.const_data_ptr();
  layer.in_scale = transform ? (*transform)[0] : nullptr;
  layer.in_shift = transform ? (*transform)[1] : nullptr;
  layer.dw = packed_dw;
  return layer;
}

Chunks chunks_of(const Layer& layer, int64_t most) {
  const int64_t units = layer.batch * layer.ranges;
  return {units, std::max<int64_t>(std::min(units, most), 1)};
}

int64_t multiply_adds(const Layer& layer) {
  return layer.batch * layer.out_height * layer.out_width * layer.in_channels * (layer.out_channels + 9);
}

// What the packed weights and vectors of a layer keep alive while its kernels run.
struct Prepared {
  Prepared(const LayerInput& input, const Weights& weights)
      : dw(weights.dw ? packed_depthwise(input.x, *weights.dw) : Tensor()),
        transform(input.transform ? std::optional<Vectors>(
                                        std::in_place, input.x, input.x.size(1),
                                        std::initializer_list<const Values*>{&input.transform->scale, &input.transform->shift})
                                  : std::nullopt),
        layer(describe(input.x, weights, weights.dw ? dw.const_data_ptr() : nullptr, transform ? &*transform : nullptr)) {}

  Tensor dw;
  std::optional<Vectors> transform;
  Layer layer;
};

void launch_forward(const Functions& functions, const Forward& forward, std::vector<double>* sums, int64_t stride) {
  const Chunks chunks = chunks_of(forward.layer, most_chunks);
  if (sums) sums->assign(chunks.count * stride, 0.0);
  run(chunks, multiply_adds(forward.layer), Order::forward, [&](int64_t chunk) {
    functions.forward(forward, chunks.first(chunk), chunks.first(chunk + 1), workspace(functions.forward_workspace(forward)),
                      sums ? sums->data() + chunk * stride : nullptr);
  });
}

// The mean of the pointwise output over a few pixels: near enough to the mean over all that subtracting it spares the
// digits of the variance and of the stored z.
Values pivot(const LayerInput& input, const Weights& weights, const Layer& layer) {
  constexpr int64_t most_pixels = 4;
  const int64_t channels = layer.in_channels, pixels = layer.batch * layer.out_height * layer.out_width;
  const int64_t samples = std::min(pixels, most_pixels);
  const Values dw = weights.dw ? values_of(weights.dw->reshape(-1)) : Values();
  Values gathered(channels, 0.0), result(layer.out_channels, 0.0);
  with_elements(input.x, [&](const auto* x) {
    for (int64_t sample = 0; sample < samples; ++sample) {
      const int64_t pixel = (2 * sample + 1) * pixels / (2 * samples), column = pixel % layer.out_width;
      const int64_t row = pixel / layer.out_width % layer.out_height, image = pixel / (layer.out_width * layer.out_height);
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t i = row * weights.stride + tap / 3 - 1, j = column * weights.stride + tap % 3 - 1;
        if (i < 0 || i >= layer.height || j < 0 || j >= layer.width || (!weights.dw && tap != 4)) continue;
        const auto* at = x + ((image * layer.height + i) * layer.width + j) * channels;
        for (int64_t c = 0; c < channels; ++c) {
          double value = static_cast<double>(at[c]);
          if (input.transform) value = std::max(input.transform->scale[c] * value + input.transform->shift[c], 0.0);
          gathered[c] += weights.dw ? dw[c * 9 + tap] * value : value;
        }
      }
    }
  });
  for (double& sum : gathered) sum /= samples;
  with_elements(weights.pw.contiguous(), [&](const auto* pw) {
    for (double& mean : result) {
      for (int64_t c = 0; c < channels; ++c) mean += static_cast<double>(*pw++) * gathered[c];
    }
  });
  return result;
}

}  // namespace

int64_t output_size(int64_t size, int64_t stride) { return (size + stride - 1) / stride; }

std::vector<int64_t> check_convolutions(const char* op, const Tensor& x, const Tensor& dw, const Tensor& pw,
                                        int64_t stride) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, op, ": x has shape ", x.sizes(),
                    ", expected (N, C, H, W) with C, H and W at least 1");
  check_tensor(op, "x", x, x.sizes());
  TORCH_CHECK_VALUE(stride == 1 || stride == 2, op, ": stride is ", stride, ", expected 1 or 2");
  check_tensor(op, "dw", dw, {x.size(1), 1, 3, 3});
  TORCH_CHECK_VALUE(pw.dim() == 4 && pw.size(0) > 0, op, ": pw has shape ", pw.sizes(), ", expected (C_out, ", x.size(1),
                    ", 1, 1) with C_out >= 1");
  check_tensor(op, "pw", pw, {pw.size(0), x.size(1), 1, 1});
  return {x.size(0), pw.size(0), output_size(x.size(2), stride), output_size(x.size(3), stride)};
}

Normalised forward_layer(const LayerInput& input, const Weights& weights) {
  const Tensor& x = input.x;
  const Functions& functions = functions_for(x);
  const Prepared prepared(input, weights);
  const Layer& layer = prepared.layer;
  const int64_t channels = layer.out_channels, stride = padded(x, channels);
  const double values = static_cast<double>(layer.batch * layer.out_height * layer.out_width);

  Values shift(channels, 0.0);
  if (layer.batch > 0) shift = pivot(input, weights, layer);
  Values start(channels);
  for (int64_t c = 0; c < channels; ++c) start[c] = -static_cast<float>(shift[c]);
  const Vectors vectors(x, channels, {&start});
  const Tensor pw = packed_pointwise(x, weights.pw, false);
  Normalised result;
  result.z = empty_map(x, {layer.batch, channels, layer.out_height, layer.out_width});

  Forward forward{};
  forward.layer = layer;
  forward.pw = pw.const_data_ptr();
  forward.start = vectors[0];
  forward.z = result.z.mutable_data_ptr();
  std::vector<double> sums;
  launch_forward(functions, forward, &sums, 2 * stride);

  const Values total = added(sums, 2 * stride);
  Values mean(channels), var(channels), z_mean(channels);
  for (int64_t c = 0; c < channels && values > 0; ++c) {
    z_mean[c] = total[c] / values;
    const double variance = total[stride + c] / values - z_mean[c] * z_mean[c];
    var[c] = variance < 0 ? 0 : variance;
    mean[c] = z_mean[c] - start[c];
  }
  const at::ScalarType type = compute_type(x);
  result.mean = vector_of(mean, type);
  result.var = vector_of(var, type);
  result.z_mean = vector_of(z_mean, type);
  return result;
}

Tensor infer_layer(const Tensor& x, const Weights& weights, const std::optional<Tensor>& dw_bias, Activation act_dw,
                   const std::optional<Tensor>& pw_bias, const std::optional<Tensor>& residual, Activation act_pw) {
  const Prepared prepared({x, std::nullopt}, weights);
  const Layer& layer = prepared.layer;
  const Values dw_start = dw_bias ? values_of(*dw_bias) : Values{}, pw_start = pw_bias ? values_of(*pw_bias) : Values{};
  const Vectors in_vectors(x, layer.in_channels, {&dw_start}), out_vectors(x, layer.out_channels, {&pw_start});
  const Tensor pw = packed_pointwise(x, weights.pw, false);
  Tensor y = empty_map(x, {layer.batch, layer.out_channels, layer.out_height, layer.out_width});

  Forward forward{};
  forward.layer = layer;
  forward.dw_bias = dw_bias ? in_vectors[0] : nullptr;
  forward.act_dw = act_dw;
  forward.pw = pw.const_data_ptr();
  forward.start = out_vectors[0];
  forward.residual = residual ? residual->const_data_ptr() : nullptr;
  forward.act_pw = act_pw;
  forward.z = y.mutable_data_ptr();
  launch_forward(functions_for(x), forward, nullptr, 0);
  return y;
}

LayerGradients backward_layer(const LayerInput& input, const Values& x_mean, const Weights& weights,
                              const OutputGradient& gradient, const Affine& mask, const Tensor& z, const NormGradient& norm,
                              bool x_needs_grad, const Skip& skip) {
  const Tensor& x = input.x;
  const Functions& functions = functions_for(x);
  const Prepared prepared(input, weights);
  const Layer& layer = prepared.layer;
  const int64_t outputs = layer.out_channels, inputs = layer.in_channels;
  const Vectors vectors(x, outputs, {&mask.scale, &mask.shift, &norm.scale, &norm.constant, &norm.slope});
  const Vectors means(x, inputs, {&x_mean});
  const Tensor pw = packed_pointwise(x, weights.pw, true);

  LayerGradients result;
  result.x = !x_needs_grad    ? at::empty({0}, x.options())
             : layer.window ? empty_map(x, {layer.batch, inputs, layer.out_height, layer.out_width})
                            : empty_map(x, x.sizes());
  Backward backward{};
  backward.layer = layer;
  backward.gradient = {gradient.grad.const_data_ptr(),
                       z.const_data_ptr(),
                       gradient.y ? gradient.y->const_data_ptr() : nullptr,
                       gradient.relu,
                       vectors[0],
                       vectors[1],
                       vectors[2],
                       vectors[3],
                       vectors[4]};
  backward.pw = pw.const_data_ptr();
  backward.grad_x = x_needs_grad ? result.x.mutable_data_ptr() : nullptr;
  backward.skip_grad = skip.grad ? skip.grad->const_data_ptr() : nullptr;
  backward.skip_y = skip.y ? skip.y->const_data_ptr() : nullptr;
  backward.pooled_grad = skip.pooled ? skip.pooled->const_data_ptr() : nullptr;
  backward.pooled_window = skip.window;
  backward.in_mean = means[0];

  const int64_t dw_size = padded(x, inputs) * 9, pw_size = padded(x, outputs) * padded(x, inputs);
  const Chunks chunks = chunks_of(layer, std::clamp<int64_t>(most_partial_sums / pw_size, 2, most_chunks));
  const Tensor partial = at::empty({chunks.count, dw_size + pw_size}, compute_type(x));
  std::vector<double> sums(chunks.count * 2 * padded(x, inputs), 0.0);
  run(chunks, 3 * multiply_adds(layer), Order::backward, [&](int64_t chunk) {
    const int64_t bytes = (dw_size + pw_size) * partial.element_size();
    char* of_chunk = static_cast<char*>(partial.mutable_data_ptr()) + chunk * bytes;
    std::memset(of_chunk, 0, bytes);
    const BackwardSums to{of_chunk, of_chunk + dw_size * partial.element_size(), sums.data() + chunk * 2 * padded(x, inputs)};
    functions.backward(backward, to, chunks.first(chunk), chunks.first(chunk + 1), workspace(functions.backward_workspace(backward)));
  });

  Values total(dw_size + pw_size);
  functions.add_chunks(chunks.units > 0 ? chunks.count : 0, dw_size + pw_size, partial.const_data_ptr(), total.data());
  const int64_t lanes = functions.lanes;
  if (weights.dw) {
    Values grad(inputs * 9);
    for (int64_t c = 0; c < inputs; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) grad[c * 9 + tap] = total[(c / lanes * 9 + tap) * lanes + c % lanes];
    }
    result.dw = like(grad, *weights.dw);
  }
  Values grad(outputs * inputs);
  for (int64_t output = 0; output < outputs; ++output) {
    for (int64_t c = 0; c < inputs; ++c) grad[output * inputs + c] = total[dw_size + output * padded(x, inputs) + c];
  }
  result.pw = like(grad, weights.pw);
  if (input.transform) {
    const int64_t stride = padded(x, inputs);
    const Values of_inputs = added(sums, 2 * stride);
    result.sums.assign(&of_inputs[0], &of_inputs[0] + inputs);
    result.products.assign(&of_inputs[stride], &of_inputs[stride] + inputs);
  }
  return result;
}

}  // namespace odn_fast::separable_conv
