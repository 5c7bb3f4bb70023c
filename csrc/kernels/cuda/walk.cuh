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
class RowIterator {
 public:
  NF_DEVICE RowIterator(const RowsPlan& plan, int64_t channel, int64_t split, int lane)
      : plan_(plan), channel_(channel), unit_(split * plan.chunk + lane) {
    const int64_t end = unit_ - lane + plan.chunk;
    end_ = end < plan.units() ? end : plan.units();
    outer_ = static_cast<int64_t>(plan.by_row_vectors(static_cast<uint64_t>(unit_)));
    vector_ = unit_ - outer_ * plan.row_vectors;
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
    outer_ += plan_.outer_step;
    vector_ += plan_.vector_step;
    if (vector_ >= plan_.row_vectors) {
      vector_ -= plan_.row_vectors;
      ++outer_;
    }
    return offset;
  }

 private:
  const RowsPlan& plan_;
  int64_t channel_, unit_, end_, outer_, vector_;
};

// A matrix: a thread's place in its block, and the rows it takes: every plan.height-th of a split.
template <int kValues>
class ColumnIterator {
 public:
  NF_DEVICE ColumnIterator(const ColumnsPlan& plan, int64_t tile, int64_t split)
      : plan_(plan), x(threadIdx.x % plan.width), y(threadIdx.x / plan.width) {
    column = (tile * plan.width + x) * kValues;
    begin_ = split * plan.chunk;
    row_ = begin_ + y;
    const int64_t end = (split + 1) * plan.chunk;
    end_ = end < plan.rows ? end : plan.rows;
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
  // Rows of the split, and whether a column is not in the last of them, which can be short if it is the last of all.
  NF_DEVICE int64_t rows() const { return end_ > begin_ ? end_ - begin_ : 0; }
  NF_DEVICE bool ends_before(int64_t column) const { return (end_ - 1) * plan_.columns + column >= plan_.view.numel(); }
  // The channels that the values of the thread's vectors belong to. Where these are not the columns, columns are fewer
  // than 2^31.
  NF_DEVICE void channels(int64_t (&channels)[kValues]) const {
    const auto inner = static_cast<unsigned>(plan_.view.inner), count = static_cast<unsigned>(plan_.view.channels);
    const auto first = static_cast<unsigned>(column);
    unsigned channel = plan_.folded() ? first / inner : first % count, place = first - channel * inner;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      channels[i] = plan_.plain() ? column + i : channel;
      if (plan_.folded() && ++place < inner) continue;
      place = 0;
      if (++channel == count) channel = 0;
    }
  }

 private:
  const ColumnsPlan& plan_;
  int64_t begin_, row_, end_;

 public:
  const int x, y;
  int64_t column;
};

}  // namespace normfused::cuda
