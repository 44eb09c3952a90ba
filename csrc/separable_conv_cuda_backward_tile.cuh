// Backward of the separable convolution on CUDA devices: what a block does with its tiles, from the gradient of the
// layer's result to that of x and to its share of those of dw and pw.
//
// A block of eight warps walks over tiles, for a chunk of 16, 32 or 64 input channels, with barriers between five
// phases, all in shared memory:
//   1. the regions that the tile needs: x as it is, or normalised, and dz = a * g + b * z + c, rounded to bfloat16;
//   2. the depthwise output d of the tile's own pixels;
//   3. dz^T . d on tensor cores, which is the gradient of pw, summed in registers over all tiles of the block;
//   4. dd = dz . pw on tensor cores, in the whole region, where d was;
//   5. the transposed stencil of dd, which is the gradient of x, and dd times x, which is that of dw, summed likewise.
// A tile is made of units: squares of 2x2 pixels of x, with 2x2 outputs at stride 1 and with one output at stride 2.
#pragma once

#include "separable_conv_cuda_backward_load.cuh"
#include "separable_conv_cuda_sums.cuh"

namespace odn_fast::separable_conv_cuda {
namespace {

// Four 8x8 matrices of operands of the tensor cores, or their transposes: `row` are the 16 bytes of this lane's row.
__device__ void load_matrices(uint32_t (&v)[4], const unsigned char* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}

__device__ void load_transposed(uint32_t (&v)[4], const unsigned char* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}

// dd = dz . pw, 16 pixels of the region at a time.
template <int STRIDE, int STEPS>
__device__ void multiply_dz(const Layout<STRIDE, STEPS>& at, int z_pixels, int out_channels) {
  constexpr int x_bytes = Layout<STRIDE, STEPS>::x_bytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int tile = warp; tile < z_pixels / 16; tile += warps) {
    float sums[2 * STEPS][4] = {};
    const unsigned char* a = at.dz + (tile * 16 + lane % 16) * at.z_bytes + lane / 16 * 16;
    const unsigned char* b = at.pw + lane % 16 * x_bytes + lane / 16 * 16;
#pragma unroll 1
    for (int k = 0; k < out_channels / 16; k++, a += 32, b += 16 * x_bytes) {
      uint32_t rows[4];
      load_matrices(rows, a);
      const uint4 operand{rows[0], rows[1], rows[2], rows[3]};
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        uint32_t columns[4];
        load_transposed(columns, b + step * 32);
        multiply(sums[2 * step], operand, columns[0], columns[1]);
        multiply(sums[2 * step + 1], operand, columns[2], columns[3]);
      }
    }
    unsigned char* target = at.dd + (tile * 16 + g) * x_bytes + t * 4;
#pragma unroll
    for (int n = 0; n < 2 * STEPS; n++) {
      *reinterpret_cast<uint32_t*>(target + n * 16) = pack(sums[n][0], sums[n][1]);
      *reinterpret_cast<uint32_t*>(target + 8 * x_bytes + n * 16) = pack(sums[n][2], sums[n][3]);
    }
  }
}

// A lane's share of the stencils: two channels of one in four units.
template <int STEPS>
struct Share {
  int channel, unit, first_group;  // channel: of the chunk

  __device__ Share() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    channel = warp % STEPS * step_channels + lane % 8 * 2, unit = lane / 8, first_group = warp / STEPS;
  }
};

__device__ float2 pair_at(const unsigned char* source) {
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(source);
  return {low(pair), high(pair)};
}

template <int STEPS>
__device__ void read_taps(const float* dw, int channel, float2 (&taps)[9]) {
#pragma unroll
  for (int tap = 0; tap < 9; tap++) taps[tap] = *reinterpret_cast<const float2*>(dw + tap * STEPS * step_channels + channel);
}

