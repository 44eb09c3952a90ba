// Separable convolution on CUDA devices of compute capability 8.0 and later, for bfloat16 maps: the kernels, which are
// one launch each, and their launching. In training, blocks meet once to turn what they have seen into statistics.
#include "separable_conv_cuda.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

#include "separable_conv_cuda_device.h"
#include "separable_conv_cuda_tile.cuh"

namespace odn_fast::separable_conv_cuda {
namespace {

template <int STRIDE, int NTILES>
__global__ void __launch_bounds__(threads, blocks_per_processor) infer(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Constants<NTILES, false> constants;
  Sums<2 * NTILES> unused;
  convolve<STRIDE, NTILES, false>(p, shared, constants, unused);
}

// ---- statistics and batch norm

__device__ unsigned load_acquire(const unsigned* address) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(v) : "l"(address) : "memory");
  return v;
}

struct TrainingArguments {
  Arguments arguments;
  float* mean;
  float* var;
  float* z_mean;
  float* scale;
  float* shift;
  Parameter bn_weight, bn_bias;
  float eps;
  bool relu;
  const __nv_bfloat16* residual;
  __nv_bfloat16* y;
  float2* partials;  // (blocks, out_channels): mean, sum of squared differences from it
  float* counts;     // (blocks): pixels
  unsigned* counter;  // blocks that have arrived; how often all have
};

// This block's mean and sum of squared differences, in the order of its warps.
template <int NTILES>
__device__ void store_partials(const TrainingArguments& p, unsigned char* shared, const float* pivots,
                               Sums<2 * NTILES>& seen) {
  constexpr int lane_channels = 2 * NTILES, chunk_channels = 8 * NTILES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channels = p.arguments.convolution.out_channels, chunks = channels / chunk_channels;
  float2(*moments)[chunk_channels] = reinterpret_cast<float2(*)[chunk_channels]>(shared);
  float* counts = reinterpret_cast<float*>(moments + warps);
  const float count = __reduce_add_sync(0xffffffffu, lane % 4 == 0 ? seen.count : 0), per_pixel = 1 / count;
  __syncthreads();  // shared memory has been read
#pragma unroll
  for (int i = 0; i < lane_channels; i++) {
    for (int distance = 4; distance < 32; distance *= 2) {
      seen.sum[i] += __shfl_xor_sync(0xffffffffu, seen.sum[i], distance);
      seen.square[i] += __shfl_xor_sync(0xffffffffu, seen.square[i], distance);
    }
    if (lane < 4 && count > 0) {
      const float difference = seen.sum[i] * per_pixel;
      moments[warp][lane * lane_channels + i] = {pivots[i] + difference, seen.square[i] - seen.sum[i] * difference};
    }
  }
  if (lane == 0) counts[warp] = count;
  __syncthreads();

  for (int channel = threadIdx.x; channel < channels; channel += threads) {
    const int chunk = channel / chunk_channels;
    float total = 0;
    float2 all = {0, 0};
    for (int i = chunk; i < warps / chunks * chunks; i += chunks) {
      if (counts[i] == 0) continue;
      const float2 one = moments[i][channel % chunk_channels];
      const float sum = total + counts[i], difference = one.x - all.x;
      all.y += one.y + difference * difference * (total * counts[i] / sum);
      all.x += difference * (counts[i] / sum);
      total = sum;
    }
    p.partials[blockIdx.x * channels + channel] = all;
    if (channel == 0) p.counts[blockIdx.x] = total;
  }
}

