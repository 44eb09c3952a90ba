// Backward of the separable convolution on CUDA devices of compute capability 8.0 and later, for bfloat16 maps: batch
// norm's sums, the sums of weights' gradients over blocks, and how everything is launched.
#include "separable_conv_cuda_backward.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

#include "separable_conv_cuda_backward_tile.cuh"
#include "separable_conv_cuda_device.h"
#include "separable_conv_cuda_sums.cuh"

namespace odn_fast::separable_conv_cuda {
namespace {

// ---- batch norm

constexpr int norm_threads = 512;

struct NormArguments {
  NormBackward pass;
};

__global__ void __launch_bounds__(norm_threads, 1) norm_backward(const __grid_constant__ NormArguments arguments) {
  constexpr int batch = 4;  // pixels at once
  __shared__ __align__(16) float all[norm_threads * 16];
  const NormBackward& p = arguments.pass;
  let_next_launch_start();
  const int parts = p.channels / 8, active = norm_threads - norm_threads % parts, part = threadIdx.x % parts;
  if (threadIdx.x < active) {
    const uint4* grad = static_cast<const uint4*>(p.grad_y);
    const uint4* z = static_cast<const uint4*>(p.z);
    const uint4* y = static_cast<const uint4*>(p.y);
    const int size = p.pixels * parts, stride = gridDim.x * active;
    float mean[8], scale[8], shift[8], sums[16] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float2 of = p.relu && !y ? affine(p.norm, p.eps, part * 8 + i) : float2{0, 1};
      mean[i] = p.norm.mean[part * 8 + i], scale[i] = of.x, shift[i] = of.y;
    }
    for (int first = blockIdx.x * active + threadIdx.x; first < size; first += batch * stride) {
      uint4 grads[batch], zs[batch], ys[batch];
#pragma unroll
      for (int k = 0; k < batch; k++) {
        const int at = min(first + k * stride, size - parts + part);  // the last one again, past the end
        grads[k] = __ldg(grad + at);
        zs[k] = __ldg(z + at);
        ys[k] = y && p.relu ? __ldg(y + at) : uint4{0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};  // ones
      }
#pragma unroll
      for (int k = 0; k < batch; k++) {
        const int at = first + k * stride;
        if (at >= size) break;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          uint32_t& g = reinterpret_cast<uint32_t*>(&grads[k])[i];
          const uint32_t v = reinterpret_cast<const uint32_t*>(&zs[k])[i], result = reinterpret_cast<const uint32_t*>(&ys[k])[i];
          if (low(result) <= 0 || low(v) * scale[2 * i] + shift[2 * i] <= 0) g &= 0xffff0000u;
          if (high(result) <= 0 || high(v) * scale[2 * i + 1] + shift[2 * i + 1] <= 0) g &= 0xffffu;
          sums[2 * i] += low(g);
          sums[2 * i + 1] += high(g);
          sums[8 + 2 * i] += low(g) * (low(v) - mean[2 * i]);
          sums[8 + 2 * i + 1] += high(g) * (high(v) - mean[2 * i + 1]);
        }
        if (p.masked) static_cast<uint4*>(p.masked)[at] = grads[k];
      }
    }
    float* row = all + threadIdx.x / parts * (2 * p.channels) + part * 8;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      *reinterpret_cast<float4*>(row + i) = {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
      *reinterpret_cast<float4*>(row + p.channels + i) = {sums[8 + i], sums[9 + i], sums[10 + i], sums[11 + i]};
    }
  }
  sum_rows<norm_threads>(all, active / parts, 2 * p.channels);
  if (threadIdx.x < 2 * p.channels) p.partials[blockIdx.x * 2 * p.channels + threadIdx.x] = all[threadIdx.x];
  finish_norm<norm_threads>(p.partials, gridDim.x, p.channels, p.pixels, p.norm, p.eps, p.gradients, p.counter, gridDim.x, all);
}

// ---- weights

constexpr int block_elements = 32;  // of a gradient, of which each is summed by 32 threads

struct WeightArguments {
  WeightSums sums;
};

__global__ void __launch_bounds__(threads) sum_weights(const __grid_constant__ WeightArguments arguments) {
  __shared__ __align__(16) float all[threads * 4];
  wait_for_launch_before();
  int block = blockIdx.x, index = 0;
  for (; index + 1 < arguments.sums.count; index++) {
    const int blocks = (arguments.sums.weights[index].size + block_elements - 1) / block_elements;
    if (block < blocks) break;
    block -= blocks;
  }
  const WeightSums::Weight& weight = arguments.sums.weights[index];
  const int first = block * block_elements, count = min(block_elements, weight.size - first);
  sum_partials<threads>(weight.partials + first, weight.rows, weight.size, count / 4, all);
  if (threadIdx.x >= count) return;
  const int element = first + threadIdx.x, channels = weight.size / weight.taps;
  store(weight.gradient, weight.taps == 1 ? element : element % channels * weight.taps + element / channels, all[threadIdx.x]);
}

