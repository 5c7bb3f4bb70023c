// Norms whose statistics are rows of memory: neighbouring lanes read a row, or a chunk of a long row, into registers
// once. They sum it, compute its statistics, and apply them.
//
// A row with several chunks takes two launches: one with the phase kSum, which writes the results of every chunk, and
// one with kApply, which merges them. A row with one chunk takes one, with the phase kBoth. So does a long row that
// shared memory holds: that of one block, or of a cluster, each of whose blocks stages a chunk.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/stage.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/math.h"

namespace normfused::cuda {

enum class RowPhase : uint8_t { kBoth, kSum, kApply };

// The values that a thread holds: kVectors vectors of kValues values each, at offsets from the first value of a row.
template <int kValues>
struct RowPart {
  int64_t row;    // whose first value is at row * channels
  int64_t begin;  // the chunk's first channel
  int count;      // the channels of the chunk; none for a slot without a row
  int lane, lanes;

  NF_DEVICE RowPart(const ResidentRowsPlan& plan, int64_t row, unsigned chunk, bool is_present, int64_t channels)
      : row(row), lane(static_cast<int>(threadIdx.x) % plan.lanes), lanes(plan.lanes) {
    begin = chunk * plan.chunk;
    const int64_t left = channels - begin;
    count = !is_present ? 0 : static_cast<int>(plan.chunk < left ? plan.chunk : left);
  }
  // Where in the chunk vector v begins, its first channel, and whether the thread has this vector.
  NF_DEVICE int place(int v) const { return (v * lanes + lane) * kValues; }
  NF_DEVICE int64_t channel(int v) const { return begin + place(v); }
  NF_DEVICE bool has(int v) const { return place(v) < count; }
  // What remains from the thread's vector v on.
  NF_DEVICE RowPart from(int v) const {
    RowPart rest = *this;
    rest.begin += int64_t{v} * lanes * kValues;
    rest.count -= v * lanes * kValues;
    return rest;
  }
};

// Loads a thread's vectors of a row. All loads are independent of each other.
template <class T, int kValues, int kVectors>
NF_DEVICE void load_row(const void* tensor, int64_t channels, const RowPart<kValues>& part,
                        Vector<T, kValues> (&vectors)[kVectors]) {
  const T* const first = static_cast<const T*>(tensor) + part.row * channels;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    vectors[v] = part.has(v) ? Vector<T, kValues>::load(first + part.channel(v)) : Vector<T, kValues>{};
}

// Calls f(x) for every value that the thread holds, in S.
template <class S, class T, int kValues, int kVectors, class F>
NF_DEVICE void for_each_value(const RowPart<kValues>& part, const Vector<T, kValues> (&vectors)[kVectors], const F& f) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!part.has(v)) continue;
#pragma unroll
    for (int i = 0; i < kValues; ++i) f(widen<S>(vectors[v].value[i]));
  }
}

// Block-wide: the moments of `count` values, which neighbouring lanes hold: each_value(s, f) calls f with every value
// of the thread, as the type of s. The pivot is the mean in S, whose sum cannot overflow, because every value is
// divided by the count first. If squares overflow or underflow S, they are summed in double. All threads of the block
// must call it.
template <class S, class EachValue>
NF_DEVICE Moments moments_of(int64_t count, int lanes, double eps, const EachValue& each_value) {
  const S share = 1 / static_cast<S>(count > 0 ? count : 1);
  S mean = 0;
  each_value(S{}, [&](S value) { mean += value * share; });
  double total[1] = {static_cast<double>(mean)};
  sum_lanes(total, lanes);
  const S pivot = is_finite(static_cast<S>(total[0])) ? static_cast<S>(total[0]) : 0;

  S sum = 0, square = 0;
  each_value(S{}, [&](S value) {
    const S deviation = value - pivot;
    sum += deviation;
    square += deviation * deviation;
  });
  double sums[2] = {static_cast<double>(sum), static_cast<double>(square)};
  sum_lanes(sums, lanes);
  Moments moments{count, 0, 0};
  if (count > 0) moments = moments_about(static_cast<double>(pivot), count, sums[0], sums[1]);
  // A NaN is a valid result.
  const bool is_valid = count == 0 || (sums[1] != HUGE_VAL && !can_underflow<S>(moments, eps));
  if (!__syncthreads_or(!is_valid)) return moments;

  const auto total_of = [&](const auto& f) {
    double exact[1] = {};
    each_value(double{}, [&](double value) { exact[0] += f(value); });
    sum_lanes(exact, lanes);
    return exact[0];
  };
  const double exact_mean = total_of([&](double value) { return value / static_cast<double>(count); });
  const double m2 = total_of([&](double value) { return (value - exact_mean) * (value - exact_mean); });
  return is_valid ? moments : Moments{count, exact_mean, m2};
}

