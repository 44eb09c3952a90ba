// channel_attention for the CPU: checks, allocation and parallel launch.
//
// The public functions check with better messages; torch.ops can be called without them, so everything the
// kernels rely on to stay inside memory is checked again here.
#include "channel_attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

namespace odn_fast::channel_attention {
namespace {

using at::Tensor;

// Below this, a second thread costs more than it brings.
constexpr int64_t multiply_adds_worth_a_thread = 1 << 17;

bool is_floating(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16 || type == at::kDouble; }

at::ScalarType compute_type(const Tensor& student, const Tensor& teacher) {
  return student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

const Functions& functions_for(at::ScalarType type) {
  return type == at::kDouble ? kernels.chosen().float64 : kernels.chosen().float32;
}

void check_map(const char* op, const char* name, const Tensor& map) {
  TORCH_CHECK_VALUE(map.dim() == 4 && map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0 && map.device().is_cpu() &&
                        is_floating(map.scalar_type()),
                    op, ": ", name, " has shape ", map.sizes(), " and dtype ", map.dtype(), " on ", map.device(),
                    ", expected (N, C, H, W) with C, H, W >= 1 of a floating dtype on the CPU");
}

void check_maps(const char* op, const Tensor& student, const Tensor& teacher) {
  check_map(op, "student", student);
  check_map(op, "teacher", teacher);
  TORCH_CHECK_VALUE(teacher.size(0) == student.size(0) && teacher.size(2) == student.size(2) &&
                        teacher.size(3) == student.size(3),
                    op, ": teacher has shape ", teacher.sizes(), ", expected batch and size of student, ",
                    student.sizes());
}

void check_statistic(const char* name, const Tensor& statistic, at::IntArrayRef expected, at::ScalarType type) {
  TORCH_CHECK_VALUE(statistic.sizes() == expected && statistic.scalar_type() == type && statistic.device().is_cpu(),
                    "channel_attention_loss: statistics.", name, " has shape ", statistic.sizes(), " and dtype ",
                    statistic.dtype(), " on ", statistic.device(), ", expected ", expected, " of ", type, " on the CPU");
}

// A map as the kernels read it: channels_last; bfloat16 stays, unless arithmetic is in double.
Tensor packed(const Tensor& map, at::ScalarType type) {
  const bool stays = map.scalar_type() == at::kBFloat16 && type == at::kFloat;
  return (stays ? map : map.to(type)).contiguous(at::MemoryFormat::ChannelsLast);
}

Map describe(const Tensor& map) { return {map.const_data_ptr(), map.size(1), map.scalar_type() == at::kBFloat16}; }

// Calls work(first image, last image, workspace) from at most as many threads as pay.
template <typename Work>
void for_images(const Functions& functions, int64_t batch, int64_t student_channels, int64_t teacher_channels,
                int64_t positions, const Work& work) {
  const int64_t bytes = functions.workspace_bytes(student_channels, teacher_channels, positions);
  const int64_t multiply_adds = 3 * student_channels * teacher_channels * positions;
  at::parallel_for(0, batch, multiply_adds_worth_a_thread / multiply_adds + 1, [&](int64_t first, int64_t last) {
    const at::DataPtr workspace = at::getCPUAllocator()->allocate(bytes);
    work(first, last, workspace.get());
  });
}

std::tuple<Tensor, Tensor, Tensor> statistics(const Tensor& teacher_any_strides) {
  check_map("channel_attention_statistics", "teacher", teacher_any_strides);
  const at::ScalarType type = compute_type(teacher_any_strides, teacher_any_strides);
  const Tensor teacher = packed(teacher_any_strides, type);
  const int64_t batch = teacher.size(0), channels = teacher.size(1), positions = teacher.size(2) * teacher.size(3);

  const auto options = teacher.options().dtype(type).memory_format(at::MemoryFormat::Contiguous);
  const Tensor mean = at::empty({batch, channels}, options), std = at::empty({batch, channels}, options);
  const Tensor gram = at::empty({batch, channels, channels}, options);
  const TeacherPass parameters{describe(teacher), positions, mean.data_ptr(), std.data_ptr(), gram.data_ptr()};
  const Functions& functions = functions_for(type);
  for_images(functions, batch, channels, channels, positions, [&](int64_t first, int64_t last, void* workspace) {
    functions.statistics(parameters, first, last, workspace);
  });
  return {mean, std, gram};
}

std::tuple<Tensor, Tensor> loss(const Tensor& student_any_strides, const Tensor& teacher_any_strides,
                                const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                                const std::optional<Tensor>& gram, bool standardize, bool with_gradient) {
  check_maps("channel_attention_loss", student_any_strides, teacher_any_strides);
  const at::ScalarType type = compute_type(student_any_strides, teacher_any_strides);
  const Tensor student = packed(student_any_strides, type), teacher = packed(teacher_any_strides, type);
  const int64_t batch = student.size(0), channels = student.size(1), teacher_channels = teacher.size(1);
  const int64_t positions = student.size(2) * student.size(3);

  TORCH_CHECK_VALUE(mean.has_value() == std.has_value() && std.has_value() == gram.has_value(),
                    "channel_attention_loss: expected all of mean, std and gram of the teacher, or none of them");
  Statistics known{};
  Tensor known_mean, known_std, known_gram;  // keep alive what the kernels read
  if (mean) {
    check_statistic("mean", *mean, {batch, teacher_channels}, type);
    check_statistic("std", *std, {batch, teacher_channels}, type);
    check_statistic("gram", *gram, {batch, teacher_channels, teacher_channels}, type);
    known_mean = mean->contiguous(), known_std = std->contiguous(), known_gram = gram->contiguous();
    known = {known_mean.const_data_ptr(), known_std.const_data_ptr(), known_gram.const_data_ptr()};
  }

  Tensor gradient;
  if (with_gradient) {
    gradient = at::empty(student.sizes(), student.options().memory_format(at::MemoryFormat::ChannelsLast));
  }
  std::vector<double> sums(batch);
  const double elements = static_cast<double>(student.numel());
  const Loss parameters{{describe(student), describe(teacher), known, positions, standardize}, 2 / elements,
                        with_gradient ? gradient.data_ptr() : nullptr, sums.data()};
  const Functions& functions = functions_for(type);
  for_images(functions, batch, channels, teacher_channels, positions,
             [&](int64_t first, int64_t last, void* workspace) { functions.loss(parameters, first, last, workspace); });

  const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);  // in the order of the images
  const Tensor value = at::scalar_tensor(sum / elements, student.options().dtype(type));
  const at::ScalarType stored = student_any_strides.scalar_type();
  return {value, with_gradient ? gradient.to(stored) : at::empty({0}, student.options().dtype(stored))};
}

Tensor project(const char* op, const Tensor* grad_any_strides, const Tensor& student_any_strides,
               const Tensor& teacher_any_strides, bool standardize) {
  check_maps(op, student_any_strides, teacher_any_strides);
  const at::ScalarType type = compute_type(student_any_strides, teacher_any_strides);
  const Tensor student = packed(student_any_strides, type), teacher = packed(teacher_any_strides, type);
  Tensor grad;
  if (grad_any_strides) {
    check_map(op, "grad", *grad_any_strides);
    TORCH_CHECK_VALUE(grad_any_strides->sizes() == student.sizes(), op, ": grad has shape ", grad_any_strides->sizes(),
                      ", expected ", student.sizes(), " as student");
    grad = grad_any_strides->to(student.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
  }
  const int64_t positions = student.size(2) * student.size(3);
  const Tensor result = at::empty(student.sizes(), student.options().memory_format(at::MemoryFormat::ChannelsLast));
  const Projection parameters{{describe(student), describe(teacher), {}, positions, standardize},
                              grad_any_strides ? grad.const_data_ptr() : nullptr, result.data_ptr()};
  const Functions& functions = functions_for(type);
  for_images(functions, student.size(0), student.size(1), teacher.size(1), positions,
             [&](int64_t first, int64_t last, void* workspace) {
               functions.project(parameters, first, last, workspace);
             });
  return result.to(student_any_strides.scalar_type());
}

Tensor forward(const Tensor& student, const Tensor& teacher, bool standardize) {
  return project("channel_attention", nullptr, student, teacher, standardize);
}

Tensor backward(const Tensor& grad, const Tensor& student, const Tensor& teacher, bool standardize) {
  return project("channel_attention_backward", &grad, student, teacher, standardize);
}

}  // namespace
}  // namespace odn_fast::channel_attention

TORCH_LIBRARY_IMPL(odn_fast, CPU, m) {
  m.impl("channel_attention", &odn_fast::channel_attention::forward);
  m.impl("channel_attention_backward", &odn_fast::channel_attention::backward);
  m.impl("channel_attention_loss", &odn_fast::channel_attention::loss);
  m.impl("channel_attention_statistics", &odn_fast::channel_attention::statistics);
}
