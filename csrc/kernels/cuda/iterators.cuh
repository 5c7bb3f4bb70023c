// Iterators over the tensor: each gives a thread the offsets of the vectors it processes. A bitmask `valid` says which
// values of a vector belong to the channel and lie within the tensor; bit i is for value i.
#pragma once

#include "kernels/cuda/plan.h"
#include "kernels/cuda/vector.cuh"

namespace normfused::cuda {

template <int kValues>
inline constexpr uint32_t kAllValid = (1u << kValues) - 1;

// The bitmask of a vector's first n values; n may be negative or exceed kValues.
template <int kValues>
NF_DEVICE uint32_t first_bits(int64_t n) {
  return n >= kValues ? kAllValid<kValues> : n <= 0 ? 0 : (1u << n) - 1;
}

// Loads the vector at an offset. Values past the end of the tensor are zero and are not read; a vector that lies wholly
// within the tensor is loaded as one.
template <bool kStreaming, class T, int kValues>
NF_DEVICE Vector<T, kValues> load_clipped(const T* tensor, int64_t offset, int64_t numel) {
  using V = Vector<T, kValues>;
  if (offset + kValues <= numel) return kStreaming ? V::load_streaming(tensor + offset) : V::load(tensor + offset);
  V vector{};
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    if (offset + i < numel) vector.value[i] = tensor[offset + i];
  return vector;
}

// Stores the valid values of a vector: as one vector if all are valid, otherwise one by one.
template <class T, int kValues>
NF_DEVICE void store_valid(T* tensor, int64_t offset, const Vector<T, kValues>& vector, uint32_t valid,
                           bool streaming) {
  if (valid == kAllValid<kValues>) return vector.store(tensor + offset, streaming);
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    if (valid >> i & 1) tensor[offset + i] = vector.value[i];
}

// Iterates over the vectors of one channel in one split, channels first. The channel's plan.lanes lanes process the
// vectors in turn. With kMasked, rows need not begin or end on a vector: the vectors at both ends are shared with the
// neighbouring rows.
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

  NF_DEVICE bool done() const { return unit_ >= end_; }
  // Whether at least this many vectors are left.
  NF_DEVICE bool has(int vectors) const { return unit_ + (vectors - 1) * plan_.lanes < end_; }

  // Returns the offset of the next vector, a multiple of kValues, and its valid values. A masked row is iterated with
  // the maximum number of vectors that a row can touch, so its last vector can have no valid values.
  NF_DEVICE int64_t next(uint32_t& valid) {
    const int64_t row = (outer_ * plan_.view.channels + channel_) * plan_.view.inner;
    int64_t offset = row + vector_ * kValues;
    valid = kAllValid<kValues>;
    if constexpr (kMasked) {
      offset -= row % kValues;
      const int64_t row_begin = row - offset, row_end = row + plan_.view.inner - offset;
      valid = first_bits<kValues>(row_end) & ~first_bits<kValues>(row_begin);
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

// Iterates over a thread's rows of one tile and split of a sample's matrix (see ColumnsPlan). A thread stays in one
// vector of columns, `column`; the plan.height threads with the same `x` process the rows in turn.
template <int kValues>
class ColumnIterator {
 public:
  NF_DEVICE ColumnIterator(const ColumnsPlan& plan, int64_t sample, int64_t tile, int64_t split)
      : plan_(plan),
        x(threadIdx.x % plan.width),
        y(threadIdx.x / plan.width),
        first_channel(sample * plan.view.channels) {
    column = (tile * plan.width + x) * kValues;
    begin_ = sample * plan.rows + split * plan.chunk;
    row_ = begin_ + y;
    const int64_t end = begin_ + plan.chunk, sample_end = (sample + 1) * plan.rows;
    end_ = end < sample_end ? end : sample_end;
    if (y >= plan.height || column >= plan.columns) row_ = end_;  // a thread without work
  }

  NF_DEVICE bool done() const { return row_ >= end_; }
  // Whether at least this many rows are left.
  NF_DEVICE bool has(int rows) const { return row_ + (rows - 1) * plan_.height < end_; }
  // The offset of the vector that lies this many rows ahead of the next.
  NF_DEVICE int64_t ahead(int rows) const { return (row_ + rows * plan_.height) * plan_.columns + column; }

  // Returns the offset of the vector in the next row. It can lie beyond the end of the tensor, partly or wholly.
  NF_DEVICE int64_t next() {
    const int64_t offset = row_ * plan_.columns + column;
    row_ += plan_.height;
    return offset;
  }

  // Rows of the split.
  NF_DEVICE int64_t rows() const { return end_ > begin_ ? end_ - begin_ : 0; }
  // Whether the tensor ends before this column in the last row of the split.
  NF_DEVICE bool ends_before(int64_t column) const { return (end_ - 1) * plan_.columns + column >= plan_.view.numel(); }

  // The first column of the tile.
  NF_DEVICE int64_t tile_column() const { return column - x * kValues; }

  // The statistics of the values of the thread's vectors. Unless columns are channels there are fewer than 2^31
  // columns, so that 32-bit divisions do.
  NF_DEVICE void channels(int64_t (&channels)[kValues]) const {
    const auto inner = static_cast<unsigned>(plan_.view.inner), count = static_cast<unsigned>(plan_.view.channels);
    const auto first = static_cast<unsigned>(column);
    unsigned channel = plan_.folded() ? first / inner : first % count, place = first - channel * inner;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      channels[i] = first_channel + (plan_.plain() ? column + i : channel);
      if (plan_.folded() && ++place < inner) continue;
      place = 0;
      if (++channel == count) channel = 0;
    }
  }

 private:
  const ColumnsPlan& plan_;
  int64_t begin_, row_, end_;

 public:
  const int x, y;               // the thread's place in its block of plan.width by plan.height threads
  const int64_t first_channel;  // the sample's first statistic
  int64_t column;
};

}  // namespace normfused::cuda
