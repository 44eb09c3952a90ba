// Separable convolution on CUDA devices: what a tile of the output is, and how what it needs comes into shared memory.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "separable_conv_cuda.h"

namespace odn_fast::separable_conv_cuda {
namespace {

constexpr int warps = 8;
constexpr int threads = warps * 32;
constexpr int blocks_per_processor = 2;
constexpr int group_pixels = 32;  // what a warp works on at a time: eight squares
constexpr int step_channels = 16;
constexpr int most_channels = 256;
constexpr int padding_bytes = 16;  // after every pixel of a region, against bank conflicts

struct Tiling {
  int images, tile_height, tile_width;  // a tile: these outputs of so many images
  int region_height, region_width;      // what it reads of each
  int tiles_y, tiles_x, tiles;
  int groups;   // of pixels in a tile, those outside of the images included
  int buffers;  // regions in shared memory, 1 or 2
  int shared_bytes;
  unsigned by_parts, by_steps, by_region_height, by_rows, by_columns;  // for `divided`
};

struct Arguments {
  Convolution convolution;
  Tiling tiling;
  const float* in_scale;
  const float* in_shift;
  Parameter dw_bias, pw_bias;
  const __nv_bfloat16* residual;
  Activation act_dw, act_pw;
  __nv_bfloat16* output;
};

// a / b, from inverse(b), for small values: a * b < 2^20.
unsigned inverse(int b) { return (1u << 20) / b + 1; }
__device__ int divided(int a, unsigned by) { return static_cast<int>(a * by >> 20); }

__device__ float as_float(float v) { return v; }
__device__ float as_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// Calls work(pointer to the values, typed): the one branch lies outside of the work's loads, so that they overlap.
template <typename Work>
__device__ void with_values(const Parameter& parameter, Work&& work) {
  if (parameter.bfloat16) {
    work(static_cast<const __nv_bfloat16*>(parameter.data));
  } else {
    work(static_cast<const float*>(parameter.data));
  }
}

__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ float relu(float v) { return v < 0 ? 0 : v; }  // NaN stays NaN

// One more; gives what it was. What the block did before its last barrier is seen by whoever finds the new value.
__device__ unsigned increment(unsigned* address) {
  unsigned v;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;\n" : "=r"(v) : "l"(address) : "memory");
  return v;
}

// 16 bytes, zeros where they are not there; `source` is a valid address in any case.
__device__ void copy_async(unsigned char* target, const void* source, bool there) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(source), "r"(there ? 16 : 0) : "memory");
}

__device__ void close_group() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int PENDING>
__device__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

struct Place {  // of a tile
  int image, y, x;  // first image, first output row and column
};

__device__ Place place(const Tiling& tiling, int tile) {
  const int x = tile % tiling.tiles_x, rest = tile / tiling.tiles_x;
  return {rest / tiling.tiles_y * tiling.images, rest % tiling.tiles_y * tiling.tile_height, x * tiling.tile_width};
}

// Calls work(offset in the region, the 16 bytes of x, whether they are inside of it, part of the pixel) for this thread's
// share. A row of the region is a row of x, with some bytes after every pixel.
template <typename Work>
__device__ void for_region(const Arguments& p, const Place& tile, Work&& work) {
  const Convolution& c = p.convolution;
  const Tiling& tiling = p.tiling;
  const int parts = c.in_channels / 8, row_parts = tiling.region_width * parts;
  const int left = tile.x * c.stride - 1, top = tile.y * c.stride - 1;
  const int first = max(-left, 0) * parts, end = (c.width - left) * parts;
  const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(c.x);
#pragma unroll 1  // registers
  for (int row = threadIdx.x / 32; row < tiling.images * tiling.region_height; row += warps) {
    const int image = divided(row, tiling.by_region_height);
    const int y = top + row - image * tiling.region_height;
    const bool row_there = tile.image + image < c.batch && y >= 0 && y < c.height;
    const __nv_bfloat16* source = x + (((tile.image + image) * c.height + y) * c.width + left) * c.in_channels;
    const int target = row * (row_parts * 16 + tiling.region_width * padding_bytes);
    for (int part = threadIdx.x % 32; part < row_parts; part += 32) {
      const int pixel = divided(part, tiling.by_parts);
      work(target + part * 16 + pixel * padding_bytes, source + part * 8, row_there && part >= first && part < end, part - pixel * parts);
    }
  }
}

