// The CPU kernels of channel_attention, compiled once per instruction set.
//
// Per image, with Q (P, C_s) and K (P, C_t) less their channels' means q and k, and S = K^T Q:
//   A = softmax over C_t of (S + [P k q^T unless standardised]) scaled by a (C_s) and b (C_t);
//   D = Q + e - K A, the difference, where e = q - k^T A; the loss is the mean of D^2;
//   with n' = 2 / n, the gradient of A is G = -n' (K^T D + P k e^T), that of S is A (G - sum of A G) a b =: B;
//   the gradient of Q is n' D + K B + h Q, where h passes on what changes the standard deviation inside a.
// Less their means, channels that hardly vary lose no digits, and a gradient through the mean needs no term of its own.
//
// Everything is laid out (channels of K or positions, channels of Q), so that vectors lie along Q's channels, the
// softmax runs down columns, and each product is one of two: `correlate`, K^T X, or `project`, X - K B. Both broadcast
// elements of K, which is packed into panels of one cache line per position. Q is taken in blocks of up to four vectors
// of channels, which do not depend on each other.
//
// K^T D has two forms: from D itself, a group of positions at a time, or S - (K^T K) A, which spares products of the
// maps and loses digits to cancellation where D is much smaller than Q. It is used where it is cheaper and D turns out
// not small.
//
// Everything but the table has internal linkage and no function of the standard library is instantiated here.
#include "channel_attention.h"
#include "channel_attention_teacher.h"

namespace odn_fast::channel_attention::ODN_FAST_INSTRUCTION_SET {
namespace {

constexpr double small_difference = 0.125;  // as a share of Q's squares: three bits are lost above, more below

// A block of the student's channels.
template <int vectors, typename R>
struct Block {
  static constexpr int64_t width = vectors * lanes<R>;

  const Teacher<R>& teacher;
  bool standardize;
  Ahead ahead[2] = {};  // the maps of the next image
  R* rows;      // [P][width], less their means
  R* products;  // [padded][width], S
  R* weights;   // [padded][width], A
  R* slopes;    // [padded][width], K^T D, then what the gradient subtracts K times of
  R* part;      // [group][width], of a map
  int64_t first, count;  // channels: `count` from `first` on; the rest of the width is padding
  R mean[width], deviation[width], scale[width], one[width], zero[width] = {};
  double exact_mean[width], squares[width];
  R projected_mean[width];  // of A K
  R shift[width];           // e
  R row_sums[width];        // of D, or of the gradient of A K

  Block(Workspace workspace, const Teacher<R>& teacher, bool standardize)
      : teacher(teacher), standardize(standardize) {
    rows = workspace.take<R>(teacher.positions * width);
    products = workspace.take<R>(teacher.padded * width);
    weights = workspace.take<R>(teacher.padded * width);
    slopes = workspace.take<R>(teacher.padded * width);
    part = workspace.take<R>(group * width);
    for (R& value : one) value = 1;
  }

  // Spreads the reading of the maps of `image` over the two or three passes over positions that every block takes.
  void expect(const Maps& maps, int64_t image) {
    const Map* both[] = {&maps.student, &maps.teacher};
    const int64_t blocks = (maps.student.channels + width - 1) / width;
    const int64_t passes = 2 * blocks * ((teacher.positions + group - 1) / group);
    for (int i = 0; i < 2; ++i) {
      const int64_t bytes = teacher.positions * both[i]->channels * (both[i]->bfloat16 ? 2 : sizeof(R));
      const char* from = static_cast<const char*>(both[i]->data) + image * bytes;
      const int64_t share = bytes * first / (blocks * width);
      ahead[i] = {from + share, from + bytes, bytes / passes + 64};
    }
  }

  template <typename Storage>
  void pack(const Storage* from, int64_t step) {
    means<vectors>(from, step, teacher.positions, count, exact_mean);
    for (int64_t c = 0; c < width; ++c) mean[c] = static_cast<R>(exact_mean[c]);
    centre<vectors, square>(from, step, teacher.positions, count, mean, rows, squares);
    const double positions = static_cast<double>(teacher.positions);
    for (int64_t c = 0; c < width; ++c) {
      deviation[c] = static_cast<R>(__builtin_sqrt(squares[c] / positions));
      scale[c] = static_cast<R>(1 / (__builtin_sqrt(positions) * (standardize ? deviation[c] + epsilon : 1)));
    }
  }

  void for_groups(auto visit) {
    for (int64_t begin = 0; begin < teacher.positions; begin += group) {
      for (Ahead& map : ahead) map.fetch();
      visit(begin, smaller(group, teacher.positions - begin), teacher.rows + begin * panel<R>);
    }
  }

