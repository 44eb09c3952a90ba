#include "instruction_set.h"

#include <atomic>
#include <stdexcept>

namespace odn_fast {
namespace {

constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};  // by InstructionSet

const char* name_of(InstructionSet set) { return names[static_cast<int>(set)]; }

// Best first. The builtin asks cpuid, and whether the operating system saves the wide registers.
const std::vector<InstructionSet>& supported() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(InstructionSet::avx512_bf16);
    if (avx512) found.push_back(InstructionSet::avx512);
    if (avx2) found.push_back(InstructionSet::avx2);
#endif
    found.push_back(InstructionSet::baseline);
    return found;
  }();
  return sets;
}

std::atomic<InstructionSet>& current() {
  static std::atomic<InstructionSet> set{supported().front()};
  return set;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  for (const InstructionSet set : supported()) found.emplace_back(name_of(set));
  return found;
}

InstructionSet instruction_set() { return current().load(std::memory_order_relaxed); }

std::string instruction_set_name() { return name_of(instruction_set()); }

void set_instruction_set(const std::string& name) {
  for (const InstructionSet set : supported()) {
    if (name == name_of(set)) {
      current().store(set, std::memory_order_relaxed);
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available on this processor");
}

}  // namespace odn_fast
