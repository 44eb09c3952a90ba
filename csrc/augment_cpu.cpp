// The CPU kernels of augment, compiled once per instruction set, without contraction: the product is rounded before the
// sum, so that all instruction sets give the same bits.
//
// Rows of bytes are brought into the order of the result first, a band of them at a time, which a cache holds. They are
// then one run of memory, whatever the crop, the flip and the layout were, and are normalised by whole vectors.
#include "augment.h"
#include "workspace.h"

namespace odn_fast::augment::ODN_FAST_INSTRUCTION_SET {
namespace {

using namespace odn_fast::ODN_FAST_INSTRUCTION_SET;

constexpr int64_t band_bytes = 1 << 14;
constexpr int64_t bytes_ahead = 1 << 11;  // less takes less time than memory to answer

int64_t rows_per_band(const Batch& p) { return larger(1, smaller(p.height, band_bytes / (p.width * p.channels))); }

struct Words {
  uint32_t a, b, c, d;
};

// Philox4x32-10 (Salmon et al., 2011).
Words philox(Words counter, uint32_t key_a, uint32_t key_b) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * counter.a, second = uint64_t{0xCD9E8D57} * counter.c;
    counter = {static_cast<uint32_t>(second >> 32) ^ counter.b ^ key_a, static_cast<uint32_t>(second),
               static_cast<uint32_t>(first >> 32) ^ counter.d ^ key_b, static_cast<uint32_t>(first)};
    key_a += 0x9E3779B9;
    key_b += 0xBB67AE85;
  }
  return counter;
}

// Pixel (0, 0) of the result is pixel (row, column) of the image, which may lie outside of it. With `mirror`, columns
// count from the right.
struct Crop {
  int64_t row, column;
  bool mirror;
};