// Mean and variance from the partials of all blocks, in their order, whichever block does it.
__device__ void store_statistics(const TrainingArguments& p, unsigned char* shared) {
  const Convolution& c = p.arguments.convolution;
  const int pairs = c.out_channels / 2, parts = threads / pairs;
  const int pair = threadIdx.x % pairs, part = threadIdx.x / pairs, blocks = gridDim.x;
  const float4* partials = reinterpret_cast<const float4*>(p.partials);
  const float4 first = __ldcg(partials + pair);  // differences are from the first block's means
  float sums[6] = {};                            // of two channels: n d, n d d, squares
  if (part < parts) {
    constexpr int batch = 16;  // loads at once
    for (int start = part; start < blocks; start += batch * parts) {
      float4 values[batch];
      float counts[batch];
#pragma unroll
      for (int k = 0; k < batch; k++) {
        const int block = min(start + k * parts, blocks - 1);
        values[k] = __ldcg(partials + block * pairs + pair);
        counts[k] = __ldcg(p.counts + block);
      }
#pragma unroll
      for (int k = 0; k < batch; k++) {
        if (start + k * parts >= blocks) break;
        const float d[2] = {values[k].x - first.x, values[k].z - first.z};
#pragma unroll
        for (int i = 0; i < 2; i++) {
          sums[i] += counts[k] * d[i];
          sums[2 + i] += counts[k] * d[i] * d[i];
        }
        sums[4] += values[k].y;
        sums[5] += values[k].w;
      }
    }
  }
  float(*all)[threads] = reinterpret_cast<float(*)[threads]>(shared);
#pragma unroll
  for (int i = 0; i < 6; i++) all[i][threadIdx.x] = sums[i];
  __syncthreads();
  if (threadIdx.x < pairs) {
    for (int other = 1; other < parts; other++) {
#pragma unroll
      for (int i = 0; i < 6; i++) sums[i] += all[i][other * pairs + pair];
    }
    const float count = static_cast<float>(c.batch) * c.out_height * c.out_width;
    const float start[2] = {first.x, first.z};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float shift = sums[i] / count;
      const float var = (sums[4 + i] + (sums[2 + i] - shift * sums[i])) / count;
      p.mean[2 * pair + i] = p.z_mean[2 * pair + i] = start[i] + shift;
      p.var[2 * pair + i] = relu(var);
      if (!p.scale) continue;
      const int channel = 2 * pair + i;
      with_values(p.bn_weight, [&](const auto* weight) { p.scale[channel] = as_float(weight[channel]) * rsqrtf(relu(var) + p.eps); });
      with_values(p.bn_bias, [&](const auto* bias) { p.shift[channel] = as_float(bias[channel]) - (start[i] + shift) * p.scale[channel]; });
    }
  }
}

// Weight and bias of eight channels of a batch norm.
struct Norm {
  float weight[8], bias[8];

  __device__ Norm(const TrainingArguments& p, int channel) {
    with_values(p.bn_weight, [&](const auto* values) {
#pragma unroll
      for (int i = 0; i < 8; i++) weight[i] = as_float(values[channel + i]);
    });
    with_values(p.bn_bias, [&](const auto* values) {
#pragma unroll
      for (int i = 0; i < 8; i++) bias[i] = as_float(values[channel + i]);
    });
  }
};

// The first channel that a thread normalises; blocks use so many threads that it keeps its channels.
__device__ int first_channel(const Convolution& c) { return threadIdx.x % (c.out_channels / 8) * 8; }

// y, by all blocks.
__device__ void normalise(const TrainingArguments& p, const Norm& norm) {
  constexpr int unroll = 4;
  const Convolution& c = p.arguments.convolution;
  const int parts = c.out_channels / 8, active = threads - threads % parts, channel = first_channel(c);
  if (threadIdx.x >= active) return;
  float mean[8], scale[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    mean[i] = __ldcg(p.mean + channel + i);
    scale[i] = norm.weight[i] * rsqrtf(__ldcg(p.var + channel + i) + p.eps);
  }
  const uint4* z = reinterpret_cast<const uint4*>(p.arguments.output);
  const uint4* residual = reinterpret_cast<const uint4*>(p.residual);
  const int size = c.batch * c.out_height * c.out_width * parts, stride = gridDim.x * active;
  for (int start = blockIdx.x * active + threadIdx.x; start < size; start += unroll * stride) {
    uint4 values[unroll], added[unroll];
#pragma unroll
    for (int i = 0; i < unroll; i++) {
      const int at = min(start + i * stride, size - parts + channel / 8);  // the last one again, past the end
      values[i] = __ldcg(z + at);
      added[i] = residual ? __ldg(residual + at) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < unroll; i++) {
      if (start + i * stride >= size) break;
      uint32_t* pairs = reinterpret_cast<uint32_t*>(&values[i]);
      const uint32_t* added_pairs = reinterpret_cast<const uint32_t*>(&added[i]);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        float v[2] = {(low(pairs[k]) - mean[2 * k]) * scale[2 * k] + norm.bias[2 * k] + low(added_pairs[k]),
                      (high(pairs[k]) - mean[2 * k + 1]) * scale[2 * k + 1] + norm.bias[2 * k + 1] + high(added_pairs[k])};
        if (p.relu) activate(v, Activation::relu);
        pairs[k] = pack(v[0], v[1]);
      }
      reinterpret_cast<uint4*>(p.y)[start + i * stride] = values[i];
    }
  }
}

