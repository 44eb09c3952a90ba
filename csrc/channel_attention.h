// Channel attention on the CPU: what the kernels are told, and the table through which they are launched.
// Free of torch headers, so that each kernel can be compiled for its own instruction set.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace odn_fast::channel_attention {

// Real, the type of arithmetic, is double where a map is double and float otherwise.

struct Map {
  const void* data;   // (N, P, C), channels_last: bfloat16 if `bfloat16`, else Real
  int64_t channels;   // C
  bool bfloat16;
};

struct Statistics {  // of the teacher, Real; all null where they are not given
  const void* mean;  // (N, C_t), over positions
  const void* std;   // (N, C_t), over positions
  const void* gram;  // (N, C_t, C_t), of rows less their mean
};

struct Maps {
  Map student;             // Q
  Map teacher;             // K
  Statistics statistics;
  int64_t positions;       // P
  bool standardize;        // rows, for the weights
};

struct Loss {
  Maps maps;
  double slope;       // 2 / (N C_s P), the derivative of the loss by a squared difference's root
  void* gradient;     // (N, P, C_s), stored as the student is, out; null if not wanted
  double* sums;       // (N), sum of squared differences per image, out
};

struct Projection {
  Maps maps;
  const void* grad;   // (N, P, C_s), stored as the student is; null to project, else to differentiate
  void* result;       // (N, P, C_s), stored as the student is, out: the projected map, or the student's gradient
};

struct TeacherPass {
  Map teacher;
  int64_t positions;
  void* mean;  // Statistics, out
  void* std;
  void* gram;
};

// Each works on images [first, last), which do not depend on each other, in a workspace of its own: workspace_bytes,
// aligned to 64, whatever they hold.
struct Functions {
  int64_t (*workspace_bytes)(int64_t student_channels, int64_t teacher_channels, int64_t positions);
  void (*loss)(const Loss&, int64_t first, int64_t last, void* workspace);
  void (*project)(const Projection&, int64_t first, int64_t last, void* workspace);
  void (*statistics)(const TeacherPass&, int64_t first, int64_t last, void* workspace);
};

struct Kernels {  // by Real
  Functions float32;
  Functions float64;
};

ODN_FAST_KERNEL_TABLE(Kernels, kernels);

}  // namespace odn_fast::channel_attention
