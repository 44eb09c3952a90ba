// The CPU kernels of exit_heads, compiled once per instruction set.
//
// Everything but the table has internal linkage and no function of the standard library is instantiated here:
// the linker keeps one copy of a shared inline function, and an AVX-512 copy would crash an older processor.
#include "exit_heads.h"

namespace odn_fast::exit_heads::ODN_FAST_INSTRUCTION_SET {
namespace {

struct Bfloat16 {
  uint16_t bits;
};

inline float read(float value) { return value; }
inline double read(double value) { return value; }
inline float read(Bfloat16 value) { return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16); }

inline void write(float* to, float value) { *to = value; }
inline void write(double* to, double value) { *to = value; }
inline void write(Bfloat16* to, float value) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

inline float exponential(float value) { return __builtin_expf(value); }
inline double exponential(double value) { return __builtin_exp(value); }
inline float logarithm(float value) { return __builtin_logf(value); }
inline double logarithm(double value) { return __builtin_log(value); }

// Long sums are taken in groups, whose sums are added in double: the rounding error stays that of a short sum.
constexpr int64_t group = 64;

// Adjacent channels (channels_last): sum over rows of C. Eight rows are added as a tree, so that memory is read
// in long runs and `part` is touched once per eight rows.
template <typename Storage, typename Real>
void pool_rows(const ForwardHead& head, const Storage* image, Real* sum) {
  constexpr int64_t block = 512;  // channels at a time; fewer than 512 are one pass over memory
  Real part[block];
  double total[block];
  const int64_t stride = head.position_stride;
  for (int64_t first = 0; first < head.channels; first += block) {
    const int64_t channels = head.channels - first < block ? head.channels - first : block;
    for (int64_t c = 0; c < channels; ++c) total[c] = 0;
    for (int64_t begin = 0; begin < head.positions; begin += group) {
      const int64_t end = head.positions - begin < group ? head.positions : begin + group;
      for (int64_t c = 0; c < channels; ++c) part[c] = 0;
      int64_t position = begin;
      for (; position + 8 <= end; position += 8) {
        const Storage* row = image + first + position * stride;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const Storage* x = row + c;
          part[c] += ((read(x[0]) + read(x[stride])) + (read(x[2 * stride]) + read(x[3 * stride]))) +
                     ((read(x[4 * stride]) + read(x[5 * stride])) + (read(x[6 * stride]) + read(x[7 * stride])));
        }
      }
      for (; position < end; ++position) {
        const Storage* row = image + first + position * stride;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) part[c] += read(row[c]);
      }
      for (int64_t c = 0; c < channels; ++c) total[c] += part[c];
    }
    for (int64_t c = 0; c < channels; ++c) sum[first + c] = static_cast<Real>(total[c]);
  }
}

// Adjacent positions (NCHW): sum each channel's plane in lanes, then add the lanes as a tree.
template <typename Storage, typename Real>
void pool_planes(const ForwardHead& head, const Storage* image, Real* sum) {
  constexpr int64_t lanes = 16;
  for (int64_t c = 0; c < head.channels; ++c) {
    const Storage* plane = image + c * head.channel_stride;
    double total = 0;
    int64_t position = 0;
    while (position + lanes <= head.positions) {
      Real lane[lanes] = {};
      for (int64_t i = 0; i < group && position + lanes <= head.positions; ++i, position += lanes) {
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) lane[l] += read(plane[position + l]);
      }
      total += (((lane[0] + lane[8]) + (lane[4] + lane[12])) + ((lane[2] + lane[10]) + (lane[6] + lane[14]))) +
               (((lane[1] + lane[9]) + (lane[5] + lane[13])) + ((lane[3] + lane[11]) + (lane[7] + lane[15])));
    }
    Real rest = 0;
    for (; position < head.positions; ++position) rest += read(plane[position]);
    sum[c] = static_cast<Real>(total + rest);
  }
}

template <typename Storage, typename Real>
void pool(const ForwardHead& head, int64_t image, Real* pooled) {
  const Storage* feature = static_cast<const Storage*>(head.feature) + image * head.image_stride;
  if (head.position_stride == 1 && (head.channel_stride != 1 || head.channels == 1)) {
    pool_planes(head, feature, pooled);
  } else {
    pool_rows(head, feature, pooled);
  }
  const Real positions = static_cast<Real>(head.positions);
  for (int64_t c = 0; c < head.channels; ++c) pooled[c] /= positions;  // 0 / 0 = NaN for an empty map, as a mean
}

// Logits of up to four images at once, so that a weight is read once for the four.
template <typename Real>
void linear(const ForwardHead& head, int64_t classes, int64_t images, const Real* pooled, int64_t width, Real* logits) {
  const Real* bias = static_cast<const Real*>(head.bias);
  for (int64_t k = 0; k < classes; ++k) {
    const Real* weight = static_cast<const Real*>(head.weight) + k * head.channels;
    if (images == 4) {
      Real sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
      for (int64_t c = 0; c < head.channels; ++c) {
        sum0 += weight[c] * pooled[c];
        sum1 += weight[c] * pooled[c + width];
        sum2 += weight[c] * pooled[c + 2 * width];
        sum3 += weight[c] * pooled[c + 3 * width];
      }
      logits[k] = sum0 + bias[k];
      logits[k + classes] = sum1 + bias[k];
      logits[k + 2 * classes] = sum2 + bias[k];
      logits[k + 3 * classes] = sum3 + bias[k];
      continue;
    }
    for (int64_t image = 0; image < images; ++image) {
      Real sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < head.channels; ++c) sum += weight[c] * pooled[c + image * width];
      logits[k + image * classes] = sum + bias[k];
    }
  }
}