// Launched cooperatively where there is a y: blocks then wait for the one that computes the statistics.
template <int STRIDE, int NTILES>
__global__ void __launch_bounds__(threads, blocks_per_processor) train(const __grid_constant__ TrainingArguments p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ unsigned round;  // how often all blocks have met
  __shared__ bool last;
  if (threadIdx.x == 0) round = load_acquire(p.counter + 1);
  __shared__ Constants<NTILES, true> constants;
  Sums<2 * NTILES> seen;
  convolve<STRIDE, NTILES, true>(p.arguments, shared, constants, seen);
  store_partials<NTILES>(p, shared, constants.of_lane(), seen);

  __syncthreads();
  if (threadIdx.x == 0) last = increment(p.counter) == gridDim.x - 1;
  const Norm norm(p, first_channel(p.arguments.convolution));  // while waiting
  __syncthreads();
  if (last) {
    store_statistics(p, shared);
    __syncthreads();
    if (threadIdx.x == 0) {
      p.counter[0] = 0;
      increment(p.counter + 1);
    }
  } else if (p.y && threadIdx.x == 0) {
    while (load_acquire(p.counter + 1) == round) {
    }
  }
  if (!p.y) return;
  __syncthreads();
  normalise(p, norm);
}

// ---- launching

constexpr int beside = 3072;  // static shared memory, and what the system takes of every block

// Column tiles of the tensor cores in a chunk of output channels.
int column_tiles(int out_channels) { return out_channels % 32 == 0 ? 4 : 2; }

// The tile of at most so many squares, in `groups` groups, that computes and reads least.
Tiling tiling_of(const Convolution& c, int groups, int squares) {
  const int image_rows = divide_up(c.out_height, 2), image_columns = divide_up(c.out_width, 2);
  Tiling best{};
  int64_t lowest = INT64_MAX;
  for (int columns = 1; columns <= std::min(squares, image_columns); columns++) {
    const int rows = std::min(squares / columns, image_rows);
    const bool whole = rows == image_rows && columns == image_columns;
    Tiling t{};
    t.images = whole ? std::min(c.batch, squares / (rows * columns)) : 1;
    t.tile_height = 2 * rows, t.tile_width = 2 * columns;
    t.region_height = (t.tile_height - 1) * c.stride + 3, t.region_width = (t.tile_width - 1) * c.stride + 3;
    t.tiles_y = divide_up(image_rows, rows), t.tiles_x = divide_up(image_columns, columns);
    t.tiles = divide_up(c.batch, t.images) * t.tiles_y * t.tiles_x;
    t.groups = groups;
    t.by_parts = inverse(c.in_channels / 8), t.by_steps = inverse(c.in_channels / step_channels);
    t.by_region_height = inverse(t.region_height), t.by_rows = inverse(rows), t.by_columns = inverse(columns);
    const int read = t.images * t.region_height * t.region_width;
    const int64_t cost = static_cast<int64_t>(t.tiles) * (2 * group_pixels * groups + read);
    if (cost <= lowest) lowest = cost, best = t;
  }
  return best;
}

Tiling buffered(const Convolution& c, Tiling t, int buffers) {
  const int region_bytes = t.images * t.region_height * t.region_width * (c.in_channels * 2 + padding_bytes);
  const int needed = buffers * region_bytes + c.in_channels * c.out_channels * 2 + t.groups * group_pixels * c.in_channels * 2 +
                     t.groups * 8 * static_cast<int>(sizeof(Square));
  t.buffers = buffers;
  t.shared_bytes = std::max(needed, 6 * threads * static_cast<int>(sizeof(float)));  // for the statistics
  return t;
}

// Large tiles read less of x twice; small ones keep all processors busy, with two blocks each where they fit. Eight squares
// of as many small images read more than eight of one image: where that does not fit, fewer, but not less than `fewest`.
Tiling choose_tiling(const Convolution& c, const Device& device, int fewest) {
  for (int blocks = blocks_per_processor; blocks >= 1; blocks--) {
    for (int groups = 8; groups >= 1; groups /= 2) {
      const Tiling tiling = tiling_of(c, groups, 8 * groups);
      if (2 * tiling.tiles < 3 * device.processors && groups > 2) continue;
      for (int buffers = tiling.tiles > blocks * device.processors ? 2 : 1; buffers >= 1; buffers--) {
        const Tiling result = buffered(c, tiling, buffers);
        if (result.shared_bytes <= device.shared_bytes / blocks - beside) return result;
      }
    }
  }
  for (int squares = 4; squares >= fewest; squares /= 2) {
    const Tiling result = buffered(c, tiling_of(c, 1, squares), 1);
    if (result.shared_bytes <= device.shared_bytes - beside) return result;
  }
  return {};
}

struct Plan {
  Tiling tiling;
  int blocks;
};

