// Backward of the separable convolution on CUDA devices: what a tile is, and how what it needs comes into shared memory.
#pragma once

#include "separable_conv_cuda_sums.cuh"

namespace odn_fast::separable_conv_cuda {
namespace {

struct BackwardTiling {
  int images, unit_rows, unit_columns;  // of a tile
  int units;                            // those that fill up the last pixels of an operand included
  int x_height, x_width, z_height, z_width;  // regions
  int x_pixels, z_pixels;  // of all images; z's are a multiple of 16, with a pixel of zeros after the last
  int tiles_y, tiles_x, tiles;
  int chunk;  // input channels of a block
  int shared_bytes;
  unsigned by_x_width, by_x_height, by_z_width, by_z_height, by_unit_columns, by_unit_rows;
};

struct BackwardArguments {
  ConvolutionBackward pass;
  BackwardTiling tiling;
};

struct Unit {
  int x_pixel, z_pixel;  // of the regions, at its first row and column
  short image, y, x;     // in the tile; y and x in units
};

// 0, which the compiler does not know. What is computed from it in a loop stays there.
__device__ int nothing() {
  int v;
  asm volatile("mov.s32 %0, 0;\n" : "=r"(v));
  return v;
}

// Everything in shared memory, in this order, and how it is laid out. Each phase computes it anew: registers are short.
template <int STRIDE, int STEPS>
struct Layout {
  static constexpr int chunk = STEPS * step_channels, unit_outputs = STRIDE == 1 ? 4 : 1;
  static constexpr int x_bytes = chunk * 2 + padding_bytes;  // of a pixel of x, d and dd, and of a row of pw

  int z_bytes;  // of a pixel of dz
  unsigned char *dz, *x, *d, *dd, *pw;  // d and dd are one place, at different times
  float *dw, *coefficients, *in;  // (9, chunk), (5, out_channels): a, b, c, scale, shift; (3, chunk): scale, shift, mean
  Unit* units;
  int* own;  // for each of the tile's outputs, in the order of d, where its dz lies