// Kernel: normalizes rows. A block per plan.slots() rows (blockIdx.x) and chunk (blockIdx.y). `parts`: (rows, chunks),
// the moments of the chunks of rows that have several. An Op provides
//
//   T                            the type of the input
//   rows(), channels(), eps()    extents, and what is added to the variance
//   load(part, is_first, x)      loads the values that are normalized; is_first: by the first launch that does
//   finish(moments)              the statistics of a row
//   mean(), invstd()             (rows), written
//   write(part, statistics, streaming, x)
//                                writes the output of a chunk
//   prologue()                   other work, of the blocks of chunk 0
template <class Op, int kValues, int kVectors>
__global__ void __launch_bounds__(kResidentThreads, 1)
    normalize_rows(const Op op, const ResidentRowsPlan plan, const RowPhase phase, Moments* const parts) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(plan.slots()) + threadIdx.x / plan.lanes;
  const bool is_present = row < op.rows();
  const RowPart<kValues> part(plan, row, blockIdx.y, is_present, op.channels());

  Vector<typename Op::T, kValues> x[kVectors];
  op.load(part, phase != RowPhase::kApply, x);
  Moments moments{};
  if (phase != RowPhase::kApply) {
    const auto each_value = [&](auto s, const auto& f) { for_each_value<decltype(s)>(part, x, f); };
    moments = moments_of<compute_t<typename Op::T>>(part.count, part.lanes, op.eps(), each_value);
  }
  if (phase == RowPhase::kSum) {
    if (is_present && part.lane == 0) parts[row * plan.chunks + blockIdx.y] = moments;
    return;
  }
  if (blockIdx.y == 0) op.prologue();
  if (!is_present) return;
  if (phase == RowPhase::kApply)
    for (int chunk = 0; chunk < plan.chunks; ++chunk) moments = merge(moments, parts[row * plan.chunks + chunk]);
  const LayerStatistics statistics = op.finish(moments);
  if (part.lane == 0 && blockIdx.y == 0) {
    op.mean()[row] = statistics.mean;
    op.invstd()[row] = statistics.invstd;
  }
  op.write(part, statistics, plan.streaming, x);
}

// Cluster-wide: the moments of a row from those of its chunks, which `of_row` has room for. All threads of the cluster
// must call it.
NF_DEVICE Moments merge_in_cluster(const Moments& of_chunk, unsigned chunk, int chunks, Moments* of_row) {
  if (threadIdx.x == 0) of_row[chunk] = of_chunk;
  sync_blocks(chunks);
  Moments moments = of_row[0];
  for (int i = 1; i < chunks; ++i) moments = merge(moments, of_row[i]);
  return moments;
}