// Remembered, because the questions take longer than the launch. Also lets the kernel have its shared memory.
cudaError_t plan(const void* kernel, const Convolution& c, Plan& result) {
  using Key = std::tuple<const void*, int, int, int, int, int, int, int>;
  static std::mutex mutex;
  static std::map<Key, Plan> known;
  int index = 0;
  Device device{};
  if (const cudaError_t error = current_device(index, device)) return error;
  const std::lock_guard lock(mutex);
  const Key key{kernel, index, c.batch, c.in_channels, c.out_channels, c.height, c.width, c.stride};
  if (const auto found = known.find(key); found != known.end()) {
    result = found->second;
    return cudaSuccess;
  }
  result.tiling = choose_tiling(c, device, 1);
  if (result.tiling.tiles == 0) return cudaErrorInvalidConfiguration;
  const int bytes = result.tiling.shared_bytes;
  int blocks = 0;
  const int most = device.shared_bytes - beside;  // for all plans, not this one alone
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return error;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes)) return error;
  result.blocks = std::min(result.tiling.tiles, std::min(blocks, blocks_per_processor) * device.processors);
  known[key] = result;
  return cudaSuccess;
}

template <typename KernelArguments>
cudaError_t launch_kernel(void (*kernel)(KernelArguments), const KernelArguments& arguments, const Plan& plan, bool cooperative,
                   cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = plan.blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = plan.tiling.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <typename KernelArguments>
using Kernel = void (*)(KernelArguments);

Kernel<Arguments> inference_kernel(const Convolution& c) {
  const bool wide = column_tiles(c.out_channels) == 4;
  if (c.stride == 1) return wide ? infer<1, 4> : infer<1, 2>;
  return wide ? infer<2, 4> : infer<2, 2>;
}

Kernel<TrainingArguments> training_kernel(const Convolution& c) {
  const bool wide = column_tiles(c.out_channels) == 4;
  if (c.stride == 1) return wide ? train<1, 4> : train<1, 2>;
  return wide ? train<2, 4> : train<2, 2>;
}

}  // namespace

const char* why_not(int in_channels, int out_channels, int stride) {
  if (in_channels % step_channels || out_channels % 16 || in_channels > most_channels || out_channels > most_channels)
    return "channels are not multiples of 16 up to 256";
  if (out_channels / (8 * column_tiles(out_channels)) > warps) return "output channels above 128 are not a multiple of 32";
  int index = 0;
  Device device{};
  if (current_device(index, device) != cudaSuccess) return "the CUDA device does not answer";
  if (device.major < 8) return "the compute capability of the device is below 8.0";
  const Convolution c{1, in_channels, out_channels, 64, 64, 64 / stride, 64 / stride, stride};
  if (choose_tiling(c, device, 8).tiles == 0) return "the weights do not fit into shared memory";
  return nullptr;
}

size_t partial_bytes(int out_channels) {
  int index = 0;
  Device device{};
  if (current_device(index, device) != cudaSuccess) return 0;
  return static_cast<size_t>(device.processors) * blocks_per_processor * (out_channels * sizeof(float2) + sizeof(float));
}

cudaError_t launch(const Inference& p, cudaStream_t stream) {
  const Kernel<Arguments> kernel = inference_kernel(p.convolution);
  Plan chosen{};
  if (const cudaError_t error = plan(reinterpret_cast<const void*>(kernel), p.convolution, chosen)) return error;
  const Arguments arguments{p.convolution, chosen.tiling, nullptr, nullptr, p.dw_bias, p.pw_bias,
                            static_cast<const __nv_bfloat16*>(p.residual), p.act_dw, p.act_pw,
                            static_cast<__nv_bfloat16*>(p.y)};
  return launch_kernel(kernel, arguments, chosen, false, stream);
}

cudaError_t launch(const Training& p, cudaStream_t stream) {
  const Kernel<TrainingArguments> kernel = training_kernel(p.convolution);
  Plan chosen{};
  if (const cudaError_t error = plan(reinterpret_cast<const void*>(kernel), p.convolution, chosen)) return error;
  const Arguments arguments{p.convolution, chosen.tiling, p.in_scale, p.in_shift, {}, {}, nullptr,
                            Activation::none, Activation::none, static_cast<__nv_bfloat16*>(p.z)};
  float2* partials = reinterpret_cast<float2*>(p.partials);
  float* counts = reinterpret_cast<float*>(partials + static_cast<size_t>(chosen.blocks) * p.convolution.out_channels);
  const TrainingArguments all{arguments, p.mean, p.var, p.z_mean, p.scale, p.shift, p.bn_weight, p.bn_bias, p.eps, p.relu,
                              static_cast<const __nv_bfloat16*>(p.residual), static_cast<__nv_bfloat16*>(p.y),
                              partials, counts, p.counter};
  return launch_kernel(kernel, all, chosen, p.y != nullptr, stream);
}

}  // namespace odn_fast::separable_conv_cuda
