// The instruction sets of an x86-64 processor, from the CPUID instruction. __builtin_cpu_supports does not know F16C in
// GCC 10 and Clang 16 and older, and on Windows it needs a library that Microsoft's linker does not search.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#include <initializer_list>

namespace normfused::cpu {

struct InstructionSets {
  bool avx2, avx512;
};

// The sets of avx2.cpp and avx512.cpp. The operating system must save their registers too: XCR0 says which it saves.
inline InstructionSets query_instruction_sets() {
  constexpr auto has = [](uint32_t bits, std::initializer_list<int> numbers) {
    for (const int number : numbers)
      if ((bits >> number & 1) == 0) return false;
    return true;
  };
  uint32_t a, b, c, d, leaf1, leaf7, saved;
  if (__get_cpuid(1, &a, &b, &leaf1, &d) == 0 || !has(leaf1, {12, 27, 29})) return {};  // FMA, OSXSAVE, F16C
  if (__get_cpuid_count(7, 0, &a, &leaf7, &c, &d) == 0) return {};
  __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
  const bool avx2 = has(saved, {1, 2}) && has(leaf7, {5});
  // ZMM registers; BMI2, AVX512F, DQ, BW, VL
  return {avx2, avx2 && has(saved, {5, 6, 7}) && has(leaf7, {8, 16, 17, 30, 31})};
}

}  // namespace normfused::cpu
#endif