// d, the depthwise output of the tile's own pixels.
template <int STRIDE, int STEPS>
__device__ void convolve_x(const BackwardTiling& tiling, const Layout<STRIDE, STEPS>& at) {
  using L = Layout<STRIDE, STEPS>;
  constexpr int outputs = L::unit_outputs, window = STRIDE == 1 ? 4 : 3;
  const Share<STEPS> share;
  float2 taps[9];
  read_taps<STEPS>(at.dw, share.channel, taps);
#pragma unroll 1
  for (int group = share.first_group; group < tiling.units / 4; group += warps / STEPS) {
    const int unit = group * 4 + share.unit;
    const unsigned char* source = at.x + at.units[unit].x_pixel * L::x_bytes + share.channel * 2;
    float2 sums[outputs] = {};
#pragma unroll
    for (int row = 0; row < window; row++) {
#pragma unroll
      for (int column = 0; column < window; column++) {
        const float2 value = pair_at(source + (row * tiling.x_width + column) * L::x_bytes);
#pragma unroll
        for (int output = 0; output < outputs; output++) {
          const int i = row - output / 2, j = column - output % 2;
          if (i < 0 || i > 2 || j < 0 || j > 2) continue;
          sums[output].x += value.x * taps[3 * i + j].x;
          sums[output].y += value.y * taps[3 * i + j].y;
        }
      }
    }
#pragma unroll
    for (int output = 0; output < outputs; output++) {
      unsigned char* target = at.d + own_row<STRIDE>(unit, output) * L::x_bytes + share.channel * 2;
      *reinterpret_cast<uint32_t*>(target) = pack(sums[output].x, sums[output].y);
    }
  }
}

// What a lane has summed over all tiles, of its two channels.
struct Summed {
  float2 dw[9];
  float2 g, products;  // with in_norm: of the gradient of its result, and of that times what it took, less the mean
};

// NORMALISED: with in_norm.
template <int STRIDE, int STEPS, bool NORMALISED>
__device__ void gradient_of_x(const BackwardArguments& p, const Layout<STRIDE, STEPS>& at, const TilePlace& tile, int first_channel,
                              Summed& summed) {
  using L = Layout<STRIDE, STEPS>;
  constexpr int window = STRIDE == 1 ? 4 : 2;
  const ConvolutionBackward& pass = p.pass;
  const Convolution& c = pass.convolution;
  const BackwardTiling& tiling = p.tiling;
  const Share<STEPS> share;
  float2 taps[9];
  read_taps<STEPS>(at.dw, share.channel, taps);
  const int pixel_pairs = c.in_channels / 2, row_pairs = c.width * pixel_pairs;
#pragma unroll 1
  for (int group = share.first_group; group < tiling.units / 4; group += warps / STEPS) {
    const Unit unit = at.units[group * 4 + share.unit];
    const unsigned char* source = at.dd + unit.z_pixel * L::x_bytes + share.channel * 2;
    const unsigned char* of_x = at.x + (unit.x_pixel + tiling.x_width + 1) * L::x_bytes + share.channel * 2;
    const int image = tile.image + unit.image, y = 2 * (tile.y + unit.y), x = 2 * (tile.x + unit.x);
    const size_t place = ((image * c.height + y) * c.width + x) * pixel_pairs + (first_channel + share.channel) / 2;
    const bool unit_there = unit.image < tiling.images, there = unit_there && image < c.batch && y < c.height && x < c.width;
    const bool below = there && y + 1 < c.height, beside = there && x + 1 < c.width;
    const bool stored[4] = {there, beside, below, below && beside};
    uint32_t taken[4], xs[4];
    float2 grads[4] = {};
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int offset = q / 2 * row_pairs + q % 2 * pixel_pairs;
      xs[q] = *reinterpret_cast<const uint32_t*>(of_x + (q / 2 * tiling.x_width + q % 2) * L::x_bytes);
      if (!unit_there) xs[q] = 0;  // past the end of the tile; outside of the map it is 0 anyway
      if (NORMALISED) taken[q] = stored[q] ? (static_cast<const uint32_t*>(c.x) + place)[offset] : 0;
    }
    if (pass.added) {
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const int offset = q / 2 * row_pairs + q % 2 * pixel_pairs;
        const uint32_t added = stored[q] ? (static_cast<const uint32_t*>(pass.added) + place)[offset] : 0;
        grads[q] = {low(added), high(added)};
      }
    }
