// Integer division by a divisor that the host knows before the launch.
#pragma once

#include <cstdint>
#include <type_traits>

namespace normfused::cuda {

// Computes n / divisor as a multiplication and a shift (Granlund and Montgomery, 1994), for n below half of Word's
// range. On a GPU a 64-bit division is a call of some hundred cycles.
template <class Word>
class Divider {
 public:
  constexpr Divider() = default;
  constexpr explicit Divider(Word divisor) {
    while ((Word{1} << shift_) < divisor) ++shift_;
    multiplier_ = static_cast<Word>((Wide{1} << kBits) * ((Wide{1} << shift_) - divisor) / divisor + 1);
  }
  constexpr Word operator()(Word n) const {
    return (static_cast<Word>((Wide{n} * multiplier_) >> kBits) + n) >> shift_;
  }

 private:
  static constexpr int kBits = 8 * sizeof(Word);
  using Wide = std::conditional_t<kBits == 32, uint64_t, unsigned __int128>;
  Word multiplier_ = 1;
  int shift_ = 0;
};

}  // namespace normfused::cuda