Crop draw(const Batch& p, int64_t sample) {
  if (!p.key) return {0, 0, false};
  const uint64_t seed = p.key[0], epoch = p.key[1], image = sample;
  const Words words = philox({static_cast<uint32_t>(image), static_cast<uint32_t>(image >> 32), static_cast<uint32_t>(epoch),
                              static_cast<uint32_t>(epoch >> 32)},
                             static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint64_t places = 2 * p.padding + 1;
  return {static_cast<int64_t>(words.a * places >> 32) - p.padding, static_cast<int64_t>(words.b * places >> 32) - p.padding,
          p.flip && words.c >> 31};
}

[[gnu::always_inline]] inline void copy_strided(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t pixels,
                                                int64_t channels, int64_t channel_stride, int64_t step) {
  for (int64_t x = 0; x < pixels; ++x) {
    for (int64_t c = 0; c < channels; ++c) to[x * channels + c] = from[c * channel_stride + x * step];
  }
}

// The usual strides as constants, of which the compiler makes shuffles.
void copy_pixels(uint8_t* to, const uint8_t* from, int64_t pixels, int64_t channels, int64_t channel_stride, int64_t step) {
  if (channels == 1) {
    if (step == 1) return void(__builtin_memcpy(to, from, pixels));
    if (step == -1) return copy_strided(to, from, pixels, 1, 0, -1);
    return copy_strided(to, from, pixels, 1, 0, step);
  }
  if (channel_stride == 1 && step == channels) return void(__builtin_memcpy(to, from, pixels * channels));
  if (channels == 3) {
    if (channel_stride == 1 && step == -3) return copy_strided(to, from, pixels, 3, 1, -3);
    if (step == 1) return copy_strided(to, from, pixels, 3, channel_stride, 1);
    if (step == -1) return copy_strided(to, from, pixels, 3, channel_stride, -1);
    return copy_strided(to, from, pixels, 3, channel_stride, step);
  }
  copy_strided(to, from, pixels, channels, channel_stride, step);
}

// Whether rows of the images lie in memory as they do in the result, one after the other.
bool in_order(const Batch& p) {
  return (p.channels == 1 || p.channel_stride == 1) && p.column_stride == p.channels && p.row_stride == p.width * p.channels;
}

// Rows [first, last) of a crop, as (row, column, channel).
void gather(const Batch& p, const uint8_t* image, const Crop& crop, int64_t first, int64_t last, uint8_t* to) {
  if (!p.key && in_order(p)) {
    __builtin_memcpy(to, image + first * p.row_stride, (last - first) * p.row_stride);
    return;
  }
  // Columns [begin, end) of the result show the image.
  const int64_t begin = smaller(larger(crop.mirror ? crop.column : -crop.column, 0), p.width);
  const int64_t end = larger(smaller(p.width + (crop.mirror ? crop.column : -crop.column), p.width), begin);
  const int64_t column = crop.column + (crop.mirror ? p.width - 1 - begin : begin);
  for (int64_t row = first; row < last; ++row, to += p.width * p.channels) {
    const int64_t from = row + crop.row;
    if (from < 0 || from >= p.height || begin == end) {
      __builtin_memset(to, 0, p.width * p.channels);
      continue;
    }
    if (begin > 0) __builtin_memset(to, 0, begin * p.channels);
    copy_pixels(to + begin * p.channels, image + from * p.row_stride + column * p.column_stride, end - begin, p.channels,
                p.channel_stride, crop.mirror ? -p.column_stride : p.column_stride);
    if (end < p.width) __builtin_memset(to + end * p.channels, 0, (p.width - end) * p.channels);
  }
}

template <int64_t count>
struct IntegersOf {
  typedef int32_t type __attribute__((vector_size(4 * count)));
};

// As many bytes as a vector of `R` has lanes.
template <typename R>
inline Vector<R> load_bytes(const uint8_t* from) {
  int32_t bytes[lanes<R>];
  for (int64_t lane = 0; lane < lanes<R>; ++lane) bytes[lane] = from[lane];
  typename IntegersOf<lanes<R>>::type integers;
  __builtin_memcpy(&integers, bytes, sizeof integers);
  return __builtin_convertvector(integers, Vector<R>);
}

// `count` bytes, a multiple of the channels, of which whole vectors can be read.
template <typename Storage>
void normalise(const Batch& p, const uint8_t* from, int64_t count, Storage* to) {
  using R = Real<Storage>;
  constexpr int64_t L = lanes<R>;
  const R* scale = static_cast<const R*>(p.scale);
  const R* shift = static_cast<const R*>(p.shift);
  const int64_t period = p.channels * L;
  for (int64_t begin = 0; begin < count; begin += period) {
    const int64_t whole = smaller(period, (count - begin) / L * L);
    int64_t at = 0;
    for (; at < whole; at += L) store(to + begin + at, load_bytes<R>(from + begin + at) * load(scale + at) + load(shift + at));
    if (at < period && begin + at < count) {
      store_partial(to + begin + at, load_bytes<R>(from + begin + at) * load(scale + at) + load(shift + at), count - begin - at);
    }
  }
}

int64_t workspace(const Batch& p) { return rows_per_band(p) * p.width * p.channels + vector_bytes; }

template <typename Storage>
void run(const Batch& p, int64_t first, int64_t last, void* memory) {
  uint8_t* bytes = static_cast<uint8_t*>(memory);
  const int64_t band = rows_per_band(p), row_size = p.width * p.channels;
  const int64_t images_ahead = p.ahead > 0 ? 1 + bytes_ahead / p.ahead : 1;
  for (int64_t n = first; n < last; ++n) {
    const uint8_t* image = p.images + p.index[n] * p.image_stride;
    if (n + images_ahead < last) {
      const uint8_t* next = p.images + p.index[n + images_ahead] * p.image_stride;
      for (int64_t byte = 0; byte < p.ahead; byte += 64) __builtin_prefetch(next + byte, 0, 2);
    }
    const Crop crop = draw(p, p.index[n]);
    Storage* y = static_cast<Storage*>(p.y) + n * p.height * row_size;
    for (int64_t row = 0; row < p.height; row += band) {
      const int64_t rows = smaller(band, p.height - row);
      gather(p, image, crop, row, row + rows, bytes);
      normalise(p, bytes, rows * row_size, y + row * row_size);
    }
  }
}

template <typename Storage>
constexpr Functions functions{lanes<Real<Storage>>, workspace, run<Storage>};

}  // namespace

extern const Kernels kernels{functions<float>, functions<Bfloat16>, functions<double>};

}  // namespace odn_fast::augment::ODN_FAST_INSTRUCTION_SET