// ---- launching

constexpr int backward_beside = 2048;  // static shared memory, and what the system takes of every block

int chunk_of(int in_channels) { return in_channels % 64 == 0 ? 64 : in_channels % 32 == 0 ? 32 : 16; }

// The tile of so many images, and rows and columns of units.
BackwardTiling backward_tiling(const Convolution& c, int images, int rows, int columns) {
  const int unit_rows = divide_up(c.height, 2), unit_columns = divide_up(c.width, 2), outputs = c.stride == 1 ? 4 : 1;
  BackwardTiling t{};
  t.images = images, t.unit_rows = rows, t.unit_columns = columns;
  t.units = divide_up(images * rows * columns, 16 / outputs) * (16 / outputs);
  t.x_height = 2 * rows + (c.stride == 1 ? 2 : 1), t.x_width = 2 * columns + (c.stride == 1 ? 2 : 1);
  t.z_height = c.stride == 1 ? 2 * rows + 2 : rows + 1, t.z_width = c.stride == 1 ? 2 * columns + 2 : columns + 1;
  t.x_pixels = images * t.x_height * t.x_width;
  t.z_pixels = (images * t.z_height * t.z_width / 16 + 1) * 16;
  t.tiles_y = divide_up(unit_rows, rows), t.tiles_x = divide_up(unit_columns, columns);
  t.tiles = divide_up(c.batch, images) * t.tiles_y * t.tiles_x;
  t.chunk = chunk_of(c.in_channels);
  t.by_x_width = inverse(t.x_width), t.by_x_height = inverse(t.x_height);
  t.by_z_width = inverse(t.z_width), t.by_z_height = inverse(t.z_height);
  t.by_unit_columns = inverse(columns), t.by_unit_rows = inverse(rows);
  const int x_bytes = t.chunk * 2 + padding_bytes, z_bytes = c.out_channels * 2 + padding_bytes;
  const int maps = t.z_pixels * z_bytes + (t.x_pixels + std::max(t.z_pixels, t.units * outputs)) * x_bytes;
  const int weights = c.out_channels * x_bytes + (12 * t.chunk + 5 * c.out_channels) * 4;
  const int tile = maps + weights + t.units * (static_cast<int>(sizeof(Unit)) + outputs * 4);
  const int splits = warps / (c.out_channels / 16);
  t.shared_bytes = std::max(tile, (splits * c.out_channels * t.chunk + warps * 11 * step_channels) * 4);
  return t;
}

// The tile with which all blocks are done first, by a rough model in pixels: some of latency, some of leaving partial
// sums, the rest of work that the blocks of a processor share. One alone leaves it idle at times.
BackwardTiling choose_backward_tiling(const Convolution& c, const Device& device) {
  const int unit_rows = divide_up(c.height, 2), unit_columns = divide_up(c.width, 2), chunk = chunk_of(c.in_channels);
  const int latency = 16384 / (chunk + c.out_channels), leaving = 4 * chunk * c.out_channels / (chunk + c.out_channels);
  BackwardTiling best{};
  double lowest = 0;
  for (int units : {4, 8, 16, 32, 64, 96, 128, 192, 256}) {
    for (int columns = std::min(units, unit_columns); columns >= 1; columns--) {  // wide ones first, of equals
      const int rows = std::min(units / columns, unit_rows);
      const bool whole = rows == unit_rows && columns == unit_columns;
      const BackwardTiling t = backward_tiling(c, whole ? std::min(c.batch, units / (rows * columns)) : 1, rows, columns);
      const int blocks = std::min(blocks_per_processor, device.shared_bytes / (t.shared_bytes + backward_beside));
      if (blocks == 0) continue;
      const int all = t.tiles * (c.in_channels / chunk), rounds = divide_up(all, device.processors * blocks);
      const double together = std::max(1.6, static_cast<double>(std::min(blocks, divide_up(all, device.processors))));
      const double cost = rounds * (latency + together * (t.units * 4 + t.x_pixels + 2 * t.z_pixels) / 4.0) + together * leaving;
      if (best.tiles == 0 || cost < lowest) lowest = cost, best = t;
    }
  }
  return best;
}