__device__ void load_region(const Arguments& p, const Place& tile, unsigned char* region) {
  for_region(p, tile, [&](int offset, const __nv_bfloat16* source, bool there, int) {
    copy_async(region + offset, there ? source : p.convolution.x, there);
  });
}

// In place, by the thread that copied; padding stays zero.
__device__ void normalise_region(const Arguments& p, const Place& tile, unsigned char* region) {
  for_region(p, tile, [&](int offset, const __nv_bfloat16*, bool there, int part) {
    if (!there) return;
    uint4 values = *reinterpret_cast<uint4*>(region + offset);
    uint32_t* pairs = reinterpret_cast<uint32_t*>(&values);
    const float* scale = p.in_scale + part * 8;
    const float* shift = p.in_shift + part * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      pairs[i] = pack(relu(low(pairs[i]) * scale[2 * i] + shift[2 * i]),
                      relu(high(pairs[i]) * scale[2 * i + 1] + shift[2 * i + 1]));
    }
    *reinterpret_cast<uint4*>(region + offset) = values;
  });
}

__device__ uint2 four(const __nv_bfloat16* source) { return *reinterpret_cast<const uint2*>(source); }
__device__ uint2 four(const float* source) {
  const float4 v = *reinterpret_cast<const float4*>(source);
  return {pack(v.x, v.y), pack(v.z, v.w)};
}

// The pointwise weights in the order in which lanes read them: (chunk, step, pair of n tiles, lane) of 16 bytes.
template <int NTILES, typename Value>
__device__ void load_weights(const Arguments& p, const Value* source, uint4* weights) {
  const Convolution& c = p.convolution;
  const int steps = c.in_channels / step_channels;
#pragma unroll 4
  for (int i = threadIdx.x; i < c.in_channels * c.out_channels / 8; i += threads) {
    const int lane = i % 32, g = lane / 4, t = lane % 4;
    const int pair = i / 32 % (NTILES / 2), rest = i / (32 * (NTILES / 2));
    const int chunk = divided(rest, p.tiling.by_steps), step = rest - chunk * steps;
    const int row = chunk * 8 * NTILES + 2 * NTILES * (g / 2) + 4 * pair + g % 2;
    const Value* first = source + row * c.in_channels + step * step_channels + 4 * t;
    const uint2 even = four(first), odd = four(first + 2 * c.in_channels);
    weights[i] = {even.x, even.y, odd.x, odd.y};
  }
}

// Where the squares of a tile lie: offset in the region, and image, row and column in the tile.
struct Square {
  int offset;
  short image, y, x;
};

__device__ void find_squares(const Arguments& p, Square* squares) {
  const Tiling& tiling = p.tiling;
  const int columns = tiling.tile_width / 2, rows = tiling.tile_height / 2;
  for (int i = threadIdx.x; i < tiling.groups * 8; i += threads) {
    const int rest = divided(i, tiling.by_columns), column = i - rest * columns;
    const int image = divided(rest, tiling.by_rows), row = rest - image * rows;
    const bool there = image < tiling.images;  // else it is computed from the first one's region, and dropped
    const int stride = p.convolution.stride;
    const int offset = there ? ((image * tiling.region_height + 2 * stride * row) * tiling.region_width + 2 * stride * column) *
                                   (p.convolution.in_channels * 2 + padding_bytes)
                             : 0;
    squares[i] = {offset, static_cast<short>(there ? image : 0x7000), static_cast<short>(2 * row), static_cast<short>(2 * column)};
  }
}

}  // namespace
}  // namespace odn_fast::separable_conv_cuda