#pragma unroll
    for (int row = 0; row < window; row++) {
#pragma unroll
      for (int column = 0; column < window; column++) {
        const float2 value = pair_at(source + (row * tiling.z_width + column) * L::x_bytes);
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const int i = q / 2 + (STRIDE == 1 ? 2 - row : 1 - 2 * row), j = q % 2 + (STRIDE == 1 ? 2 - column : 1 - 2 * column);
          if (i < 0 || i > 2 || j < 0 || j > 2) continue;
          grads[q].x += value.x * taps[3 * i + j].x;
          grads[q].y += value.y * taps[3 * i + j].y;
          summed.dw[3 * i + j].x += value.x * low(xs[q]);
          summed.dw[3 * i + j].y += value.y * high(xs[q]);
        }
      }
    }
    if (!pass.grad_x) continue;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      if (NORMALISED) {
        if (low(xs[q]) <= 0) grads[q].x = 0;
        if (high(xs[q]) <= 0) grads[q].y = 0;
      }
      const uint32_t result = pack(grads[q].x, grads[q].y);
      if (stored[q]) (static_cast<uint32_t*>(pass.grad_x) + place)[q / 2 * row_pairs + q % 2 * pixel_pairs] = result;
      if (!NORMALISED || !stored[q]) continue;
      const float2 mean = *reinterpret_cast<const float2*>(at.in + 2 * L::chunk + share.channel);
      summed.g.x += low(result);
      summed.g.y += high(result);
      summed.products.x += low(result) * (low(taken[q]) - mean.x);
      summed.products.y += high(result) * (high(taken[q]) - mean.y);
    }
  }
}

// Which part of pw's gradient a warp sums: 16 rows of it, over one in `splits` groups of pixels.
struct Rows {
  int row, split, splits;
  bool idle;

  __device__ explicit Rows(int out_channels) {
    const int rows = out_channels / 16, warp = threadIdx.x / 32;
    row = warp % rows, split = warp / rows, splits = warps / rows, idle = split >= splits;
  }
};

template <int STRIDE, int STEPS>
__device__ void gradient_of_pw(const Layout<STRIDE, STEPS>& at, const Rows& rows, int pixels, float (&sums)[2 * STEPS][4]) {
  constexpr int x_bytes = Layout<STRIDE, STEPS>::x_bytes;
  if (rows.idle) return;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int k = rows.split; k < pixels / 16; k += rows.splits) {
    uint32_t outputs[4];
    load_transposed(outputs, at.dz + at.own[k * 16 + lane / 16 * 8 + lane % 8] + rows.row * 32 + lane / 8 % 2 * 16);
    const uint4 operand{outputs[0], outputs[1], outputs[2], outputs[3]};
    const unsigned char* b = at.d + (k * 16 + lane % 16) * x_bytes + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      uint32_t columns[4];
      load_transposed(columns, b + step * 32);
      multiply(sums[2 * step], operand, columns[0], columns[1]);
      multiply(sums[2 * step + 1], operand, columns[2], columns[3]);
    }
  }
}

// ---- what a block leaves: partial sums, in the order of its warps

