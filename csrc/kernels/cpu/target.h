// The first include of each file that is compiled for one instruction set (baseline.cpp, avx2.cpp, avx512.cpp).
//
// Every standard and project header that such a file needs is included here, before NF_TARGET_BEGIN. An inline function
// of a header is a weak symbol: the linker keeps one copy for the whole library. A copy compiled for AVX-512 would
// crash a CPU without AVX-512.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 headers trigger this warning (GCC PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "kernels/cpu/nontemporal.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/table.h"
#include "kernels/cpu/workspace.h"
#include "kernels/types.h"

#define NF_INLINE inline __attribute__((always_inline))
#define NF_NOINLINE static __attribute__((noinline))

// Code between NF_TARGET_BEGIN(isa) and NF_TARGET_END is compiled for the instruction set `isa`. GCC instantiates
// templates at the end of the file, so its pragma must stay in force until there; Clang requires a closing pragma.
//
// NF_NO_ALIASES, before a loop, asserts that no iteration reads what another iteration writes.
#define NF_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define NF_TARGET_BEGIN(isa) NF_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define NF_TARGET_END NF_PRAGMA(clang attribute pop)
#define NF_NO_ALIASES
#else
#define NF_TARGET_BEGIN(isa) NF_PRAGMA(GCC target(isa))
#define NF_TARGET_END
#define NF_NO_ALIASES NF_PRAGMA(GCC ivdep)
#endif

// Defines the variable template name<Op>: whether the expression, which may use Op, compiles. For the static_asserts
// that state what an operation must provide.
#define NF_REQUIREMENT(name, ...)     \
  template <class Op, class = void>   \
  inline constexpr bool name = false; \
  template <class Op>                 \
  inline constexpr bool name<Op, std::void_t<decltype(__VA_ARGS__)>> = true
