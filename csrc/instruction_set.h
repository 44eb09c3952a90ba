// The instruction set CPU kernels run with: the best one of this processor, or the one a test forces.
#pragma once

#include <string>
#include <vector>

namespace odn_fast {

// avx512_bf16 is avx512 and the dot products of bfloat16 pairs.
enum class InstructionSet { baseline, avx2, avx512, avx512_bf16 };

// Names of those compiled in that this processor has, best first.
std::vector<std::string> instruction_sets();

InstructionSet instruction_set();
std::string instruction_set_name();

// Process-wide. Throws std::invalid_argument if `name` is not one of instruction_sets().
void set_instruction_set(const std::string& name);

// One kernel table per instruction set, null where it was not compiled.
template <typename Kernels>
struct KernelTable {
  const Kernels* baseline;
  const Kernels* avx2;
  const Kernels* avx512;
  const Kernels* avx512_bf16;

  const Kernels& chosen() const {
    switch (instruction_set()) {
      case InstructionSet::avx512_bf16: return *avx512_bf16;
      case InstructionSet::avx512: return *avx512;
      case InstructionSet::avx2: return *avx2;
      default: return *baseline;
    }
  }
};

}  // namespace odn_fast

// ODN_FAST_KERNEL_TABLE(Kernels, name): declares the copies of `name` and a KernelTable named `name` of them.
#if defined(__x86_64__)
#define ODN_FAST_KERNEL_TABLE(Kernels, name)           \
  namespace baseline { extern const Kernels name; }    \
  namespace avx2 { extern const Kernels name; }        \
  namespace avx512 { extern const Kernels name; }      \
  namespace avx512_bf16 { extern const Kernels name; } \
  inline constexpr ::odn_fast::KernelTable<Kernels> name { &baseline::name, &avx2::name, &avx512::name, &avx512_bf16::name }
#else
#define ODN_FAST_KERNEL_TABLE(Kernels, name)        \
  namespace baseline { extern const Kernels name; } \
  inline constexpr ::odn_fast::KernelTable<Kernels> name { &baseline::name, nullptr, nullptr, nullptr }
#endif
