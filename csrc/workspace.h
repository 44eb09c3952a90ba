// The memory a kernel works in, and the small arithmetic of laying it out. Internal linkage, as in vectors.h.
#pragma once

#include "vectors.h"

namespace odn_fast::ODN_FAST_INSTRUCTION_SET {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Carves arrays out of memory from the address `next` on; from zero on, it measures how much they need.
struct Workspace {
  uintptr_t next;

  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next);
    next += rounded_up(count * sizeof(T), 64);
    return array;
  }
};

// Memory that will be read soon, asked for a piece at a time while something else is computed.
struct Ahead {
  const char* next;
  const char* end;
  int64_t piece;  // bytes

  void fetch() {
    for (const char* stop = end - next < piece ? end : next + piece; next < stop; next += 64) __builtin_prefetch(next, 0, 2);
  }
};

template <typename Real>
inline void clear(Real* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = 0;
}

}  // namespace
}  // namespace odn_fast::ODN_FAST_INSTRUCTION_SET
