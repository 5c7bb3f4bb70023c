// How a block's threads go over the tensor. A walk hands a thread its vectors; which values of them count is told by a
// mask, one bit for each.
#pragma once

#include "kernels/cuda/plan.h"
#include "kernels/cuda/vector.cuh"

namespace normfused::cuda {

template <int kValues>
inline constexpr uint32_t kWhole = (1u << kValues) - 1;

// The first n of a vector's values.
template <int kValues>
NF_DEVICE uint32_t first_values(int64_t n) {
  return n >= kValues ? kWhole<kValues> : n <= 0 ? 0 : (1u << n) - 1;
}

// A vector of which the masked values lie within the tensor: read whole where all of it does.
template <bool kLast, class T, int kValues>
NF_DEVICE Vector<T, kValues> load_masked(const T* tensor, int64_t offset, int64_t numel) {
  using V = Vector<T, kValues>;
  if (offset + kValues <= numel) return kLast ? V::load_last(tensor + offset) : V::load(tensor + offset);
  V vector{};
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    if (offset + i < numel) vector.value[i] = tensor[offset + i];
  return vector;
}

template <class T, int kValues>
NF_DEVICE void store_masked(T* tensor, int64_t offset, const Vector<T, kValues>& vector, uint32_t mask,
                            bool streaming) {
  if (mask == kWhole<kValues>) return vector.store(tensor + offset, streaming);
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    if (mask >> i & 1) tensor[offset + i] = vector.value[i];
}

// Channels first: the vectors of one channel in a split, of which a thread takes every plan.lanes-th.
template <int kValues, bool kMasked>
class RowWalk {
 public:
  NF_DEVICE RowWalk(const RowsPlan& plan, int64_t channel, int64_t split, int lane)
      : plan_(plan), channel_(channel), unit_(split * plan.chunk + lane) {
    const int64_t end = unit_ - lane + plan.chunk;
    end_ = end < plan.units() ? end : plan.units();
    outer_ = unit_ / plan.row_vectors;
    vector_ = unit_ % plan.row_vectors;
    outer_step_ = plan.lanes / plan.row_vectors;
    vector_step_ = plan.lanes % plan.row_vectors;
  }

  // Whether there are so many more vectors.
  NF_DEVICE bool has(int vectors) const { return unit_ + (vectors - 1) * plan_.lanes < end_; }

  // Offset and mask of the next vector.
  NF_DEVICE int64_t next(uint32_t& mask) {
    const int64_t row = (outer_ * plan_.view.channels + channel_) * plan_.view.inner;
    int64_t offset = row + vector_ * kValues;
    mask = kWhole<kValues>;
    if constexpr (kMasked) {
      offset -= row % kValues;
      const int64_t before = row - offset, left = row + plan_.view.inner - offset;
      mask = first_values<kValues>(left) & ~first_values<kValues>(before);
    }
    unit_ += plan_.lanes;
    outer_ += outer_step_;
    vector_ += vector_step_;
    if (vector_ >= plan_.row_vectors) {
      vector_ -= plan_.row_vectors;
      ++outer_;
    }
    return offset;
  }

 private:
  const RowsPlan& plan_;
  int64_t channel_, unit_, end_, outer_, vector_, outer_step_, vector_step_;
};

// Channels last: a thread's place in its block, and the rows it takes: every plan.height-th of a split.
template <int kValues>
class ColumnWalk {
 public:
  NF_DEVICE ColumnWalk(const ColumnsPlan& plan, int64_t tile, int64_t split)
      : plan_(plan), x(threadIdx.x % plan.width), y(threadIdx.x / plan.width) {
    column = (tile * plan.width + x) * kValues;
    begin_ = split * plan.chunk;
    row_ = begin_ + y;
    const int64_t end = (split + 1) * plan.chunk;
    end_ = end < plan.rows() ? end : plan.rows();
    if (y >= plan.height || column >= plan.columns) row_ = end_;  // a thread without work
  }

  NF_DEVICE bool has(int rows) const { return row_ + (rows - 1) * plan_.height < end_; }
  NF_DEVICE int64_t ahead(int rows) const { return (row_ + rows * plan_.height) * plan_.columns + column; }
  // Offset of the vector in the next row. The last row of all can be short.
  NF_DEVICE int64_t next() {
    const int64_t offset = row_ * plan_.columns + column;
    row_ += plan_.height;
    return offset;
  }
  // How many rows of the split a column has. The last row of all can end before it.
  NF_DEVICE int64_t rows_of(int64_t column) const {
    if (end_ <= begin_) return 0;
    return end_ - begin_ - ((end_ - 1) * plan_.columns + column >= plan_.view.numel());
  }
  // The channel that a value of the thread's vectors belongs to.
  NF_DEVICE int64_t channel(int value) const {
    const int64_t c = column + value;
    return plan_.repeat == 1 ? c : c % plan_.view.channels;
  }

 private:
  const ColumnsPlan& plan_;
  int64_t begin_, row_, end_;

 public:
  const int x, y;
  int64_t column;
};

}  // namespace normfused::cuda
