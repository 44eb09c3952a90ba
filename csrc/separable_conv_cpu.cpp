// The CPU kernels of separable_conv, compiled once per instruction set.
#include "separable_conv_backward.h"

namespace odn_fast::separable_conv::ODN_FAST_INSTRUCTION_SET {
namespace {

template <typename Real>
void pack_depthwise(int64_t channels, const void* weight, void* packed) {
  constexpr int64_t L = lanes<Real>;
  Real* to = static_cast<Real*>(packed);
  for (int64_t first = 0; first < channels; first += L) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      for (int64_t channel = first; channel < first + L; ++channel) {
        *to++ = channel < channels ? static_cast<const Real*>(weight)[channel * 9 + tap] : Real{};
      }
    }
  }
}

template <typename Real, typename V>
inline V activate(V value, Activation activation) {
  switch (activation) {
    case Activation::none: return value;
    case Activation::relu: return relu(value);
    case Activation::relu6: {
      const V positive = relu(value);
      return positive > 6 ? broadcast(Real{6}) : positive;
    }
    case Activation::hard_swish: {
      const V gate = relu(value + 3);
      return value * (gate > 6 ? broadcast(Real{6}) : gate) / 6;
    }
    case Activation::silu: return value / (1 + exponential(-value));
  }
  return value;
}

template <typename Storage>
class ForwardUnit {
 public:
  using R = Real<Storage>;
  using O = Operand<Storage>;
  static constexpr int64_t L = lanes<R>;

  ForwardUnit(const Forward& p, Workspace& workspace)
      : p_(p),
        layer_(p.layer),
        gather_(p.layer, workspace, 0),
        out_(workspace.take<R>(rows_per_band(p.layer) * p.layer.out_width * padded<R>(p.layer.out_channels))),
        operands_(workspace, rows_per_band(p.layer) * p.layer.out_width, p.layer.in_channels),
        sums_(workspace.take<R>(2 * padded<R>(p.layer.out_channels))) {}

  void clear_borders() { gather_.clear_borders(); }

  void run(const Range& range, double* sums) {
    const int64_t outputs = layer_.out_channels;
    gather_.begin(range.image, range.first);
    for (int64_t row = range.first; row < range.last; row += rows_per_band(layer_)) {
      const int64_t last = smaller(row + rows_per_band(layer_), range.last), pixels = (last - row) * layer_.out_width;
      gather_.rows(row, last, static_cast<const R*>(p_.dw_bias));
      ahead_ = gather_.ahead(tiles_of<R>(pixels, outputs));
      if (p_.act_dw != Activation::none) {
        const int64_t vectors = blocks_of<R>(layer_.in_channels) * pixels;
        for (R* at = gather_.band(); at < gather_.band() + vectors * L; at += L) store(at, activate<R>(load(at), p_.act_dw));
      }
      const int64_t offset = (range.image * layer_.out_height + row) * layer_.out_width * outputs;
      clear(sums_, 2 * padded<R>(outputs));
      if (outputs % L == 0 && !p_.residual && p_.act_pw <= Activation::relu6) {
        band_in_registers(pixels, offset, sums);
      } else {
        band_in_cache(pixels, offset, sums);
      }
      if (sums) {
        for (int64_t i = 0; i < 2 * padded<R>(outputs); ++i) sums[i] += sums_[i];
      }
    }
  }

