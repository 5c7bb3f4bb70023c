// Copies of input vectors in shared memory, from which a single launch first reduces and then applies.
#pragma once

#include "kernels/cuda/plan.h"
#include "kernels/cuda/vector.cuh"

namespace normfused::cuda {

// The copies of one thread: of each vector that it processes, of every input that is present. All copies are started
// before any is read, so that a block has its whole tile in flight. A thread reads its own copies only, so they need no
// barrier.
template <class T, int kValues>
class Stage {
 public:
  using V = Vector<T, kValues>;

  // `memory`: the block's dynamic shared memory. `inputs`: how many are present.
  NF_DEVICE Stage(uint4* memory, int inputs, const Staged& plan)
      : words_(memory + threadIdx.x),
        next_(words_),
        inputs_(inputs),
        threads_(plan.threads),
        group_vectors_(static_cast<int>((plan.vectors + kGroups - 1) / kGroups)),
        left_in_group_(group_vectors_) {}

  // Starts to copy the thread's next vector of the inputs input(0), input(1), ... at an offset. Only `left` values lie
  // in the tensor from there on; those after them, which can be all, are zeros.
  template <class Input>
  NF_DEVICE void copy(const Input& input, int64_t offset, int64_t left) {
    constexpr int kAccessValues = kValues / V::kAccesses;
    for (int k = 0; k < inputs_; ++k) {
      const T* const source = input(k);
#pragma unroll
      for (int i = 0; i < V::kAccesses; ++i) {
        const int64_t present = left - i * kAccessValues;
        if (left >= kValues)
          start_copy(next_, source + offset + i * kAccessValues);
        else if (present > 0)
          start_clipped_copy(next_, source + offset + i * kAccessValues,
                             static_cast<int>(present < kAccessValues ? present : kAccessValues) * int{sizeof(T)});
        else
          start_clipped_copy(next_, source, 0);
        next_ += threads_;
      }
    }
    ++vectors_;
    if (--left_in_group_ == 0) end_group();
  }
  // Called once, after the last copy().
  NF_DEVICE void end() {
    while (groups_ < kGroups) end_group();
  }

  // Waits for the copies of the first `vectors` vectors.
  NF_DEVICE void wait(int vectors) {
    while (arrived_ < kGroups && arrived_ * group_vectors_ < vectors) {
      ++arrived_;
      if (arrived_ == 1) wait_for_copies<kGroups - 1>();
      if (arrived_ == 2) wait_for_copies<kGroups - 2>();
      if (arrived_ == 3) wait_for_copies<kGroups - 3>();
      if (arrived_ == 4) wait_for_copies<0>();
    }
  }
  // How many vectors the thread has.
  NF_DEVICE int vectors() const { return vectors_; }
  // Input k of the thread's vector v; zeros if the input is absent. Precondition: wait(v + 1).
  NF_DEVICE V load(int v, int k) const {
    if (k >= inputs_) return V{};
    return V::from_words([&](int i) { return words_[((v * inputs_ + k) * V::kAccesses + i) * threads_]; });
  }

 private:
  // The groups of copies that can be awaited separately: a thread sums the values of one while the next arrive.
  static constexpr int kGroups = 4;

  NF_DEVICE void end_group() {
    end_copies();
    ++groups_;
    left_in_group_ = group_vectors_;
  }

  uint4* const words_;  // access i of input k of vector v is number (v * inputs_ + k) * kAccesses + i, threads_ apart
  uint4* next_;
  const int inputs_, threads_, group_vectors_;
  int left_in_group_, vectors_ = 0, groups_ = 0, arrived_ = 0;
};

// Instead of a Stage: vectors are read from memory.
struct NoStage {};

}  // namespace normfused::cuda
