#include "batch_norm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

namespace odn_fast::batch_norm {
namespace {

constexpr int64_t multiply_adds_worth_a_thread = 1 << 18;

const batch_norm_act::Functions& functions_for(const Tensor& x) { return by_storage(batch_norm_act::kernels.chosen(), x); }

void write(const Values& values, at::ScalarType type, void* to) {
  if (type == at::kDouble) {
    std::copy(values.begin(), values.end(), static_cast<double*>(to));
  } else {
    std::copy(values.begin(), values.end(), static_cast<float*>(to));
  }
}

}  // namespace

void check_tensor(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef expected,
                  std::optional<at::ScalarType> dtype) {
  const at::ScalarType type = tensor.scalar_type();
  const bool floating = type == at::kFloat || type == at::kBFloat16 || type == at::kDouble;
  TORCH_CHECK_VALUE(tensor.sizes() == expected && tensor.device().is_cpu() && floating && (!dtype || type == *dtype), op,
                    ": ", name, " has shape ", tensor.sizes(), " and dtype ", tensor.dtype(), " on ", tensor.device(),
                    ", expected ", expected, " of ", dtype ? c10::toString(*dtype) : "a floating dtype", " on the CPU");
}

at::ScalarType compute_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor dense(const Tensor& map) { return map.contiguous(at::MemoryFormat::ChannelsLast); }

Tensor dense_as(const Tensor& map, const Tensor& x) { return dense(map.to(x.scalar_type())); }

Values values_of(const Tensor& vector) {
  Values values(vector.size(0));
  with_elements(vector, [&, stride = vector.stride(0)](const auto* from) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(from[i * stride]);
  });
  return values;
}

Tensor empty_map(const Tensor& x, at::IntArrayRef shape) {
  return at::empty(shape, x.options().memory_format(at::MemoryFormat::ChannelsLast));
}

Tensor vector_of(const Values& values, at::ScalarType type) {
  const Tensor result = at::empty({static_cast<int64_t>(values.size())}, type);
  write(values, type, result.mutable_data_ptr());
  return result;
}

Tensor like(const Values& values, const Tensor& parameter) {
  const at::ScalarType type = parameter.scalar_type() == at::kFloat ? at::kFloat : at::kDouble;
  return vector_of(values, type).to(parameter.scalar_type()).view(parameter.sizes());
}

int64_t padded(const Tensor& x, int64_t channels) {
  const int64_t lanes = functions_for(x).lanes;
  return (channels + lanes - 1) / lanes * lanes;
}

Vectors::Vectors(const Tensor& x, int64_t channels, std::initializer_list<const Values*> all)
    : stride_(padded(x, channels)), memory_(at::zeros({static_cast<int64_t>(all.size()), stride_}, compute_type(x))) {
  char* row = static_cast<char*>(memory_.mutable_data_ptr());
  for (const Values* values : all) {
    write(*values, memory_.scalar_type(), row);
    row += stride_ * memory_.element_size();
  }
}

void run(const Chunks& chunks, int64_t multiply_adds, Order order, const std::function<void(int64_t)>& work) {
  if (chunks.units == 0) return;
  const int64_t grain = chunks.count * multiply_adds_worth_a_thread / (multiply_adds + 1) + 1;
  at::parallel_for(0, chunks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(order == Order::forward ? i : begin + end - 1 - i);
  });
}

Values added(const std::vector<double>& sums, int64_t size) {
  Values total(size, 0.0);
  for (size_t of_chunk = 0; of_chunk < sums.size(); of_chunk += size) {
    for (int64_t i = 0; i < size; ++i) total[i] += sums[of_chunk + i];
  }
  return total;
}

Affine affine(const Tensor& z_mean, const Tensor& var, const Tensor& bn_weight, const Tensor& bn_bias, double eps) {
  const Values means = values_of(z_mean), variances = values_of(var);
  Affine result{values_of(bn_weight), values_of(bn_bias)};
  for (size_t c = 0; c < means.size(); ++c) {
    // The shift belongs to the scale as the kernels read it: a large mean would show its rounding.
    const double scale = result.scale[c] / std::sqrt(variances[c] + eps);
    result.scale[c] = z_mean.scalar_type() == at::kDouble ? scale : static_cast<float>(scale);
    result.shift[c] -= result.scale[c] * means[c];
  }
  return result;
}