 private:
  // Sums, clamps and stores the tiles of the product straight from registers. With every tile, a piece of what the next
  // band reads is asked for.
  void band_in_registers(int64_t pixels, int64_t offset, bool statistics) {
    const int64_t outputs = layer_.out_channels, blocks = outputs / L;
    Storage* z = static_cast<Storage*>(p_.z) + offset;
    R* band_sums = sums_;
    Ahead* ahead = &ahead_;
    const auto multiply = [&](const auto& done) {
      product(pixels, operands_.by_row(gather_.band(), pixels, layer_.in_channels), pixels * L,
              static_cast<const O*>(p_.pw), layer_.in_channels, outputs, static_cast<const R*>(p_.start), done);
    };
    if (statistics) {
      multiply([=]<int M, int J>(int64_t pixel, int64_t block, const Vector<R>(&values)[M][J]) {
        ahead->fetch();
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) {
          R* of_block = band_sums + (block + j) * L;
          Vector<R> sum = values[0][j], squares = values[0][j] * values[0][j];
#pragma GCC unroll 16
          for (int m = 1; m < M; ++m) {
            sum += values[m][j];
            squares += values[m][j] * values[m][j];
          }
          store(of_block, load(of_block) + sum);
          store(of_block + blocks * L, load(of_block + blocks * L) + squares);
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) store(z + (pixel + m) * outputs + (block + j) * L, values[m][j]);
        }
      });
      return;
    }
    const R infinity = __builtin_huge_val();
    const Vector<R> lowest = broadcast(p_.act_pw == Activation::none ? -infinity : R{0});
    const Vector<R> highest = broadcast(p_.act_pw == Activation::relu6 ? R{6} : infinity);
    multiply([=]<int M, int J>(int64_t pixel, int64_t block, const Vector<R>(&values)[M][J]) {
      ahead->fetch();
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const Vector<R> low = values[m][j] < lowest ? lowest : values[m][j];  // NaN stays NaN
          store(z + (pixel + m) * outputs + (block + j) * L, low > highest ? highest : low);
        }
      }
    });
  }

  // The same by way of a buffer, for everything else: a residual, other activations, channels that fill no block.
  void band_in_cache(int64_t pixels, int64_t offset, bool statistics) {
    const int64_t outputs = layer_.out_channels;
    product_into(out_, pixels * L, pixels, operands_.by_row(gather_.band(), pixels, layer_.in_channels), pixels * L,
                 static_cast<const O*>(p_.pw), layer_.in_channels, outputs, static_cast<const R*>(p_.start));
    for (int64_t channel = 0; channel < outputs; channel += L) {
      const R* from = out_ + channel * pixels;
      Storage* z = static_cast<Storage*>(p_.z) + offset + channel;
      const Storage* residual = p_.residual ? static_cast<const Storage*>(p_.residual) + offset + channel : nullptr;
      Vector<R> sum{}, squares{};
      with_block<Storage>(outputs - channel, [&](auto of_block) {
        for (int64_t pixel = 0; pixel < pixels; ++pixel) {
          Vector<R> value = load(from + pixel * L);
          if (statistics) {
            sum += value;
            squares += value * value;
          }
          if (residual) value += of_block.read(residual + pixel * outputs);
          of_block.write(z + pixel * outputs, activate<R>(value, p_.act_pw));
        }
      });
      store(sums_ + channel, sum);
      store(sums_ + padded<R>(outputs) + channel, squares);
    }
  }

  const Forward& p_;
  const Layer& layer_;
  Gather<Storage> gather_;
  R* out_;
  Operands<Storage> operands_;
  Ahead ahead_{};
  R* sums_;
};

template <typename Storage>
int64_t forward_workspace(const Forward& p) {
  Workspace workspace{0};
  ForwardUnit<Storage>(p, workspace);
  return static_cast<int64_t>(workspace.next);
}

template <typename Storage>
void forward(const Forward& p, int64_t first_unit, int64_t last_unit, void* memory, double* sums) {
  Workspace workspace{reinterpret_cast<uintptr_t>(memory)};
  ForwardUnit<Storage> unit(p, workspace);
  unit.clear_borders();
  for (int64_t index = first_unit; index < last_unit; ++index) unit.run(range_of(p.layer, index), sums);
}

template <typename Real>
void add_chunks(int64_t chunks, int64_t size, const void* of_chunks, double* sums) {
  const Real* from = static_cast<const Real*>(of_chunks);
  for (int64_t chunk = 0; chunk < chunks; ++chunk, from += size) {
    for (int64_t i = 0; i < size; ++i) sums[i] += static_cast<double>(from[i]);
  }
}

template <typename Storage>
constexpr Functions functions{
    lanes<Real<Storage>>,
    pointwise_bytes<Real<Storage>, Operand<Storage>>,
    pack_depthwise<Real<Storage>>,
    pack_pointwise<Real<Storage>, Operand<Storage>>,
    forward_workspace<Storage>,
    forward<Storage>,
    backward_workspace<Storage>,
    backward<Storage>,
    add_chunks<Real<Storage>>,
};

}  // namespace

extern const Kernels kernels{functions<float>, functions<Bfloat16>, functions<double>};

}  // namespace odn_fast::separable_conv::ODN_FAST_INSTRUCTION_SET
