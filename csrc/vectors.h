// Vectors of the instruction set a kernel file is compiled for, and how they are read and written.
//
// GCC's vector extensions, so that one source serves every instruction set. Everything has internal linkage: the
// linker keeps one copy of a shared inline function, and an AVX-512 copy would crash an older processor.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace odn_fast::ODN_FAST_INSTRUCTION_SET {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int vector_registers = 32;
#else
constexpr int vector_registers = 16;
#endif

struct Bfloat16 {
  uint16_t bits;
};

template <typename Real>
struct VectorOf {
  typedef Real type __attribute__((vector_size(vector_bytes)));
};
template <typename Real>
using Vector = typename VectorOf<Real>::type;
template <typename Real>
constexpr int64_t lanes = vector_bytes / sizeof(Real);

// Channels come in blocks of as many as a vector has lanes.
template <typename Real>
constexpr int64_t blocks_of(int64_t channels) {
  return (channels + lanes<Real> - 1) / lanes<Real>;
}

template <typename Real>
constexpr int64_t padded(int64_t channels) {
  return blocks_of<Real>(channels) * lanes<Real>;
}

using Bits = Vector<uint32_t>;
typedef uint16_t HalfBits __attribute__((vector_size(vector_bytes / 2)));

// The type arithmetic is done in for what is stored as `Storage`.
template <typename Storage>
struct RealOf {
  using type = Storage;
};
template <>
struct RealOf<Bfloat16> {
  using type = float;
};
template <typename Storage>
using Real = typename RealOf<Storage>::type;

template <typename Real>
inline Vector<Real> broadcast(Real value) {
  return Vector<Real>{} + value;
}

inline Vector<float> load(const float* from) {
  Vector<float> value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline Vector<double> load(const double* from) {
  Vector<double> value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// The conversions of AVX-512 are named, because GCC 12 takes the long way around them.
inline Vector<float> load(const Bfloat16* from) {
  HalfBits halves;
  __builtin_memcpy(&halves, from, sizeof halves);
#if defined(__AVX512F__)
  const Bits bits = reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(halves)));
#else
  const Bits bits = __builtin_convertvector(halves, Bits);
#endif
  return reinterpret_cast<Vector<float>>(bits << 16);
}

inline void store(float* to, Vector<float> value) { __builtin_memcpy(to, &value, sizeof value); }
inline void store(double* to, Vector<double> value) { __builtin_memcpy(to, &value, sizeof value); }

// The bits of bfloat16 values in the upper half of every lane: rounded to nearest even; NaN stays NaN.
inline Bits rounded_bits(Vector<float> value) {
  const Bits bits = reinterpret_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  return value == value ? rounded : Bits{} + 0x7fc00000;
}

inline void store(Bfloat16* to, Vector<float> value) {
#if defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh(value);
#elif defined(__AVX512F__)
  const __m256i halves = _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(rounded_bits(value) >> 16));
#else
  const HalfBits halves = __builtin_convertvector(rounded_bits(value) >> 16, HalfBits);
#endif
  __builtin_memcpy(to, &halves, sizeof halves);
}

// A value that is loaded whatever comes of it. GCC folds a load into the selection that follows it, and a masked load
// waits for its mask, that is for other loads: from memory that takes twice as long.
template <typename V>
inline V loaded(V value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
  return value;
}

// The first `count` lanes, fewer than all of them; the others read as zero.
template <typename Storage>
inline auto load_partial(const Storage* from, int64_t count) {
  Storage part[lanes<Real<Storage>>] = {};
  for (int64_t lane = 0; lane < count; ++lane) part[lane] = from[lane];
  return load(part);
}

template <typename Storage, typename V>
inline void store_partial(Storage* to, V value, int64_t count) {
  Storage part[lanes<Real<Storage>>];
  store(part, value);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = part[lane];
}

// All lanes, or the first `count` of them.
template <typename Storage>
inline auto load_up_to(const Storage* from, int64_t count) {
  return count >= lanes<Real<Storage>> ? load(from) : load_partial(from, count);
}

template <typename Storage, typename V>
inline void store_up_to(Storage* to, V value, int64_t count) {
  if (count >= lanes<Real<Storage>>) {
    store(to, value);
  } else {
    store_partial(to, value, count);
  }
}

// Adds every lane to a sum of its own, in double.
template <typename V>
inline void add_lanes(double* sums, V value) {
  constexpr int64_t count = sizeof(V) / sizeof(value[0]);
  decltype(value[0] + 0) part[count];
  __builtin_memcpy(part, &value, sizeof value);
  for (int64_t lane = 0; lane < count; ++lane) sums[lane] += part[lane];
}

// How a block of channels is read and written: whole, or its first `count` lanes at the end of a row of channels.
template <typename Storage>
struct WholeBlock {
  auto read(const Storage* from) const { return load(from); }
  void write(Storage* to, Vector<Real<Storage>> value) const { store(to, value); }
};

template <typename Storage>
struct PartOfBlock {
  int64_t count;
  auto read(const Storage* from) const { return load_partial(from, count); }
  void write(Storage* to, Vector<Real<Storage>> value) const { store_partial(to, value, count); }
};

// Calls work(WholeBlock) or work(PartOfBlock), so that loops inside are compiled for each.
template <typename Storage, typename Work>
inline void with_block(int64_t channels_left, Work&& work) {
  if (channels_left >= lanes<Real<Storage>>) {
    work(WholeBlock<Storage>{});
  } else {
    work(PartOfBlock<Storage>{channels_left});
  }
}

// The type of the factors in products of what is stored as `Storage`: bfloat16 pairs where the processor multiplies them.
#if defined(__AVX512BF16__)
template <typename Storage>
struct OperandOf {
  using type = Storage;
};
#else
template <typename Storage>
struct OperandOf {
  using type = Real<Storage>;
};
#endif
template <typename Storage>
using Operand = typename OperandOf<Storage>::type;

// exp(x) to the last bits of float: 2^n times a polynomial on [-ln(2)/2, ln(2)/2].
inline Vector<float> exponential(Vector<float> x) {
  typedef uint32_t Integers __attribute__((vector_size(vector_bytes)));  // wraps around where the result is not used
  const Vector<float> shifted = x * 1.442695041f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are an integer
  const Vector<float> n = shifted - 12582912.0f;
  const Vector<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers exponent = reinterpret_cast<Integers>(shifted) << 23;
  const Vector<float> value = reinterpret_cast<Vector<float>>(reinterpret_cast<Integers>(p) + exponent);
  const Vector<float> finite = x < -87.3f ? Vector<float>{} : value;
  return x > 88.7f ? broadcast(__builtin_inff()) : x == x ? finite : x;
}

inline Vector<double> exponential(Vector<double> x) {
  for (int64_t lane = 0; lane < lanes<double>; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

template <typename V>
inline V relu(V value) {  // NaN stays NaN
  return value <= 0 ? V{} : value;
}

}  // namespace
}  // namespace odn_fast::ODN_FAST_INSTRUCTION_SET
