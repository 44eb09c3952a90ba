// separable_conv for CUDA devices: ops of their own, which odn_fast/ops chooses for what they can take.
//
// Built where there is nvcc and a CUDA build of torch. torch.ops can be called without the chooser, so everything the
// kernels rely on to stay inside memory is checked here.
#include "separable_conv_cuda.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace odn_fast::separable_conv_cuda {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t most_elements = std::numeric_limits<int>::max();

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

bool is_parameter(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }

void check(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef expected, const Tensor& x, bool type_fits,
           const char* types) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected && tensor.device() == x.device() && type_fits, op, ": ", name, " has shape ",
                    tensor.sizes(), " and dtype ", tensor.dtype(), " on ", tensor.device(), ", expected ", expected, " of ",
                    types, " on ", x.device());
}

void check_map(const char* op, const char* name, const Tensor& map, at::IntArrayRef expected, const Tensor& x) {
  check(op, name, map, expected, x, map.scalar_type() == at::kBFloat16, "bfloat16");
  TORCH_CHECK_VALUE(map.numel() <= most_elements, op, ": ", name, " has ", map.numel(), " elements, expected at most ",
                    most_elements);
}

void check_parameter(const char* op, const char* name, const Tensor& parameter, at::IntArrayRef expected, const Tensor& x) {
  check(op, name, parameter, expected, x, is_parameter(parameter.scalar_type()), "float32 or bfloat16");
}

Tensor aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 ? tensor : tensor.clone();
}

// A map as channels_last and aligned: itself, or a copy.
Tensor dense(const Tensor& map) { return aligned(map.contiguous(at::MemoryFormat::ChannelsLast)); }

optional<Tensor> dense(const optional<Tensor>& map) { return map ? optional(dense(*map)) : std::nullopt; }

optional<Tensor> contiguous(const optional<Tensor>& vector) { return vector ? optional(vector->contiguous()) : std::nullopt; }

const void* data(const optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

Parameter parameter(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.scalar_type() == at::kBFloat16}; }

Parameter parameter(const optional<Tensor>& tensor) { return tensor ? parameter(*tensor) : Parameter{nullptr, false}; }

// The arguments of a convolution, as the kernels take them, and the memory they point to.
struct Prepared {
  Tensor x, dw, pw;
  std::vector<int64_t> shape;  // of the output

  Prepared(const char* op, const Tensor& any_x, const Tensor& any_dw, const Tensor& any_pw, int64_t stride) {
    TORCH_CHECK_VALUE(any_x.is_cuda() && any_x.dim() == 4 && any_x.size(1) > 0 && any_x.size(2) > 0 && any_x.size(3) > 0, op,
                      ": x has shape ", any_x.sizes(), " on ", any_x.device(),
                      ", expected (N, C, H, W) with C, H and W at least 1 on a CUDA device");
    check_map(op, "x", any_x, any_x.sizes(), any_x);
    TORCH_CHECK_VALUE(stride == 1 || stride == 2, op, ": stride is ", stride, ", expected 1 or 2");
    const int64_t channels = any_x.size(1);
    check_parameter(op, "dw", any_dw, {channels, 1, 3, 3}, any_x);
    TORCH_CHECK_VALUE(any_pw.dim() == 4 && any_pw.size(0) > 0, op, ": pw has shape ", any_pw.sizes(), ", expected (C_out, ",
                      channels, ", 1, 1) with C_out >= 1");
    check_parameter(op, "pw", any_pw, {any_pw.size(0), channels, 1, 1}, any_x);
    shape = {any_x.size(0), any_pw.size(0), (any_x.size(2) - 1) / stride + 1, (any_x.size(3) - 1) / stride + 1};
    TORCH_CHECK_VALUE(c10::multiply_integers(shape) <= most_elements, op, ": the output has shape ", shape,
                      ", expected at most ", most_elements, " elements");
    const char* reason = why_not(channels, shape[1], stride);
    TORCH_CHECK_VALUE(!reason, op, ": x has shape ", any_x.sizes(), " and pw ", any_pw.sizes(), ": ", reason);
    x = dense(any_x);
    // Taps by channels in memory are as good as channels by taps.
    dw = any_dw.stride(2) == 3 * any_dw.stride(3) ? any_dw : any_dw.contiguous();
    pw = aligned(any_pw.contiguous());
  }

  Tensor empty_map() const { return at::empty(shape, x.options(), at::MemoryFormat::ChannelsLast); }

  Convolution convolution(int64_t stride) const {
    Convolution c{};
    c.batch = x.size(0), c.in_channels = x.size(1), c.out_channels = shape[1];
    c.height = x.size(2), c.width = x.size(3), c.out_height = shape[2], c.out_width = shape[3];
    c.stride = stride;
    c.x = x.const_data_ptr();
    c.dw = parameter(dw), c.dw_channel_stride = dw.stride(0), c.dw_tap_stride = dw.stride(3);
    c.pw = parameter(pw);
    return c;
  }
};

// Zeroed memory in which the blocks of one launch meet; they leave it fit for the next. Launches in flight together get
// different ones.
unsigned* counter(const Tensor& x) {
  constexpr int64_t count = 1 << 16;
  struct Counters {
    Tensor memory;
    int64_t next;
  };
  static std::mutex mutex;
  static auto& all = *new std::map<int, Counters>;  // outlives the CUDA context
  const std::lock_guard lock(mutex);
  auto found = all.find(x.get_device());
  if (found == all.end()) {
    TORCH_CHECK(c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None,
                "run the network once before its CUDA graph is captured: kernels allocate on first use");
    found = all.emplace(x.get_device(), Counters{at::zeros({count, 2}, x.options().dtype(at::kInt)), 0}).first;
    C10_CUDA_CHECK(cudaDeviceSynchronize());  // other streams use it too
  }
  Counters& counters = found->second;
  counters.next = (counters.next + 1) % count;
  return static_cast<unsigned*>(counters.memory.mutable_data_ptr()) + 2 * counters.next;
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