Tensor finish(const Tensor& z, const Affine& affine, const Tensor* residual, const Affine* residual_affine, bool relu) {
  const int64_t channels = z.size(1), pixels = z.numel() / channels;
  const Values none;
  const Vectors vectors(z, channels, {&affine.scale, &affine.shift, residual_affine ? &residual_affine->scale : &none,
                                      residual_affine ? &residual_affine->shift : &none});
  Tensor y = empty_map(z, z.sizes());
  batch_norm_act::Finish finish{};
  finish.channels = channels;
  finish.z = z.const_data_ptr();
  finish.scale = vectors[0];
  finish.shift = vectors[1];
  finish.residual = residual ? residual->const_data_ptr() : nullptr;
  finish.residual_scale = residual_affine ? vectors[2] : nullptr;
  finish.residual_shift = residual_affine ? vectors[3] : nullptr;
  finish.relu = relu;
  finish.y = y.mutable_data_ptr();
  const Chunks chunks{pixels, most_chunks};
  run(chunks, pixels * channels, Order::backward, [&](int64_t chunk) {
    functions_for(z).finish(finish, chunks.first(chunk), chunks.first(chunk + 1));
  });
  return y;
}

GradientSums reduce(const OutputGradient& gradient, const Tensor& z, const Values& z_mean, const Affine& mask,
                    const Tensor* other, const Values& other_mean, Tensor* masked) {
  const int64_t channels = z.size(1), pixels = z.numel() / channels, stride = padded(z, channels);
  const int64_t rows = other ? 3 : 2;
  const Vectors vectors(z, channels, {&z_mean, &other_mean, &mask.scale, &mask.shift});
  batch_norm_act::Reduce reduce{};
  reduce.channels = channels;
  reduce.gradient.grad = gradient.grad.const_data_ptr();
  reduce.gradient.z = z.const_data_ptr();
  reduce.gradient.y = gradient.y ? gradient.y->const_data_ptr() : nullptr;
  reduce.gradient.relu = gradient.relu;
  reduce.gradient.mask_scale = vectors[2];
  reduce.gradient.mask_shift = vectors[3];
  reduce.mean = vectors[0];
  reduce.other = other ? other->const_data_ptr() : nullptr;
  reduce.other_mean = vectors[1];
  reduce.masked = masked ? masked->mutable_data_ptr() : nullptr;
  const Chunks chunks{pixels, most_chunks};
  std::vector<double> sums(most_chunks * rows * stride, 0.0);
  run(chunks, 2 * pixels * channels, Order::forward, [&](int64_t chunk) {
    functions_for(z).reduce(reduce, chunks.first(chunk), chunks.first(chunk + 1), sums.data() + chunk * rows * stride);
  });
  const Values total = added(sums, rows * stride);
  const auto row = [&](int64_t index) { return Values(&total[index * stride], &total[index * stride] + channels); };
  return {row(0), row(1), other ? row(2) : Values()};
}

NormGradient norm_gradient(const Values& grad, const Values& product, const Tensor& z_mean, const Tensor& var,
                           const Tensor& bn_weight, double eps, int64_t values_per_channel) {
  const size_t channels = grad.size();
  const Values means = values_of(z_mean), variances = values_of(var);
  NormGradient result{Values(channels), grad, values_of(bn_weight), Values(channels), Values(channels)};
  for (size_t c = 0; c < channels; ++c) {
    const double inverse = 1 / std::sqrt(variances[c] + eps);
    result.weight[c] = product[c] * inverse;
    result.scale[c] *= inverse;
    if (values_per_channel == 0) continue;
    result.slope[c] = -result.scale[c] * product[c] * inverse * inverse / values_per_channel;
    result.constant[c] = -result.scale[c] * grad[c] / values_per_channel - result.slope[c] * means[c];
  }
  return result;
}

}  // namespace odn_fast::batch_norm
