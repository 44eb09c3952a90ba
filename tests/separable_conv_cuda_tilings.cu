// Prints every layer that the forward kernels have no tile for though `why_not` would take its channels. Needs no GPU.
#include <cstdio>

#include "separable_conv_cuda.cu"

namespace odn_fast::separable_conv_cuda {
namespace {

void check(const char* name, const Device& device, int in_channels, int out_channels, int stride) {
  if (out_channels / (8 * column_tiles(out_channels)) > warps) return;
  const Convolution probe{1, in_channels, out_channels, 64, 64, 64 / stride, 64 / stride, stride};
  if (choose_tiling(probe, device, 8).tiles == 0) return;
  for (int batch : {1, 2, 8, 1000}) {
    for (int height : {1, 2, 3, 4, 5, 7, 14, 33}) {
      for (int width : {1, 2, 3, 4, 5, 7, 14, 33, 224}) {
        const Convolution c{batch, in_channels, out_channels, height, width, (height - 1) / stride + 1, (width - 1) / stride + 1, stride};
        if (choose_tiling(c, device, 1).tiles == 0) {
          std::printf("%s: %d images of %dx%d, %d to %d channels, stride %d\n", name, batch, height, width, in_channels,
                      out_channels, stride);
        }
      }
    }
  }
}

}  // namespace
}  // namespace odn_fast::separable_conv_cuda

int main() {
  using namespace odn_fast::separable_conv_cuda;
  const struct {
    const char* name;
    Device device;
  } devices[] = {{"H200", {132, 232448, 9}}, {"A100", {108, 166912, 8}}, {"A10", {72, 101376, 8}}};
  for (const auto& [name, device] : devices) {
    for (int in_channels = 16; in_channels <= most_channels; in_channels += 16) {
      for (int out_channels = 16; out_channels <= most_channels; out_channels += 16) {
        for (int stride : {1, 2}) check(name, device, in_channels, out_channels, stride);
      }
    }
  }
}
