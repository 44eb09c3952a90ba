// What the CUDA ops of separable convolutions share: checks of tensors, and tensors as the kernels take them.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "separable_conv_cuda.h"

namespace odn_fast::separable_conv_cuda {

using at::Tensor;
using std::optional;

constexpr int64_t most_elements = std::numeric_limits<int>::max();

inline bool is_parameter(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }

inline void check(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef expected, const Tensor& x, bool type_fits,
           const char* types) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected && tensor.device() == x.device() && type_fits, op, ": ", name, " has shape ",
                    tensor.sizes(), " and dtype ", tensor.dtype(), " on ", tensor.device(), ", expected ", expected, " of ",
                    types, " on ", x.device());
}

inline void check_map(const char* op, const char* name, const Tensor& map, at::IntArrayRef expected, const Tensor& x) {
  check(op, name, map, expected, x, map.scalar_type() == at::kBFloat16, "bfloat16");
  TORCH_CHECK_VALUE(map.numel() <= most_elements, op, ": ", name, " has ", map.numel(), " elements, expected at most ",
                    most_elements);
}

inline void check_parameter(const char* op, const char* name, const Tensor& parameter, at::IntArrayRef expected, const Tensor& x) {
  check(op, name, parameter, expected, x, is_parameter(parameter.scalar_type()), "float32 or bfloat16");
}

inline Tensor aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 ? tensor : tensor.clone();
}

// A map as channels_last and aligned: itself, or a copy.
inline Tensor dense(const Tensor& map) { return aligned(map.contiguous(at::MemoryFormat::ChannelsLast)); }

inline optional<Tensor> dense(const optional<Tensor>& map) { return map ? optional(dense(*map)) : std::nullopt; }

inline optional<Tensor> contiguous(const optional<Tensor>& vector) { return vector ? optional(vector->contiguous()) : std::nullopt; }

inline const void* data(const optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

inline Parameter parameter(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.scalar_type() == at::kBFloat16}; }

inline Parameter parameter(const optional<Tensor>& tensor) { return tensor ? parameter(*tensor) : Parameter{nullptr, false}; }

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
inline unsigned* counter(const Tensor& x) {
  constexpr int64_t count = 1 << 16;
  // Launches that are captured keep theirs for ever, in the second half; the others take turns in the first.
  struct Counters {
    Tensor memory;
    int64_t next[2];
  };
  static std::mutex mutex;
  static auto& all = *new std::map<int, Counters>;  // outlives the CUDA context
  const bool captured = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  const std::lock_guard lock(mutex);
  auto found = all.find(x.get_device());
  if (found == all.end()) {
    TORCH_CHECK(!captured, "run the network once before its CUDA graph is captured: kernels allocate on first use");
    found = all.emplace(x.get_device(), Counters{at::zeros({2, count, 2}, x.options().dtype(at::kInt)), {0, 0}}).first;
    C10_CUDA_CHECK(cudaDeviceSynchronize());  // other streams use it too
  }
  Counters& counters = found->second;
  counters.next[captured] = (counters.next[captured] + 1) % count;
  return static_cast<unsigned*>(counters.memory.mutable_data_ptr()) + 2 * (captured * count + counters.next[captured]);
}

}  // namespace odn_fast::separable_conv_cuda
