// Separable convolution on CUDA devices: what a block does with its tiles of the output: load, convolve, store.
//
// A block of eight warps walks over tiles of the output. The region of x that a tile needs is copied to shared memory
// while the tile before it is worked on. Two phases follow, with a barrier between them: each warp takes a step of 16
// input channels and computes the depthwise output of 32 pixels in the registers' order of the tensor cores' operand
// A, which goes to shared memory as it is; then each warp takes a chunk of output channels and 32 pixels, multiplies,
// and stores. A lane's four pixels are a square of 2x2, so that it reads 16 instead of 36 values per channel.
//
// Operands of mma.m16n8k16, g = lane / 4 and t = lane % 4: rows are pixels, of which a lane has g and g + 8; the
// channels k = 2t, 2t + 1, 2t + 8, 2t + 9 of A and B are channels 4t .. 4t + 3 of the step, which are adjacent in
// memory. Columns n of the tiles of a chunk are permuted likewise: a lane ends with adjacent output channels.
#pragma once

#include "separable_conv_cuda_load.cuh"

namespace odn_fast::separable_conv_cuda {
namespace {

template <int COUNT>
__device__ void activate(float (&v)[COUNT], Activation activation) {
  const auto clipped = [](float u, float top) { return u < 0 ? 0 : (u > top ? top : u); };
  switch (activation) {
    case Activation::none: return;
    case Activation::relu:
#pragma unroll
      for (float& u : v) u = relu(u);
      return;
    case Activation::relu6:
#pragma unroll
      for (float& u : v) u = clipped(u, 6);
      return;
    case Activation::hard_swish:
#pragma unroll
      for (float& u : v) u *= clipped(u + 3, 6) * (1 / 6.0f);
      return;
    case Activation::silu:
#pragma unroll
      for (float& u : v) u = __fdividef(u, 1 + __expf(-u));
      return;
  }
}

// The depthwise output of one square for four channels, as operand A of its two rows.
template <int STRIDE>
__device__ void stencil(const unsigned char* source, int row_bytes, int pixel_bytes, const float (&weights)[9][4],
                        const float (&bias)[4], Activation activation, uint4 (&operand)[2]) {
  float sums[16];  // (row, column, channel)
#pragma unroll
  for (int i = 0; i < 16; i++) sums[i] = bias[i % 4];
#pragma unroll
  for (int row = 0; row < STRIDE + 3; row++) {
#pragma unroll
    for (int column = 0; column < STRIDE + 3; column++) {
      const uint2 pairs = *reinterpret_cast<const uint2*>(source + row * row_bytes + column * pixel_bytes);
      const float values[4] = {low(pairs.x), high(pairs.x), low(pairs.y), high(pairs.y)};
#pragma unroll
      for (int output = 0; output < 4; output++) {
        const int i = row - output / 2 * STRIDE, j = column - output % 2 * STRIDE;
        if (i < 0 || i > 2 || j < 0 || j > 2) continue;
#pragma unroll
        for (int k = 0; k < 4; k++) sums[4 * output + k] += values[k] * weights[3 * i + j][k];
      }
    }
  }
  activate(sums, activation);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float* left = sums + 8 * i;
    const float* right = left + 4;
    operand[i] = {pack(left[0], left[1]), pack(right[0], right[1]), pack(left[2], left[3]), pack(right[2], right[3])};
  }
}

__device__ void multiply(float (&sums)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// 2 * NTILES adjacent bfloat16 values of one pixel.
template <int NTILES>
struct Packed {
  uint32_t pairs[NTILES];

  __device__ void load(const __nv_bfloat16* source) {
    if constexpr (NTILES == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(source);
      pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(source);
      pairs[0] = v.x, pairs[1] = v.y;
    }
  }
  __device__ void store(__nv_bfloat16* target) const {
    if constexpr (NTILES == 4) {
      *reinterpret_cast<uint4*>(target) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    } else {
      *reinterpret_cast<uint2*>(target) = {pairs[0], pairs[1]};
    }
  }
};

// What a lane has seen of its channels: sums of z - pivot and of its square. The pivot is a value of z, so that means
// far from zero cost no digits.
template <int CHANNELS>
struct Sums {
  float sum[CHANNELS], square[CHANNELS];
  int count;  // of pixels
};

// In shared memory, because registers are short.
template <int NTILES, bool TRAIN>
struct Constants {
  alignas(16) float output[warps][8 * NTILES];  // for each channel of a warp's chunk: its pivot; its bias at inference
  alignas(16) float dw_bias[TRAIN ? 1 : most_channels];

  __device__ float* of_lane() { return output[threadIdx.x / 32] + threadIdx.x % 4 * 2 * NTILES; }
};

template <int COUNT>
__device__ void read(const float* source, float (&values)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(source + i);
    values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
  }
}

// All tiles of this block: z or y stored; for TRAIN the lane's statistics, of chunk warp % chunks.
template <int STRIDE, int NTILES, bool TRAIN>
__device__ void convolve(const Arguments& p, unsigned char* shared, Constants<NTILES, TRAIN>& constants,
                         Sums<2 * NTILES>& seen) {
  constexpr int lane_channels = 2 * NTILES;
  const Convolution& c = p.convolution;
  const Tiling& tiling = p.tiling;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int steps = c.in_channels / step_channels, chunks = c.out_channels / (8 * NTILES);
  const int pixel_bytes = c.in_channels * 2 + padding_bytes, row_bytes = tiling.region_width * pixel_bytes;
  const int region_bytes = tiling.images * tiling.region_height * row_bytes;

  unsigned char* regions = shared;
  uint4* weights = reinterpret_cast<uint4*>(regions + tiling.buffers * region_bytes);
  uint4* depthwise = weights + c.in_channels * c.out_channels / 8;
  Square* squares = reinterpret_cast<Square*>(depthwise + tiling.groups * steps * 64);

  Place here = place(tiling, blockIdx.x);
  load_region(p, here, regions);
  close_group();
  find_squares(p, squares);
  with_values(c.pw, [&](const auto* pw) { load_weights<NTILES>(p, pw, weights); });

  // The stencil's share: step warp % step_warps and those step_warps further on; the product's: chunk warp % chunks.
  const int step_warps = min(steps, warps), step_stride = warps / step_warps;
  const int first_step_group = warp < step_stride * step_warps ? warp / step_warps : tiling.groups;
  const int chunk = warp % chunks, chunk_stride = warps / chunks;
  const int first_chunk_group = warp < chunk_stride * chunks ? warp / chunks : tiling.groups;
  const int channel = chunk * 8 * NTILES + t * lane_channels;  // this lane's first output channel

  float dw[9][4];
  int held = -1;  // the step whose depthwise weights these are
#pragma unroll
  for (int i = 0; i < lane_channels; i++) {
    if (TRAIN) seen.sum[i] = seen.square[i] = 0;
  }
  seen.count = 0;
  bool pivot_known = false;
  if (!TRAIN) {
    with_values(p.pw_bias, [&](const auto* bias) {
      if (lane < 8 * NTILES) constants.output[warp][lane] = bias ? as_float(bias[chunk * 8 * NTILES + lane]) : 0;
    });
    with_values(p.dw_bias, [&](const auto* bias) {
      if (threadIdx.x < c.in_channels) constants.dw_bias[threadIdx.x] = bias ? as_float(bias[threadIdx.x]) : 0;
    });
  }

  int buffer = 0;
  for (int tile = blockIdx.x; tile < tiling.tiles; tile += gridDim.x) {
    const int next = tile + gridDim.x;
    unsigned char* region = regions + buffer * region_bytes;
    if (tiling.buffers == 2) {
      buffer ^= 1;
      if (next < tiling.tiles) load_region(p, place(tiling, next), regions + buffer * region_bytes);
      close_group();
      wait_for_groups<1>();
    } else {
      wait_for_groups<0>();
    }
    if (TRAIN && p.in_scale) normalise_region(p, here, region);
    __syncthreads();  // the region is there, and the depthwise output of the tile before has been read

    for (int step = warp % step_warps; step < steps; step += step_warps) {
      if (step != held) {
        held = step;
        const int first = (step * step_channels + 4 * t) * c.dw_channel_stride;
        with_values(c.dw, [&](const auto* source) {
#pragma unroll
          for (int i = 0; i < 36; i++) {
            dw[i / 4][i % 4] = as_float(source[first + i % 4 * c.dw_channel_stride + i / 4 * c.dw_tap_stride]);
          }
        });
      }
      for (int group = first_step_group; group < tiling.groups; group += step_stride) {
        float bias[4] = {};
        if (!TRAIN) read(constants.dw_bias + step * step_channels + 4 * t, bias);
        uint4 operand[2];
        const unsigned char* source = region + squares[group * 8 + g].offset + step * step_channels * 2 + t * 8;
        stencil<STRIDE>(source, row_bytes, pixel_bytes, dw, bias, TRAIN ? Activation::none : p.act_dw, operand);
        uint4* target = depthwise + (group * steps + step) * 64 + lane;
        target[0] = operand[0];
        target[32] = operand[1];
      }
    }
    __syncthreads();  // the depthwise output is there, and the region has been read
    if (tiling.buffers == 1 && next < tiling.tiles) {
      load_region(p, place(tiling, next), regions);
      close_group();
    }

    for (int group = first_chunk_group; group < tiling.groups; group += chunk_stride) {
      float start[lane_channels] = {}, sums[2][NTILES][4];
      if (!TRAIN) read(constants.of_lane(), start);
#pragma unroll
      for (int i = 0; i < 2 * NTILES * 4; i++) sums[i / (NTILES * 4)][i / 4 % NTILES][i % 4] = start[i / 4 % NTILES * 2 + i % 2];
      const uint4* a = depthwise + group * steps * 64 + lane;
      const uint4* weight = weights + chunk * steps * (NTILES / 2) * 32 + lane;
#pragma unroll 1  // registers
      for (int step = 0; step < steps; step++, a += 64, weight += NTILES / 2 * 32) {
        const uint4 upper = a[0], lower = a[32];
#pragma unroll
        for (int pair = 0; pair < NTILES / 2; pair++) {
          const uint4 b = weight[pair * 32];
          multiply(sums[0][2 * pair], upper, b.x, b.y);
          multiply(sums[1][2 * pair], lower, b.x, b.y);
          multiply(sums[0][2 * pair + 1], upper, b.z, b.w);
          multiply(sums[1][2 * pair + 1], lower, b.z, b.w);
        }
      }

      const Square square = squares[group * 8 + g];
      const int image = here.image + square.image, y = here.y + square.y, x = here.x + square.x;
      const bool there = square.image < tiling.images && image < c.batch && y < c.out_height && x < c.out_width;
      float pivot[lane_channels];
      if (TRAIN) {  // the first pixel of the first square that is there becomes the pivot
        const unsigned lanes = __ballot_sync(0xffffffffu, there);
        if (lanes && !pivot_known) {
          pivot_known = true;
          if (g == (__ffs(lanes) - 1) / 4) {
#pragma unroll
            for (int i = 0; i < lane_channels; i++) constants.of_lane()[i] = sums[0][i / 2][i % 2];
          }
          __syncwarp();
        }
        read(constants.of_lane(), pivot);
      }
      const int first = ((image * c.out_height + y) * c.out_width + x) * c.out_channels + channel;
      const int columns = there ? min(c.out_width - x, 2) : 0, rows = min(c.out_height - y, 2);
      seen.count += columns * rows;
#pragma unroll
      for (int pixel = 0; pixel < 4; pixel++) {
        if (pixel / 2 >= rows || pixel % 2 >= columns) continue;
        const int offset = first + (pixel / 2 * c.out_width + pixel % 2) * c.out_channels;
        float values[lane_channels];
#pragma unroll
        for (int i = 0; i < lane_channels; i++) values[i] = sums[pixel / 2][i / 2][pixel % 2 * 2 + i % 2];
        Packed<NTILES> packed;
        if (!TRAIN) {
          if (p.residual) {
            packed.load(p.residual + offset);
#pragma unroll
            for (int i = 0; i < lane_channels; i++) values[i] += i % 2 ? high(packed.pairs[i / 2]) : low(packed.pairs[i / 2]);
          }
          activate(values, p.act_pw);
        }
#pragma unroll
        for (int i = 0; i < NTILES; i++) packed.pairs[i] = pack(values[2 * i], values[2 * i + 1]);
        packed.store(p.output + offset);
        if (TRAIN) {
#pragma unroll
          for (int i = 0; i < lane_channels; i++) {
            const float v = (i % 2 ? high(packed.pairs[i / 2]) : low(packed.pairs[i / 2])) - pivot[i];
            seen.sum[i] += v;
            seen.square[i] += v * v;
          }
        }
      }
    }
    here = place(tiling, next);
  }
}

}  // namespace
}  // namespace odn_fast::separable_conv_cuda
