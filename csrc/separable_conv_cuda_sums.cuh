// Sums over blocks on CUDA devices, always in the same order, and what batch norm's backward makes of them.
#pragma once

#include "separable_conv_cuda_backward.h"
#include "separable_conv_cuda_tile.cuh"

namespace odn_fast::separable_conv_cuda {
namespace {

// A launch of a pass may start before the one it follows has ended (see `launch_blocks`). What that one writes may be
// read after this; the other call lets the next launch start, which then waits in turn.
__device__ void wait_for_launch_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

__device__ void let_next_launch_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

__device__ void store(const Target& target, int index, float value) {
  if (target.bfloat16) {
    static_cast<__nv_bfloat16*>(target.data)[index] = __float2bfloat16_rn(value);
  } else {
    static_cast<float*>(target.data)[index] = value;
  }
}

__device__ float value_of(const Parameter& parameter, int index) {
  return parameter.bfloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(parameter.data)[index])
                            : static_cast<const float*>(parameter.data)[index];
}

// Scale and shift of one channel: batch norm is scale * z + shift.
__device__ float2 affine(const BatchNorm& norm, float eps, int channel) {
  const float scale = value_of(norm.weight, channel) * rsqrtf(norm.var[channel] + eps);
  return {scale, value_of(norm.bias, channel) - norm.mean[channel] * scale};
}

// The sums over rows of `all` (rows, values) in shared memory, to its first row. values <= THREADS.
template <int THREADS>
__device__ void sum_rows(float* all, int rows, int values) {
  const int groups = THREADS / values, value = threadIdx.x % values, group = threadIdx.x / values;
  float sum = 0;
  __syncthreads();
  if (group < groups) {
#pragma unroll 4
    for (int row = group; row < rows; row += groups) sum += all[row * values + value];
  }
  __syncthreads();
  if (group < groups) all[threadIdx.x] = sum;
  __syncthreads();
  if (group == 0) {
#pragma unroll 4
    for (int other = 1; other < groups; other++) sum += all[other * values + value];
    all[value] = sum;
  }
  __syncthreads();
}

// The sums over rows of partials (rows, values) in memory, of the first `columns` times four: to `all`, in shared memory
// of 16 bytes per thread. 4 * columns <= THREADS.
template <int THREADS>
__device__ void sum_partials(const float* partials, int rows, int values, int columns, float* all) {
  constexpr int batch = 8;  // loads at once
  const int groups = THREADS / columns, column = threadIdx.x % columns, group = threadIdx.x / columns;
  if (group < groups) {
    float4 sum{};
    for (int first = group; first < rows; first += batch * groups) {
      float4 loaded[batch];
#pragma unroll
      for (int k = 0; k < batch; k++) {
        const int row = min(first + k * groups, rows - 1);
        loaded[k] = __ldcg(reinterpret_cast<const float4*>(partials + static_cast<size_t>(row) * values) + column);
      }
#pragma unroll
      for (int k = 0; k < batch; k++) {
        if (first + k * groups >= rows) break;
        sum.x += loaded[k].x, sum.y += loaded[k].y, sum.z += loaded[k].z, sum.w += loaded[k].w;
      }
    }
    reinterpret_cast<float4*>(all)[threadIdx.x] = sum;
  }
  sum_rows<THREADS>(all, groups, 4 * columns);
}

// By the last block to get here, from partials (rows, 2, channels) of the sums of g and of g * (z - mean).
template <int THREADS>
__device__ void finish_norm(const float* partials, int rows, int channels, float pixels, const BatchNorm& norm, float eps,
                            const BatchNormGradients& gradients, unsigned* counter, unsigned blocks, float* all) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = increment(counter) == blocks - 1;
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) *counter = 0;
  const int channel = min(static_cast<int>(threadIdx.x), channels - 1);
  const float inverse = rsqrtf(norm.var[channel] + eps), scale = value_of(norm.weight, channel) * inverse;
  const float mean = norm.mean[channel];  // before the sums, which wait for memory too
  sum_partials<THREADS>(partials, rows, 2 * channels, channels / 2, all);
  if (threadIdx.x >= channels) return;
  const float total = all[channel], product = all[channels + channel] * inverse;
  const float b = -scale * inverse * product / pixels;
  gradients.coefficients[channel] = scale;
  gradients.coefficients[channels + channel] = b;
  gradients.coefficients[2 * channels + channel] = -scale * total / pixels - b * mean;
  store(gradients.weight, channel, product);
  store(gradients.bias, channel, total);
}

}  // namespace
}  // namespace odn_fast::separable_conv_cuda