// Loss and prediction of one image; its logits become the gradient of the mean loss with respect to them.
template <typename Real>
void classify(const Forward& p, int64_t target, Real* logits, double* loss, int64_t* correct) {
  int64_t largest = 0;
  bool not_a_number = false;
  for (int64_t k = 0; k < p.classes; ++k) {
    if (logits[k] > logits[largest]) largest = k;
    not_a_number |= logits[k] != logits[k];
  }
  const Real shift = logits[largest], target_logit = logits[target];
  Real sum = 0;
  for (int64_t k = 0; k < p.classes; ++k) {
    logits[k] = exponential(logits[k] - shift);
    sum += logits[k];
  }
  const Real scale = 1 / sum, batch = static_cast<Real>(p.batch);
  for (int64_t k = 0; k < p.classes; ++k) logits[k] = (logits[k] * scale - (k == target)) / batch;
  *loss = logarithm(sum) - (target_logit - shift);
  *correct = !not_a_number && largest == target;
}

template <typename Storage, typename Real>
void forward(const Forward& p, int64_t first_image, int64_t last_image) {
  for (int64_t depth = 0; depth < p.depths; ++depth) {
    const ForwardHead& head = p.heads[depth];
    for (int64_t image = first_image; image < last_image;) {
      const int64_t images = last_image - image < 4 ? last_image - image : 4;
      Real* pooled = static_cast<Real*>(p.pooled) + image * p.width + head.column;
      Real* logits = static_cast<Real*>(p.logit_gradients) + (depth * p.batch + image) * p.classes;
      for (int64_t i = 0; i < images; ++i) pool<Storage>(head, image + i, pooled + i * p.width);
      linear(head, p.classes, images, pooled, p.width, logits);
      for (int64_t i = 0; i < images; ++i, ++image) {
        const int64_t at = depth * p.batch + image;
        classify(p, p.target[image], logits + i * p.classes, p.losses + at, p.correct + at);
      }
    }
  }
}

// sum[c] = sum over i < terms of factor[i * factor_stride] * row_i[c], four rows at a time; at most channels_per_block
// channels.
template <typename Real>
void weighted_rows(int64_t terms, const Real* factor, int64_t factor_stride, const Real* rows, int64_t row_stride,
                   int64_t channels, Real* sum) {
  Real part[channels_per_block];
  double total[channels_per_block] = {};
  for (int64_t begin = 0; begin < terms; begin += group) {
    const int64_t end = terms - begin < group ? terms : begin + group;
    for (int64_t c = 0; c < channels; ++c) part[c] = 0;
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      const Real* row = rows + i * row_stride;
      const Real factor0 = factor[i * factor_stride], factor1 = factor[(i + 1) * factor_stride];
      const Real factor2 = factor[(i + 2) * factor_stride], factor3 = factor[(i + 3) * factor_stride];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        part[c] += (factor0 * row[c] + factor1 * row[c + row_stride]) +
                   (factor2 * row[c + 2 * row_stride] + factor3 * row[c + 3 * row_stride]);
      }
    }
    for (; i < end; ++i) {
      const Real* row = rows + i * row_stride;
      const Real factor0 = factor[i * factor_stride];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) part[c] += factor0 * row[c];
    }
    for (int64_t c = 0; c < channels; ++c) total[c] += part[c];
  }
  for (int64_t c = 0; c < channels; ++c) sum[c] = static_cast<Real>(total[c]);
}

template <typename Storage, typename Real>
void backward(const Backward& p, const BackwardHead& head, int64_t first_channel, int64_t last_channel) {
  const int64_t channels = last_channel - first_channel;
  const Real grad_loss = static_cast<const Real*>(p.grad_losses)[head.depth];
  const Real* logit_gradients = static_cast<const Real*>(p.logit_gradients) + head.depth * p.batch * p.classes;
  Real sum[channels_per_block];

  const Real* weight = static_cast<const Real*>(head.weight) + first_channel;
  const Real scale = grad_loss / static_cast<Real>(head.positions);
  Storage* pooled_gradient = static_cast<Storage*>(head.pooled_gradient) + first_channel;
  for (int64_t image = 0; image < p.batch; ++image) {
    weighted_rows(p.classes, logit_gradients + image * p.classes, 1, weight, head.channels, channels, sum);
    for (int64_t c = 0; c < channels; ++c) write(pooled_gradient + image * head.channels + c, scale * sum[c]);
  }

  const Real* pooled = static_cast<const Real*>(p.pooled) + head.column + first_channel;
  Real* weight_gradient = static_cast<Real*>(head.weight_gradient) + first_channel;
  for (int64_t k = 0; k < p.classes; ++k) {
    weighted_rows(p.batch, logit_gradients + k, p.classes, pooled, p.width, channels, sum);
    for (int64_t c = 0; c < channels; ++c) weight_gradient[k * head.channels + c] = grad_loss * sum[c];
  }

  if (first_channel == 0) {
    Real* bias_gradient = static_cast<Real*>(p.bias_gradients) + head.depth * p.classes;
    for (int64_t k = 0; k < p.classes; ++k) {
      double total = 0;
      for (int64_t begin = 0; begin < p.batch; begin += group) {
        const int64_t end = p.batch - begin < group ? p.batch : begin + group;
        Real part = 0;
        for (int64_t image = begin; image < end; ++image) part += logit_gradients[image * p.classes + k];
        total += part;
      }
      bias_gradient[k] = grad_loss * static_cast<Real>(total);
    }
  }
}

}  // namespace

extern const Kernels kernels{
    {forward<float, float>, backward<float, float>},
    {forward<Bfloat16, float>, backward<Bfloat16, float>},
    {forward<double, double>, backward<double, double>},
};

}  // namespace odn_fast::exit_heads::ODN_FAST_INSTRUCTION_SET
