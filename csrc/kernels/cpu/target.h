// First include of a file that is compiled for one instruction set. The headers below come before the target pragma, so
// that their inline functions stay baseline code: the linker may pick any copy of them for the whole library.
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
// GCC's own AVX-512 headers set it off (GCC PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "kernels/cpu/nontemporal.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/table.h"
#include "kernels/cpu/workspace.h"
#include "kernels/types.h"

// GCC instantiates templates at the end of the file, so there the pragma stays in force; clang wants it closed. Before
// a loop, NF_NO_ALIASES says that what it writes it does not read by another name.
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
