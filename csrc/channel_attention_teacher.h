// The teacher's map of one image, packed for the products of channel_attention, with its statistics.
// Everything has internal linkage, as in channel_attention_pieces.h.
#pragma once

#include "channel_attention.h"
#include "channel_attention_pieces.h"

namespace odn_fast::channel_attention::ODN_FAST_INSTRUCTION_SET {
namespace {

constexpr double epsilon = 1e-3;  // added to standard deviations

template <typename R>
struct Teacher {  // of one image, packed
  R* rows;        // [panels][P][panel], less their means
  R* mean;        // [padded], as all that follow
  double* exact_mean;  // before it was rounded
  R* scale;       // 1 / (standard deviation + epsilon), or 1
  R* deviation;
  R* gram;        // [panels][padded][panel]
  int64_t channels, padded, panels, positions;
  int64_t step;   // from panel to panel

  Teacher(Workspace& workspace, int64_t channels, int64_t positions)
      : channels(channels), padded(rounded_up(channels, panel<R>)), panels(padded / panel<R>), positions(positions),
        step(positions * panel<R>) {
    rows = workspace.take<R>(panels * step);
    mean = workspace.take<R>(padded);
    exact_mean = workspace.take<double>(padded);
    scale = workspace.take<R>(padded);
    deviation = workspace.take<R>(padded);
    gram = workspace.take<R>(padded * padded);
  }

  // known_mean, known_deviation: of this image, or null.
  template <typename Storage>
  void pack(const Storage* from, const R* known_mean, const R* known_deviation, bool standardize) {
    double sums[panel<R>];
    for (int64_t first = 0; first < padded; first += panel<R>) {
      const int64_t count = smaller(panel<R>, channels - first);
      R* to = rows + first / panel<R> * step;
      if (!known_mean) means<panel_vectors<R>>(from + first, channels, positions, count, exact_mean + first);
      for (int64_t c = 0; c < panel<R>; ++c) {
        mean[first + c] = !known_mean ? static_cast<R>(exact_mean[first + c]) : c < count ? known_mean[first + c] : 0;
      }
      if (known_mean) {
        centre<panel_vectors<R>, itself>(from + first, channels, positions, count, mean + first, to, sums);
      } else {
        centre<panel_vectors<R>, square>(from + first, channels, positions, count, mean + first, to, sums);
      }
      for (int64_t c = 0; c < panel<R>; ++c) {
        const double sum = sums[c] / static_cast<double>(positions);
        if (known_mean) exact_mean[first + c] = mean[first + c] + sum;
        deviation[first + c] = !known_mean ? static_cast<R>(__builtin_sqrt(sum)) : c < count ? known_deviation[first + c] : 0;
        scale[first + c] = standardize ? static_cast<R>(1 / (deviation[first + c] + epsilon)) : 1;
      }
    }
  }

  void pack(const Map& map, int64_t image, const Statistics& known, bool standardize) {
    const R* known_mean = known.mean ? static_cast<const R*>(known.mean) + image * channels : nullptr;
    const R* known_deviation = known.std ? static_cast<const R*>(known.std) + image * channels : nullptr;
    const int64_t offset = image * positions * channels;
    if (map.bfloat16) {
      if constexpr (sizeof(R) == sizeof(float)) {
        pack(static_cast<const Bfloat16*>(map.data) + offset, known_mean, known_deviation, standardize);
      }
    } else {
      pack(static_cast<const R*>(map.data) + offset, known_mean, known_deviation, standardize);
    }
  }

  // Each panel of columns from its diagonal on; what is above is mirrored.
  void take_gram() {
    for (int64_t i = 0; i < panels; ++i) {
      R* columns = gram + i * padded * panel<R>;
      const int64_t diagonal = i * panel<R>;
      for (int64_t begin = 0; begin < positions; begin += group) {
        const R* from = rows + i * step + begin * panel<R>;
        correlate<panel_vectors<R>>(from, step, smaller(group, positions - begin), padded - diagonal, from, begin > 0,
                                    columns + diagonal * panel<R>);
      }
      for (int64_t j = 0; j < diagonal; ++j) {
        const R* mirrored = gram + (j / panel<R> * padded + diagonal) * panel<R> + j % panel<R>;
        for (int64_t c = 0; c < panel<R>; ++c) columns[j * panel<R> + c] = mirrored[c * panel<R>];
      }
    }
  }

  void copy_gram(const R* from) {
    for (int64_t column = 0; column < padded; column += lanes<R>) {
      R* to = gram + column / panel<R> * padded * panel<R> + column % panel<R>;
      for (int64_t j = 0; j < padded; ++j) {
        const int64_t count = j < channels ? channels - column : 0;
        store(to + j * panel<R>, load_up_to(from + j * channels + column, count));
      }
    }
  }
};

}  // namespace
}  // namespace odn_fast::channel_attention::ODN_FAST_INSTRUCTION_SET