// follows: the launch before it on the stream is of the same pass, and the kernel waits for that one itself.
template <typename KernelArguments>
cudaError_t launch_blocks(void (*kernel)(KernelArguments), const KernelArguments& arguments, int blocks, int block_threads,
                          int shared_bytes, bool follows, cudaStream_t stream) {
  int index = 0;
  Device device{};
  if (const cudaError_t error = current_device(index, device)) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = block_threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = follows && device.major >= 9;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

using BackwardKernel = void (*)(BackwardArguments);

template <int STEPS>
BackwardKernel backward_kernel(int stride, bool normalised) {
  if (stride == 1) return normalised ? backward<1, STEPS, true> : backward<1, STEPS, false>;
  return normalised ? backward<2, STEPS, true> : backward<2, STEPS, false>;
}

BackwardKernel backward_kernel(const Convolution& c, bool normalised) {
  switch (chunk_of(c.in_channels)) {
    case 64: return backward_kernel<4>(c.stride, normalised);
    case 32: return backward_kernel<2>(c.stride, normalised);
    default: return backward_kernel<1>(c.stride, normalised);
  }
}

struct BackwardPlan {
  BackwardTiling tiling;
  int rows;  // blocks of one chunk
};

// Remembered, because the questions take longer than the launch. Also lets the kernel have its shared memory.
cudaError_t backward_plan(const Convolution& c, BackwardPlan& result) {
  using Key = std::tuple<int, int, int, int, int, int, int>;
  static std::mutex mutex;
  static std::map<Key, BackwardPlan> known;
  int index = 0;
  Device device{};
  if (const cudaError_t error = current_device(index, device)) return error;
  const std::lock_guard lock(mutex);
  const Key key{index, c.batch, c.in_channels, c.out_channels, c.height, c.width, c.stride};
  if (const auto found = known.find(key); found != known.end()) {
    result = found->second;
    return cudaSuccess;
  }
  result.tiling = choose_backward_tiling(c, device);
  if (result.tiling.tiles == 0) return cudaErrorInvalidConfiguration;
  const int most = device.shared_bytes - backward_beside;  // for all plans, not this one alone
  int blocks = 0;
  for (const bool normalised : {false, true}) {
    const void* kernel = reinterpret_cast<const void*>(backward_kernel(c, normalised));
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return error;
    const int bytes = result.tiling.shared_bytes;  // both kernels have as many registers at most
    if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes)) return error;
  }
  if (blocks == 0) return cudaErrorInvalidConfiguration;
  const int chunks = c.in_channels / result.tiling.chunk;
  const int most_rows = std::max(1, std::min(blocks, blocks_per_processor) * device.processors / chunks);
  result.rows = divide_up(result.tiling.tiles, divide_up(result.tiling.tiles, most_rows));
  known[key] = result;
  return cudaSuccess;
}

int norm_blocks(int pixels, int channels, int processors) {
  const int parts = channels / 8, active = norm_threads - norm_threads % parts;
  return std::min<int64_t>((static_cast<int64_t>(pixels) * parts + active - 1) / active, processors);
}

}  // namespace

const char* why_not_backward(int in_channels, int out_channels, int stride) {
  if (in_channels % step_channels || out_channels % 16 || in_channels > most_channels || out_channels > 128)
    return "channels are not multiples of 16 up to 256, and 128 of the output";
  int index = 0;
  Device device{};
  if (current_device(index, device) != cudaSuccess) return "the CUDA device does not answer";
  if (device.major < 8) return "the compute capability of the device is below 8.0";
  const Convolution c{1, in_channels, out_channels, 64, 64, 64 / stride, 64 / stride, stride};
  if (choose_backward_tiling(c, device).tiles == 0) return "a tile does not fit into shared memory";
  return nullptr;
}

size_t norm_partial_floats(int channels) {
  int index = 0;
  Device device{};
  if (current_device(index, device) != cudaSuccess) return 0;
  return static_cast<size_t>(device.processors) * 2 * channels;
}

int partial_rows(const Convolution& c) {
  BackwardPlan plan{};
  return backward_plan(c, plan) == cudaSuccess ? plan.rows : 0;
}

cudaError_t launch(const NormBackward& p, cudaStream_t stream) {
  int index = 0;
  Device device{};
  if (const cudaError_t error = current_device(index, device)) return error;
  return launch_blocks(norm_backward, NormArguments{p}, norm_blocks(p.pixels, p.channels, device.processors), norm_threads, 0,
                       false, stream);
}

cudaError_t launch(const ConvolutionBackward& p, cudaStream_t stream) {
  BackwardPlan plan{};
  if (const cudaError_t error = backward_plan(p.convolution, plan)) return error;
  const int blocks = plan.rows * (p.convolution.in_channels / plan.tiling.chunk);
  const BackwardArguments arguments{p, plan.tiling};
  return launch_blocks(backward_kernel(p.convolution, p.in_norm.mean != nullptr), arguments, blocks, threads,
                       plan.tiling.shared_bytes, true, stream);
}

cudaError_t launch(const WeightSums& p, cudaStream_t stream) {
  int blocks = 0;
  for (int i = 0; i < p.count; i++) blocks += divide_up(p.weights[i].size, block_elements);
  return launch_blocks(sum_weights, WeightArguments{p}, blocks, threads, 0, true, stream);
}

}  // namespace odn_fast::separable_conv_cuda