// Kernel: the same for rows that are staged in shared memory. The chunks of a row are the blocks of a cluster. Besides,
// an Op provides input(), the tensor that is normalized.
template <class Op, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    normalize_staged_rows(const Op op, const ResidentRowsPlan plan, Moments* const parts) {
  using T = typename Op::T;
  constexpr int kVectors = sizeof(T) * kValues > 2 * kAccessBytes ? 1 : 2;  // that are written together
  NF_DYNAMIC_SHARED(uint4, staged);
  Stage<T, kValues> stage(staged, 1, plan.staged);
  const unsigned row = blockIdx.x / static_cast<unsigned>(plan.chunks);
  const unsigned chunk = blockIdx.x - row * static_cast<unsigned>(plan.chunks);
  const RowPart<kValues> part(plan, row, chunk, true, op.channels());
  for (int v = 0; part.has(v); ++v)
    stage.copy([&](int) { return op.input(); }, part.row * op.channels() + part.channel(v), kValues);
  stage.end();

  const auto each_value = [&](auto s, const auto& f) {
    for (int v = 0; v < stage.vectors(); ++v) {
      stage.wait(v + 1);
      const Vector<T, kValues> x = stage.load(v, 0);
#pragma unroll
      for (int i = 0; i < kValues; ++i) f(widen<decltype(s)>(x.value[i]));
    }
  };
  Moments moments = moments_of<compute_t<T>>(part.count, part.lanes, op.eps(), each_value);
  if (plan.chunks > 1) moments = merge_in_cluster(moments, chunk, plan.chunks, parts + part.row * plan.chunks);
  const LayerStatistics statistics = op.finish(moments);
  op.prologue();
  if (part.lane == 0 && chunk == 0) {
    op.mean()[part.row] = statistics.mean;
    op.invstd()[part.row] = statistics.invstd;
  }
  for (int first = 0; first < stage.vectors(); first += kVectors) {
    Vector<T, kValues> x[kVectors]{};
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (first + v < stage.vectors()) x[v] = stage.load(first + v, 0);
    op.write(part.from(first), statistics, plan.streaming, x);
  }
}

// --- host

// Calls start(kValues, kVectors) with the plan's numbers, as std::integral_constant. kWidest: the values of a vector,
// if rows are not read one by one; kBytes: of a value in registers.
template <int kWidest, int kBytes, bool kBackward, class F>
cudaError_t for_resident_vectors(const ResidentRowsPlan& plan, const F& start) {
  const auto with_values = [&](auto values) {
    constexpr int kFew = resident_vectors(kBytes, values(), kBackward, true);
    constexpr int kMany = resident_vectors(kBytes, values(), kBackward, false);
    return plan.vectors == kFew ? start(values, std::integral_constant<int, kFew>{})
                                : start(values, std::integral_constant<int, kMany>{});
  };
  return plan.values == 1 ? with_values(std::integral_constant<int, 1>{})
                          : with_values(std::integral_constant<int, kWidest>{});
}

// Allocates what the plan needs and starts the kernel. Returns kNoCluster if the device cannot hold the plan's cluster.
template <int kWidest, class Op>
cudaError_t normalize_resident(const Op& op, const ResidentRowsPlan& plan, Resources& resources) {
  constexpr int kBytes = sizeof(compute_t<typename Op::T>);
  const auto parts_of_rows = [&] {
    const int64_t bytes = op.rows() * plan.chunks * static_cast<int64_t>(sizeof(Moments));
    return plan.chunks == 1 ? nullptr : static_cast<Moments*>(resources.scratch(bytes));
  };
  if (plan.is_staged) {
    const LaunchConfig config{dim3(extent(plan.blocks * plan.chunks)),
                              dim3(kThreads),
                              resources.stream,
                              false,
                              plan.staged.bytes,
                              plan.chunks};
    return launch(config, normalize_staged_rows<Op, kWidest>, op, plan, parts_of_rows());
  }
  return for_resident_vectors<kWidest, kBytes, false>(plan, [&](auto values, auto vectors) {
    const LaunchConfig config{dim3(extent(plan.blocks), extent(plan.chunks)), dim3(static_cast<unsigned>(plan.threads)),
                              resources.stream};
    const auto start = [&](RowPhase phase, Moments* parts) {
      return launch(config, normalize_rows<Op, values(), vectors()>, op, plan, phase, parts);
    };
    Moments* const parts = parts_of_rows();
    if (plan.chunks == 1) return start(RowPhase::kBoth, parts);
    const cudaError_t error = start(RowPhase::kSum, parts);
    return error != cudaSuccess ? error : start(RowPhase::kApply, parts);
  });
}

}  // namespace normfused::cuda