template <int STEPS>
__device__ void store_pw(const ConvolutionBackward& pass, const Rows& rows, int block, int first_channel, float* all,
                         const float (&sums)[2 * STEPS][4]) {
  constexpr int chunk = STEPS * step_channels;
  const Convolution& c = pass.convolution;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (!rows.idle) {
    float* target = all + (rows.split * c.out_channels + rows.row * 16 + g) * chunk + 2 * t;
#pragma unroll
    for (int n = 0; n < 2 * STEPS; n++) {
      *reinterpret_cast<float2*>(target + n * 8) = {sums[n][0], sums[n][1]};
      *reinterpret_cast<float2*>(target + 8 * chunk + n * 8) = {sums[n][2], sums[n][3]};
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < c.out_channels * chunk / 4; i += threads) {
    float4 sum{};
    for (int split = 0; split < rows.splits; split++) {
      const float4 v = reinterpret_cast<const float4*>(all + split * c.out_channels * chunk)[i];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const int row = i / (chunk / 4), column = i % (chunk / 4) * 4;
    float* target = pass.pw_partials + (static_cast<size_t>(block) * c.out_channels + row) * c.in_channels + first_channel + column;
    *reinterpret_cast<float4*>(target) = sum;
  }
}

// COUNT pairs of each lane, values (warp, COUNT, 16 channels) in `all`, summed over warps to target (COUNT, channels).
template <int STEPS, int COUNT>
__device__ void store_sums(float2 (&values)[COUNT], float* all, float* target, int channels) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    for (int distance = 8; distance < 32; distance *= 2) {
      values[i].x += __shfl_xor_sync(0xffffffffu, values[i].x, distance);
      values[i].y += __shfl_xor_sync(0xffffffffu, values[i].y, distance);
    }
    if (lane < 8) *reinterpret_cast<float2*>(all + (warp * COUNT + i) * step_channels + lane * 2) = values[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < COUNT * STEPS * step_channels; i += threads) {
    const int row = i / (STEPS * step_channels), channel = i % (STEPS * step_channels);
    float sum = 0;
    for (int other = channel / step_channels; other < warps; other += STEPS) {
      sum += all[(other * COUNT + row) * step_channels + channel % step_channels];
    }
    target[row * channels + channel] = sum;
  }
}

template <int STRIDE, int STEPS, bool NORMALISED>
__global__ void __launch_bounds__(threads, blocks_per_processor) backward(const __grid_constant__ BackwardArguments p) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int chunk = STEPS * step_channels;
  const ConvolutionBackward& pass = p.pass;
  const Convolution& c = pass.convolution;
  const BackwardTiling& tiling = p.tiling;
  const int chunks = c.in_channels / chunk;
  const int block = blockIdx.x / chunks, blocks = gridDim.x / chunks, first_channel = blockIdx.x % chunks * chunk;
  const auto at = [&] { return Layout<STRIDE, STEPS>(shared, tiling, c.out_channels); };
  Summed summed{};
  float of_pw[2 * STEPS][4] = {};

  TilePlace place = place_of(tiling, block);
  load_x<STRIDE, STEPS>(p, at(), place, first_channel);
  prepare<STRIDE, STEPS>(p, at(), first_channel);
  wait_for_launch_before();
  prepare_coefficients<STRIDE, STEPS>(pass, at());
  __syncthreads();
  for (int tile = block;;) {
    load_dz<STRIDE, STEPS>(p, at(), place);
    wait_for_groups<0>();
    if (NORMALISED) normalise_x<STRIDE, STEPS>(p, at(), place);
    __syncthreads();
    convolve_x<STRIDE, STEPS>(tiling, at());
    __syncthreads();
    gradient_of_pw<STRIDE, STEPS>(at(), Rows(c.out_channels + nothing()), tiling.units * Layout<STRIDE, STEPS>::unit_outputs, of_pw);
    __syncthreads();
    multiply_dz<STRIDE, STEPS>(at(), tiling.z_pixels, c.out_channels);
    __syncthreads();
    gradient_of_x<STRIDE, STEPS, NORMALISED>(p, at(), place, first_channel, summed);
    __syncthreads();
    tile += blocks;
    if (tile >= tiling.tiles) break;
    place = place_of(tiling, tile);
    load_x<STRIDE, STEPS>(p, at(), place, first_channel);
  }

  let_next_launch_start();
  const Rows rows(c.out_channels);
  float* all = reinterpret_cast<float*>(shared);
  store_pw<STEPS>(pass, rows, block, first_channel, all, of_pw);
  float* of_dw = all + rows.splits * c.out_channels * chunk;
  store_sums<STEPS>(summed.dw, of_dw, pass.dw_partials + static_cast<size_t>(block) * 9 * c.in_channels + first_channel, c.in_channels);
  if (!NORMALISED) return;
  float2 of_norm[2] = {summed.g, summed.products};
  store_sums<STEPS>(of_norm, of_dw + warps * 9 * step_channels,
                    pass.in_partials + static_cast<size_t>(block) * 2 * c.in_channels + first_channel, c.in_channels);
  finish_norm<threads>(pass.in_partials, blocks, c.in_channels, static_cast<float>(c.batch) * c.height * c.width, pass.in_norm,
                       pass.eps, pass.in_gradients, pass.counter, gridDim.x, all);
}

}  // namespace
}  // namespace odn_fast::separable_conv_cuda