  // S, A, e and the sums of D.
  void attend() {
    for_groups([&](int64_t begin, int64_t positions, const R* k) {
      correlate<vectors>(k, teacher.step, positions, teacher.channels, rows + begin * width, begin > 0, products);
    });
    for (int64_t c = 0; c < width; c += lanes<R>) {
      const Vector<R> scales = load(scale + c), middle = load(mean + c);
      Vector<R> largest = Vector<R>{} - static_cast<R>(__builtin_inf());
      for (int64_t j = 0; j < teacher.channels; ++j) {
        Vector<R> product = load(products + j * width + c);
        if (!standardize) product += static_cast<R>(teacher.positions) * teacher.mean[j] * middle;
        const Vector<R> logit = product * scales * teacher.scale[j];
        store(weights + j * width + c, logit);
        largest = logit > largest ? logit : largest;
      }
      Vector<R> total{};
      for (int64_t j = 0; j < teacher.channels; ++j) {
        const Vector<R> weight = exponential(load(weights + j * width + c) - largest);
        store(weights + j * width + c, weight);
        total += weight;
      }
      const Vector<R> share = static_cast<R>(1) / total;
      for (int64_t j = 0; j < teacher.channels; ++j) {
        store(weights + j * width + c, load(weights + j * width + c) * share);
      }
      for (int64_t j = teacher.channels; j < teacher.padded; ++j) store(weights + j * width + c, Vector<R>{});
    }
    // In double, because differences of means can be far smaller than means, and without the error of the weights' sum.
    double whole[width] = {}, projected[width] = {}, exactly_projected[width] = {};
    for (int64_t j = 0; j < teacher.channels; ++j) {
      const double mean_j = teacher.mean[j], exact_mean_j = teacher.exact_mean[j];
      for (int64_t c = 0; c < width; ++c) {
        const double weight = weights[j * width + c];
        whole[c] += weight;
        projected[c] += weight * mean_j;
        exactly_projected[c] += weight * exact_mean_j;
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      projected_mean[c] = static_cast<R>(projected[c] / whole[c]);
      shift[c] = static_cast<R>(mean[c] - projected[c] / whole[c]);
      row_sums[c] = static_cast<R>((exact_mean[c] - exactly_projected[c] / whole[c]) * teacher.positions);
    }
  }

  // Sum of D^2, from the Gram matrix, with K^T D in `slopes`; negative if D is too small for that.
  double squares_from_gram() {
    project<vectors>(teacher.gram, teacher.padded * panel<R>, teacher.panels, teacher.padded, weights,
                     {products, width, one, zero}, slopes, width);
    R shared[width];
    for (int64_t c = 0; c < width; c += lanes<R>) {
      Vector<R> sum{};
      for (int64_t j = 0; j < teacher.channels; ++j) {
        const int64_t at = j * width + c;
        sum += load(weights + at) * (load(products + at) + load(slopes + at));
      }
      store(shared + c, sum);
    }
    double whole = 0, left = 0, through_means = 0;
    for (int64_t c = 0; c < count; ++c) {
      whole += squares[c];
      left += squares[c] - shared[c];
      through_means += static_cast<double>(shift[c]) * shift[c];
    }
    return left < small_difference * whole ? -1 : left + static_cast<double>(teacher.positions) * through_means;
  }

  // Sum of D^2, from D, with K^T D in `slopes` if a gradient is wanted.
  double squares_of_difference(bool with_gradient) {
    double total[width] = {};
    for_groups([&](int64_t begin, int64_t positions, const R* k) {
      project<vectors>(k, teacher.step, teacher.panels, positions, weights, {rows + begin * width, width, one, shift},
                       part, width);
      if (with_gradient) correlate<vectors>(k, teacher.step, positions, teacher.channels, part, begin > 0, slopes);
      double sum[width];
      sum_over_positions<vectors>(
          part, width, positions, width, [](int64_t, int, Vector<R> x) { return square(x); }, sum);
      for (int64_t c = 0; c < width; ++c) total[c] += sum[c];
    });
    double sum = 0;
    for (int64_t c = 0; c < count; ++c) sum += total[c];
    return sum;
  }

  // K^T X in `slopes` and the sums over positions in `row_sums`, for a map X.
  template <typename Storage>
  void correlate_map(const Storage* from, int64_t step) {
    double total[width] = {};
    for_groups([&](int64_t begin, int64_t positions, const R* k) {
      double sum[width];
      centre<vectors, itself>(from + begin * step, step, positions, count, zero, part, sum);
      correlate<vectors>(k, teacher.step, positions, teacher.channels, part, begin > 0, slopes);
      for (int64_t c = 0; c < width; ++c) total[c] += sum[c];
    });
    for (int64_t c = 0; c < width; ++c) row_sums[c] = static_cast<R>(total[c]);
  }

  // Writes n' D + K B + h Q, where the gradient of A is factor * (slopes + k row_sums^T); a constant added to the latter
  // changes nothing, so the projected mean is taken off k.
  template <typename Storage>
  void write_gradient(R factor, R slope, Storage* to, int64_t step) {
    R alpha[width], beta[width];
    for (int64_t c = 0; c < width; c += lanes<R>) {
      const Vector<R> sums = load(row_sums + c), scales = load(scale + c), middle = load(projected_mean + c);
      Vector<R> dot{}, through_scale{}, through_mean{};
      for (int64_t j = 0; j < teacher.channels; ++j) {
        const int64_t at = j * width + c;
        const Vector<R> gradient = factor * (load(slopes + at) + (teacher.mean[j] - middle) * sums);
        store(slopes + at, gradient);
        dot += load(weights + at) * gradient;
      }
      for (int64_t j = 0; j < teacher.channels; ++j) {
        const int64_t at = j * width + c;
        const Vector<R> weight = load(weights + at);
        const Vector<R> of_product = weight * (load(slopes + at) - dot) * scales * teacher.scale[j];
        through_scale += of_product * load(products + at);
        through_mean += of_product * teacher.mean[j];
        store(slopes + at, slope * weight - of_product);
      }
      for (int64_t j = teacher.channels; j < teacher.padded; ++j) store(slopes + j * width + c, Vector<R>{});
      const Vector<R> deviations = load(deviation + c);
      const Vector<R> variance = static_cast<R>(teacher.positions) * deviations * (deviations + static_cast<R>(epsilon));
      Vector<R> of_scale = through_scale / variance;
      if (!standardize) of_scale = Vector<R>{};
      store(alpha + c, slope - (deviations == 0 ? Vector<R>{} : of_scale));
      store(beta + c, slope * load(shift + c) + (standardize ? Vector<R>{} : through_mean));
    }
    write_projected({rows, width, alpha, beta}, slopes, to, step);
  }

  // Writes A K.
  template <typename Storage>
  void write_projected_map(Storage* to, int64_t step) {
    for (int64_t c = 0; c < width; c += lanes<R>) {
      for (int64_t j = 0; j < teacher.padded; ++j) store(slopes + j * width + c, -load(weights + j * width + c));
    }
    write_projected({nullptr, 0, one, projected_mean}, slopes, to, step);
  }

  // Writes start - K b.
  template <typename Storage>
  void write_projected(Affine<R> start, const R* b, Storage* to, int64_t step) {
    for_groups([&](int64_t begin, int64_t positions, const R* k) {
      Affine<R> here = start;
      if (here.base) here.base += begin * width;
      if constexpr (sizeof(Storage) == sizeof(R)) {
        if (count == width) {
          return project<vectors>(k, teacher.step, teacher.panels, positions, b, here, to + begin * step, step);
        }
      }
      project<vectors>(k, teacher.step, teacher.panels, positions, b, here, part, width);
      for (int64_t position = 0; position < positions; ++position) {
        for (int64_t c = 0; c < width; c += lanes<R>) {
          store_up_to(to + (begin + position) * step + c, load(part + position * width + c), count - c);
        }
      }
    });
  }
};

// Blocks of equal width, so that no block is nearly empty.
template <typename R>
int64_t block_vectors(int64_t channels) {
  const int64_t vectors = (channels + lanes<R> - 1) / lanes<R>, blocks = (vectors + 3) / 4;
  return (vectors + blocks - 1) / blocks;
}

template <typename R>
int64_t workspace_bytes(int64_t student_channels, int64_t teacher_channels, int64_t positions) {
  Workspace workspace{0};
  const Teacher<R> teacher(workspace, teacher_channels, positions);
  const int64_t width = block_vectors<R>(student_channels) * lanes<R>;
  const int64_t block = (positions + 3 * teacher.padded + group) * width * sizeof(R);
  return static_cast<int64_t>(workspace.next) + block + 5 * 64;
}

// Calls visit with a Block of the right width for every block of the student's channels.
template <int vectors, typename R>
void for_blocks(const Teacher<R>& teacher, Workspace workspace, bool standardize, int64_t channels, auto visit) {
  if constexpr (vectors < 4) {
    if (block_vectors<R>(channels) > vectors) {
      return for_blocks<vectors + 1>(teacher, workspace, standardize, channels, visit);
    }
  }
  Block<vectors, R> block(workspace, teacher, standardize);
  for (block.first = 0; block.first < channels; block.first += block.width) {
    block.count = smaller(channels - block.first, block.width);
    visit(block);
  }
}

// Whether K^T D comes cheaper from the Gram matrix than from D, which takes `spared` products of the maps. A known
// matrix must be read and packed; an element costs about as much as 16 multiply-adds.
template <typename R>
bool gram_pays(const Teacher<R>& teacher, int64_t student_channels, bool known, int spared) {
  const double channels = static_cast<double>(teacher.padded);
  const double use = channels / teacher.positions;
  const double half = 0.5 * (1 + 1.0 / teacher.panels);  // of a symmetric matrix
  const double take = (known ? 16.0 / teacher.positions : half) * channels / student_channels;
  return use + take < spared;
}

template <typename R, typename Storage>
void loss(const Loss& p, int64_t first, int64_t last, Workspace workspace) {
  const Maps& maps = p.maps;
  const int64_t channels = maps.student.channels;
  Teacher<R> teacher(workspace, maps.teacher.channels, maps.positions);
  const R* gram = static_cast<const R*>(maps.statistics.gram);
  const bool with_gram = gram_pays(teacher, channels, gram, p.gradient ? 2 : 1);
  for (int64_t image = first; image < last; ++image) {
    teacher.pack(maps.teacher, image, maps.statistics, maps.standardize);
    if (with_gram && gram) teacher.copy_gram(gram + image * teacher.channels * teacher.channels);
    if (with_gram && !gram) teacher.take_gram();
    const int64_t offset = image * maps.positions * channels;
    const Storage* student = static_cast<const Storage*>(maps.student.data) + offset;
    double sum = 0;
    for_blocks<1>(teacher, workspace, maps.standardize, channels, [&](auto& block) {
      if (image + 1 < last) block.expect(maps, image + 1);
      block.pack(student + block.first, channels);
      block.attend();
      double squares = with_gram ? block.squares_from_gram() : -1;
      if (squares < 0) squares = block.squares_of_difference(p.gradient);
      sum += squares;
      if (!p.gradient) return;
      const R slope = static_cast<R>(p.slope);
      block.write_gradient(-slope, slope, static_cast<Storage*>(p.gradient) + offset + block.first, channels);
    });
    p.sums[image] = sum;
  }
}

template <typename R, typename Storage>
void project(const Projection& p, int64_t first, int64_t last, Workspace workspace) {
  const Maps& maps = p.maps;
  const int64_t channels = maps.student.channels;
  Teacher<R> teacher(workspace, maps.teacher.channels, maps.positions);
  for (int64_t image = first; image < last; ++image) {
    teacher.pack(maps.teacher, image, maps.statistics, maps.standardize);
    const int64_t offset = image * maps.positions * channels;
    const Storage* student = static_cast<const Storage*>(maps.student.data) + offset;
    for_blocks<1>(teacher, workspace, maps.standardize, channels, [&](auto& block) {
      block.pack(student + block.first, channels);
      block.attend();
      Storage* to = static_cast<Storage*>(p.result) + offset + block.first;
      if (!p.grad) return block.write_projected_map(to, channels);
      block.correlate_map(static_cast<const Storage*>(p.grad) + offset + block.first, channels);
      block.write_gradient(1, 0, to, channels);
    });
  }
}

template <typename R>
void statistics(const TeacherPass& p, int64_t first, int64_t last, void* memory) {
  Workspace workspace{reinterpret_cast<uintptr_t>(memory)};
  const int64_t channels = p.teacher.channels;
  Teacher<R> teacher(workspace, channels, p.positions);
  for (int64_t image = first; image < last; ++image) {
    teacher.pack(p.teacher, image, {}, false);
    teacher.take_gram();
    for (int64_t j = 0; j < channels; ++j) {
      static_cast<R*>(p.mean)[image * channels + j] = teacher.mean[j];
      static_cast<R*>(p.std)[image * channels + j] = teacher.deviation[j];
      R* row = static_cast<R*>(p.gram) + (image * channels + j) * channels;
      for (int64_t i = 0; i < channels; ++i) {
        row[i] = teacher.gram[(i / panel<R> * teacher.padded + j) * panel<R> + i % panel<R>];
      }
    }
  }
}

template <typename R>
void loss(const Loss& p, int64_t first, int64_t last, void* memory) {
  const Workspace workspace{reinterpret_cast<uintptr_t>(memory)};
  if constexpr (sizeof(R) == sizeof(float)) {
    if (p.maps.student.bfloat16) return loss<R, Bfloat16>(p, first, last, workspace);
  }
  loss<R, R>(p, first, last, workspace);
}

template <typename R>
void project(const Projection& p, int64_t first, int64_t last, void* memory) {
  const Workspace workspace{reinterpret_cast<uintptr_t>(memory)};
  if constexpr (sizeof(R) == sizeof(float)) {
    if (p.maps.student.bfloat16) return project<R, Bfloat16>(p, first, last, workspace);
  }
  project<R, R>(p, first, last, workspace);
}

}  // namespace

extern const Kernels kernels{
    {workspace_bytes<float>, loss<float>, project<float>, statistics<float>},
    {workspace_bytes<double>, loss<double>, project<double>, statistics<double>},
};

}  // namespace odn_fast::channel_attention::ODN_FAST_INSTRUCTION_SET
