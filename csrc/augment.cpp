// augment for the CPU: checks, allocation and parallel launch.
//
// The public function checks with better messages; torch.ops can be called without it, so everything the kernels rely on
// to stay inside memory is checked again here.
#include "augment.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>

namespace odn_fast::augment {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t values_worth_a_thread = 1 << 17;  // below these, a second thread costs more than it brings
constexpr int64_t most_ahead = 1 << 14;  // bytes
constexpr int64_t most_padding = 1 << 20;

const Functions& functions_for(at::ScalarType dtype) {
  const Kernels& table = kernels.chosen();
  switch (dtype) {
    case at::kBFloat16: return table.bfloat16;
    case at::kDouble: return table.float64;
    default: return table.float32;
  }
}

void check_vector(const char* name, const Tensor& vector, int64_t expected, bool floating) {
  const at::ScalarType type = vector.scalar_type();
  const bool fits = floating ? type == at::kFloat || type == at::kDouble : type == at::kLong;
  TORCH_CHECK_VALUE(vector.sizes() == at::IntArrayRef{expected} && vector.device().is_cpu() && fits, "augment: ", name,
                    " has shape ", vector.sizes(), " and dtype ", vector.dtype(), " on ", vector.device(), ", expected (",
                    expected, ",) ", floating ? "float32 or float64" : "int64", " on the CPU");
}

void check(const Tensor& images, const Tensor& index, const Tensor& scale, const Tensor& shift, const optional<Tensor>& key,
           int64_t padding, bool flip, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) > 0 && images.size(2) > 0 && images.size(3) > 0 &&
                        images.scalar_type() == at::kByte && images.device().is_cpu(),
                    "augment: images has shape ", images.sizes(), " and dtype ", images.dtype(), " on ", images.device(),
                    ", expected (M, C, H, W) uint8 on the CPU with C, H and W at least 1");
  TORCH_CHECK_VALUE(index.dim() == 1, "augment: index has shape ", index.sizes(), ", expected (N,)");
  check_vector("index", index, index.size(0), false);
  check_vector("scale", scale, images.size(1), true);
  check_vector("shift", shift, images.size(1), true);
  if (key) check_vector("key", *key, 2, false);
  TORCH_CHECK_VALUE(key || (padding == 0 && !flip),
                    "augment: key is None, expected (2,) int64, seed and epoch, where padding or flip are asked for");
  TORCH_CHECK_VALUE(0 <= padding && padding <= most_padding, "augment: padding is ", padding, ", expected 0 to ", most_padding);
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble, "augment: dtype is ", dtype,
                    ", expected float32, bfloat16 or float64");
}

template <typename Real>
Tensor repeated_as(const Tensor& vector, int64_t times) {
  const Tensor once = vector.to(c10::CppTypeToScalarType<Real>::value).contiguous();
  Tensor result = at::empty({times * once.size(0)}, once.options());
  Real* to = result.mutable_data_ptr<Real>();
  for (int64_t i = 0; i < times; ++i) to = std::copy_n(once.const_data_ptr<Real>(), once.size(0), to);
  return result;
}

Tensor augment(const Tensor& images, const Tensor& index_any_strides, const Tensor& scale, const Tensor& shift,
               const optional<Tensor>& key_any_strides, int64_t padding, bool flip, at::ScalarType dtype) {
  check(images, index_any_strides, scale, shift, key_any_strides, padding, flip, dtype);
  const int64_t count = index_any_strides.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  const Tensor index = index_any_strides.contiguous(), key = key_any_strides ? key_any_strides->contiguous() : Tensor();
  const int64_t* places = index.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < count; ++n) {
    TORCH_CHECK_VALUE(0 <= places[n] && places[n] < images.size(0), "augment: index[", n, "] is ", places[n],
                      ", expected an image in [0, ", images.size(0), ")");
  }

  const Functions& functions = functions_for(dtype);
  const auto repeated = dtype == at::kDouble ? &repeated_as<double> : &repeated_as<float>;
  const Tensor scales = repeated(scale, functions.lanes), shifts = repeated(shift, functions.lanes);
  const Tensor y = at::empty({count, channels, height, width},
                             images.options().dtype(dtype).memory_format(at::MemoryFormat::ChannelsLast));
  // An image among others that are not wanted comes from memory. Of one whose pixels are far apart, no piece is asked for.
  const int64_t furthest = (channels - 1) * images.stride(1) + (height - 1) * images.stride(2) + (width - 1) * images.stride(3);
  const int64_t ahead = furthest < channels * height * width ? std::min(furthest + 1, most_ahead) : 0;
  const Batch batch{images.const_data_ptr<uint8_t>(), images.stride(0), images.stride(1), images.stride(2), images.stride(3),
                    channels, height, width, ahead, places, padding || flip ? key.const_data_ptr<int64_t>() : nullptr, padding, flip,
                    scales.const_data_ptr(), shifts.const_data_ptr(), y.mutable_data_ptr()};
  at::parallel_for(0, count, values_worth_a_thread / (channels * height * width) + 1, [&](int64_t first, int64_t last) {
    const auto workspace = std::make_unique_for_overwrite<char[]>(functions.workspace(batch));
    functions.run(batch, first, last, workspace.get());
  });
  return y;
}

}  // namespace
}  // namespace odn_fast::augment

TORCH_LIBRARY_IMPL(odn_fast, CPU, m) { m.impl("augment", &odn_fast::augment::augment); }
