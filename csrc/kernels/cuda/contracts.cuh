// Compile-time checks of what kernels require of their operations. A missing or mistyped member is reported by name,
// at the launcher, instead of deep inside a kernel.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels/cuda/prelude.h"

namespace normfused::cuda {

// Declares a trait that is true for types T for which the given expression or type compiles.
#define NF_TRAIT(name, ...)         \
  template <class T, class = void>  \
  struct name : std::false_type {}; \
  template <class T>                \
  struct name<T, std::void_t<__VA_ARGS__>> : std::true_type {}

namespace contracts {

// A coefficients_of() for the check.
template <class T>
struct AnyCoefficients {
  struct Entry {
    typename T::S k[T::kCoefficients];
  };
  const Entry& operator()(int) const;
};

NF_TRAIT(HasTypes, typename T::T, typename T::S);
NF_TRAIT(HasInputs, decltype(T::kInputs), decltype(T::kRequiredInputs),
         std::enable_if_t<std::is_convertible_v<decltype(std::declval<const T&>().input(0)), const typename T::T*>>);
NF_TRAIT(HasOutputs, typename T::Output, decltype(T::kOutputs), decltype(T::kWritesMask),
         std::enable_if_t<std::is_convertible_v<decltype(std::declval<const T&>().output(0)), typename T::Output*>>);
NF_TRAIT(HasTable, decltype(T::kCoefficients), decltype(T::kPrepares),
         std::enable_if_t<std::is_convertible_v<decltype(std::declval<const T&>().table), const typename T::S*>>);
NF_TRAIT(HasCall, decltype(std::declval<const T&>()(std::declval<const typename T::S (&)[T::kInputs][8]>(),
                                                    std::declval<typename T::S (&)[T::kOutputs][8]>(),
                                                    AnyCoefficients<T>{}, int64_t{}, uint32_t{})));
NF_TRAIT(HasPrologue, decltype(std::declval<const T&>().prologue()));
NF_TRAIT(HasPrepare, decltype(std::declval<const T&>().prepare(int64_t{}, bool{},
                                                               std::declval<typename T::S (&)[T::kCoefficients]>())));

NF_TRAIT(HasSums, typename T::Sum, decltype(T::kSums), decltype(T::kRecomputes), decltype(T::kStartsFromMemory));
NF_TRAIT(HasStart,
         std::enable_if_t<std::is_same_v<decltype(std::declval<const T&>().start(int64_t{})), typename T::State>>);
NF_TRAIT(HasMaskBits, decltype(std::declval<const T&>().template mask_bits<8>(int64_t{})));
NF_TRAIT(HasAccumulate, decltype(std::declval<const T&>().template accumulate<8, true>(
                            std::declval<typename T::State&>(), std::declval<const typename T::S (&)[T::kInputs][8]>(),
                            uint32_t{}, uint32_t{}, bool{})));
NF_TRAIT(HasFold, decltype(std::declval<const T&>().fold(std::declval<const typename T::State&>(), int64_t{}, int64_t{},
                                                         std::declval<typename T::Sum (&)[T::kSums]>())));
NF_TRAIT(HasMerge,
         std::enable_if_t<std::is_same_v<decltype(T::merge(0, T::identity(0), T::identity(0))), typename T::Sum>>);
NF_TRAIT(HasFinalize,
         decltype(std::declval<const T&>().finalize(int64_t{}, std::declval<typename T::Sum (&)[T::kSums]>())));
NF_TRAIT(HasRecompute, decltype(std::declval<const T&>().is_valid(std::declval<const typename T::Sum (&)[T::kSums]>())),
         decltype(std::declval<const T&>().recompute(int64_t{}, 0, 0, bool{},
                                                     std::declval<typename T::Sum (&)[T::kSums]>())));

NF_TRAIT(HasPrefetch, decltype(std::declval<const T&>().prefetch(int64_t{})));
NF_TRAIT(
    HasPreload,
    std::enable_if_t<std::is_same_v<decltype(std::declval<const T&>().preload(int64_t{})), typename T::Preloaded>>);

NF_TRAIT(FinishesTogether, decltype(std::declval<const T&>().finish_together(int64_t{}, int64_t{})));

template <class Finish, class Op, class = void>
struct Finishes : std::false_type {};
template <class Finish, class Op>
struct Finishes<
    Finish, Op,
    std::void_t<decltype(std::declval<const Finish&>()(int64_t{}, std::declval<const typename Op::Sum (&)[Op::kSums]>(),
                                                       std::declval<const typename Finish::Preloaded&>()))>>
    : std::true_type {};

}  // namespace contracts

#undef NF_TRAIT

// The contract in apply.cuh.
template <class Op>
constexpr bool check_apply_op() {
  using namespace contracts;
  static_assert(HasTypes<Op>::value, "an apply Op needs the types T and S");
  static_assert(HasInputs<Op>::value, "an apply Op needs kInputs, kRequiredInputs and const T* input(int k) const");
  static_assert(HasOutputs<Op>::value,
                "an apply Op needs the type Output, kOutputs, kWritesMask and Output* output(int k) const");
  static_assert(HasTable<Op>::value, "an apply Op needs kCoefficients, kPrepares and const S* table");
  static_assert(HasCall<Op>::value, "an apply Op needs operator()(x, y, coefficients_of, offset, valid) const");
  static_assert(HasPrologue<Op>::value, "an apply Op needs prologue() const");
  if constexpr (Op::kPrepares)
    static_assert(HasPrepare<Op>::value,
                  "an apply Op with kPrepares needs prepare(channel, is_owner, coefficients) const");
  return true;
}

// The contracts in reduce_phases.cuh.
template <class Op, class Finish>
constexpr bool check_reduce_op() {
  using namespace contracts;
  static_assert(HasTypes<Op>::value, "a reduce Op needs the types T and S");
  static_assert(HasInputs<Op>::value, "a reduce Op needs kInputs, kRequiredInputs and const T* input(int k) const");
  static_assert(HasSums<Op>::value, "a reduce Op needs the type Sum, kSums, kRecomputes and kStartsFromMemory");
  static_assert(HasStart<Op>::value, "a reduce Op needs the type State and State start(channel) const");
  static_assert(HasMaskBits<Op>::value, "a reduce Op needs mask_bits<n>(offset) const");
  static_assert(HasAccumulate<Op>::value,
                "a reduce Op needs accumulate<n, kMasked>(state, values, valid, mask_bits, first) const");
  static_assert(HasFold<Op>::value, "a reduce Op needs fold(state, count, channel, sums) const");
  static_assert(HasMerge<Op>::value, "a reduce Op needs static Sum identity(k) and static Sum merge(k, a, b)");
  static_assert(HasFinalize<Op>::value, "a reduce Op needs finalize(channel, sums) const");
  if constexpr (Op::kRecomputes)
    static_assert(HasRecompute<Op>::value,
                  "a reduce Op with kRecomputes needs is_valid(results) const and "
                  "recompute(first, channels, slot, is_leader, results) const");
  static_assert(HasPrefetch<Finish>::value, "a Finish needs prefetch(channel) const");
  static_assert(HasPreload<Finish>::value, "a Finish needs the type Preloaded and Preloaded preload(channel) const");
  static_assert(Finishes<Finish, Op>::value, "a Finish needs operator()(channel, results, preloaded) const");
  return true;
}

}  // namespace normfused::cuda
