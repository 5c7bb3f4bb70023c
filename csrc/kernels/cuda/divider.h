// Division by a number that the host knows.
#pragma once

#include <cstdint>
#include <type_traits>

namespace normfused::cuda {

// n / by for n below half of Word's range: a multiplication and a shift (Granlund and Montgomery, 1994).
template <class Word>
class Divider {
 public:
  constexpr Divider() = default;
  constexpr explicit Divider(Word by) {
    while ((Word{1} << shift_) < by) ++shift_;
    multiplier_ = static_cast<Word>((Wide{1} << kBits) * ((Wide{1} << shift_) - by) / by + 1);
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