  __device__ Layout(unsigned char* shared, const BackwardTiling& tiling, int out_channels) {
    shared += nothing();
    z_bytes = out_channels * 2 + padding_bytes;
    dz = shared;
    x = dz + tiling.z_pixels * z_bytes;
    d = dd = x + tiling.x_pixels * x_bytes;
    pw = d + max(tiling.units * unit_outputs, tiling.z_pixels) * x_bytes;
    dw = reinterpret_cast<float*>(pw + out_channels * x_bytes);
    coefficients = dw + 9 * chunk;
    in = coefficients + 5 * out_channels;
    units = reinterpret_cast<Unit*>(in + 3 * chunk);
    own = reinterpret_cast<int*>(units + tiling.units);
  }
};

// The place of output `output` (of four, or the only one) of a unit among the operand's rows: eight lanes for each of
// four units then store to all banks.
template <int STRIDE>
__device__ int own_row(int unit, int output) {
  return STRIDE == 1 ? unit / 4 * 16 + output / 2 * 8 + unit % 4 * 2 + output % 2 : unit;
}

// What stays in shared memory for all tiles.
template <int STRIDE, int STEPS>
__device__ void prepare(const BackwardArguments& p, const Layout<STRIDE, STEPS>& at, int first_channel) {
  using L = Layout<STRIDE, STEPS>;
  const ConvolutionBackward& pass = p.pass;
  const Convolution& c = pass.convolution;
  const BackwardTiling& tiling = p.tiling;
  with_values(c.pw, [&](const auto* pw) {
#pragma unroll 4
    for (int i = threadIdx.x; i < c.out_channels * (L::chunk / 4); i += threads) {
      const int row = i / (L::chunk / 4), column = i % (L::chunk / 4) * 4;
      *reinterpret_cast<uint2*>(at.pw + row * L::x_bytes + column * 2) = four(pw + row * c.in_channels + first_channel + column);
    }
  });
  with_values(c.dw, [&](const auto* dw) {
    for (int i = threadIdx.x; i < 9 * L::chunk; i += threads) {
      const int tap = i / L::chunk, channel = first_channel + i % L::chunk;
      at.dw[i] = as_float(dw[channel * c.dw_channel_stride + tap * c.dw_tap_stride]);
    }
  });
  for (int i = threadIdx.x; i < c.out_channels; i += threads) {
    const float2 masks = pass.masks ? affine(pass.norm, pass.eps, i) : float2{0, 1};
    at.coefficients[3 * c.out_channels + i] = masks.x;
    at.coefficients[4 * c.out_channels + i] = masks.y;
  }
  if (pass.in_norm.mean && threadIdx.x < L::chunk) {
    const float2 in = affine(pass.in_norm, pass.eps, first_channel + threadIdx.x);
    at.in[threadIdx.x] = in.x;
    at.in[L::chunk + threadIdx.x] = in.y;
    at.in[2 * L::chunk + threadIdx.x] = pass.in_norm.mean[first_channel + threadIdx.x];
  }
  const int z_real = tiling.images * tiling.z_height * tiling.z_width;
  for (int i = threadIdx.x; i < (tiling.z_pixels - z_real) * at.z_bytes / 16; i += threads) {
    reinterpret_cast<uint4*>(at.dz + z_real * at.z_bytes)[i] = {0, 0, 0, 0};
  }
  for (int i = threadIdx.x; i < tiling.units; i += threads) {
    const int rest = divided(i, tiling.by_unit_columns), column = i - rest * tiling.unit_columns;
    const int image = divided(rest, tiling.by_unit_rows), row = rest - image * tiling.unit_rows;
    const bool there = image < tiling.images;  // else it is computed from the first one's region, and dropped
    constexpr int step = STRIDE == 1 ? 2 : 1;  // pixels of z from one unit to the next
    Unit unit{};
    unit.image = static_cast<short>(there ? image : 0x7000);
    if (there) {
      unit.x_pixel = (image * tiling.x_height + 2 * row) * tiling.x_width + 2 * column;
      unit.z_pixel = (image * tiling.z_height + step * row) * tiling.z_width + step * column;
      unit.y = static_cast<short>(row), unit.x = static_cast<short>(column);
    }
    at.units[i] = unit;
    for (int output = 0; output < L::unit_outputs; output++) {
      constexpr int halo = STRIDE == 1 ? 1 : 0;
      const int pixel = unit.z_pixel + (halo + output / 2) * tiling.z_width + halo + output % 2;
      at.own[own_row<STRIDE>(i, output)] = (there ? pixel : z_real) * at.z_bytes;
    }
  }
}

// What the launch before this one leaves.
template <int STRIDE, int STEPS>
__device__ void prepare_coefficients(const ConvolutionBackward& pass, const Layout<STRIDE, STEPS>& at) {
  for (int i = threadIdx.x; i < 3 * pass.convolution.out_channels; i += threads) at.coefficients[i] = __ldcg(pass.coefficients + i);
}

struct TilePlace {
  int image, y, x;  // the first image, and row and column of the first unit
};

__device__ TilePlace place_of(const BackwardTiling& tiling, int tile) {
  const int column = tile % tiling.tiles_x, rest = tile / tiling.tiles_x;
  return {rest / tiling.tiles_y * tiling.images, rest % tiling.tiles_y * tiling.unit_rows, column * tiling.unit_columns};
}

// Where a pixel of a region lies in its map, as an index of pixels, -1 outside.
__device__ int located(int pixel, int width, unsigned by_width, int height, unsigned by_height, int image, int top, int left,
                       int batch, int map_height, int map_width) {
  const int row = divided(pixel, by_width), rest = divided(row, by_height);
  const int x = left + pixel - row * width, y = top + row - rest * height;
  image += rest;
  const bool there = image < batch && x >= 0 && x < map_width && y >= 0 && y < map_height;
  return there ? (image * map_height + y) * map_width + x : -1;
}

// Calls work(where in the region, index of the pixel or -1) for this thread's 16 bytes of some pixels of x.
template <int STRIDE, int STEPS, typename Work>
__device__ void for_x(const BackwardArguments& p, const Layout<STRIDE, STEPS>& at, const TilePlace& tile, Work&& work) {
  constexpr int parts = STEPS * 2;
  const Convolution& c = p.pass.convolution;
  const BackwardTiling& t = p.tiling;
  for (int pixel = threadIdx.x / parts; pixel < t.x_pixels; pixel += threads / parts) {
    const int index = located(pixel, t.x_width, t.by_x_width, t.x_height, t.by_x_height, tile.image, 2 * tile.y - 1,
                              2 * tile.x - 1, c.batch, c.height, c.width);
    work(at.x + pixel * Layout<STRIDE, STEPS>::x_bytes + threadIdx.x % parts * 16, index);
  }
}

template <int STRIDE, int STEPS>
__device__ void load_x(const BackwardArguments& p, const Layout<STRIDE, STEPS>& at, const TilePlace& tile, int first_channel) {
  const Convolution& c = p.pass.convolution;
  const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(c.x) + first_channel + threadIdx.x % (STEPS * 2) * 8;
  for_x<STRIDE, STEPS>(p, at, tile, [&](unsigned char* target, int index) {
    copy_async(target, x + max(index, 0) * c.in_channels, index >= 0);
  });
  close_group();
}

// In place, by the thread that copied; what lies outside of the map stays zero.
template <int STRIDE, int STEPS>
__device__ void normalise_x(const BackwardArguments& p, const Layout<STRIDE, STEPS>& at, const TilePlace& tile) {
  const float* scale = at.in + threadIdx.x % (STEPS * 2) * 8;
  const float* shift = scale + STEPS * step_channels;
  for_x<STRIDE, STEPS>(p, at, tile, [&](unsigned char* target, int index) {
    if (index < 0) return;
    uint4 values = *reinterpret_cast<uint4*>(target);
    uint32_t* pairs = reinterpret_cast<uint32_t*>(&values);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      pairs[i] = pack(relu(low(pairs[i]) * scale[2 * i] + shift[2 * i]), relu(high(pairs[i]) * scale[2 * i + 1] + shift[2 * i + 1]));
    }
    *reinterpret_cast<uint4*>(target) = values;
  });
}

template <int STRIDE, int STEPS>
__device__ void load_dz(const BackwardArguments& p, const Layout<STRIDE, STEPS>& at, const TilePlace& tile) {
  constexpr int batch = STEPS == 1 ? 4 : STEPS == 2 ? 3 : 2;  // pixels at once; more would spill
  constexpr int halo = STRIDE == 1 ? 1 : 0, step = STRIDE == 1 ? 2 : 1;
  const Convolution& c = p.pass.convolution;
  const BackwardTiling& t = p.tiling;
  const int parts = c.out_channels / 8, active = threads - threads % parts;
  if (threadIdx.x >= active) return;
  const int part = threadIdx.x % parts, stride = active / parts, pixels = t.images * t.z_height * t.z_width;
  const uint4* grad = static_cast<const uint4*>(p.pass.grad) + part;
  const uint4* z = static_cast<const uint4*>(p.pass.z) + part;
#pragma unroll 1
  for (int first = threadIdx.x / parts; first < pixels; first += batch * stride) {
    uint4 grads[batch], zs[batch];
    uint32_t there[batch];  // all bits or none
#pragma unroll
    for (int k = 0; k < batch; k++) {
      const int index = located(min(first + k * stride, pixels - 1), t.z_width, t.by_z_width, t.z_height, t.by_z_height, tile.image,
                                step * tile.y - halo, step * tile.x - halo, c.batch, c.out_height, c.out_width);
      there[k] = index >= 0 ? 0xffffffffu : 0;
      grads[k] = index >= 0 ? __ldcg(grad + index * parts) : uint4{};
      zs[k] = index >= 0 ? __ldcg(z + index * parts) : uint4{};
    }
    if (p.pass.masks) {
#pragma unroll
      for (int i = 0; i < 4; i++) {  // two channels
        const float2 scale = reinterpret_cast<const float2*>(at.coefficients + 3 * c.out_channels + part * 8)[i];
        const float2 shift = reinterpret_cast<const float2*>(at.coefficients + 4 * c.out_channels + part * 8)[i];
#pragma unroll
        for (int k = 0; k < batch; k++) {
          const uint32_t v = reinterpret_cast<const uint32_t*>(&zs[k])[i];
          reinterpret_cast<uint32_t*>(&grads[k])[i] &= (low(v) * scale.x + shift.x <= 0 ? 0 : 0xffffu) |
                                                       (high(v) * scale.y + shift.y <= 0 ? 0 : 0xffff0000u);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float2 of[3];
#pragma unroll
      for (int k = 0; k < 3; k++) of[k] = reinterpret_cast<const float2*>(at.coefficients + k * c.out_channels + part * 8)[i];
#pragma unroll
      for (int k = 0; k < batch; k++) {
        uint32_t& g = reinterpret_cast<uint32_t*>(&grads[k])[i];
        const uint32_t v = reinterpret_cast<const uint32_t*>(&zs[k])[i];
        g = there[k] & pack(of[0].x * low(g) + (of[1].x * low(v) + of[2].x), of[0].y * high(g) + (of[1].y * high(v) + of[2].y));
      }
    }
#pragma unroll
    for (int k = 0; k < batch; k++) {
      const int pixel = first + k * stride;
      if (pixel < pixels) *reinterpret_cast<uint4*>(at.dz + pixel * at.z_bytes + part * 16) = grads[k];
    }
  }
}

}  // namespace
}  // namespace odn_fast::separable_conv_cuda
