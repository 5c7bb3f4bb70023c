// Resources for launches in the simulator, and plans that the planner would not choose for a shape.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/cuda/launch.cuh"

namespace normfused::testing {

// Scratch memory filled with NaN, and tickets that are zero before a launch and must be zero after it.
class HostResources : public cuda::Resources {
 public:
  explicit HostResources(const cuda::DeviceLimits& limits) : Resources(limits, nullptr) {}

  void* scratch(int64_t bytes) override {
    memory_.emplace_back(new double[static_cast<size_t>(bytes + 7) / 8]);
    std::memset(memory_.back().get(), 0xff, static_cast<size_t>(bytes));
    return memory_.back().get();
  }
  unsigned* tickets(int64_t count) override {
    tickets_.assign(static_cast<size_t>(count), 0);
    return tickets_.data();
  }
  bool tickets_are_zero() const {
    return std::all_of(tickets_.begin(), tickets_.end(), [](unsigned ticket) { return ticket == 0; });
  }

 private:
  std::vector<std::unique_ptr<double[]>> memory_;
  std::vector<unsigned> tickets_;
};

// The plan with another number of splits, `idle` further splits that have no work, and groups of this size.
inline cuda::ReductionPlan cut(cuda::ReductionPlan plan, int64_t splits, int idle, int group) {
  const auto cut_units = [&](auto& rows_or_columns, int64_t units, int64_t multiple) {
    const int64_t chunk = (units + splits - 1) / splits;
    rows_or_columns.chunk = (chunk + multiple - 1) / multiple * multiple;
    rows_or_columns.splits = static_cast<int>((units + rows_or_columns.chunk - 1) / rows_or_columns.chunk) + idle;
  };
  if (plan.by_rows)
    cut_units(plan.rows, plan.rows.units(), plan.rows.lanes);
  else
    cut_units(plan.columns, plan.columns.rows, plan.columns.height);
  plan.group = group;
  return plan;
}

// The plan with another number of lanes per channel.
inline cuda::ReductionPlan with_lanes(cuda::ReductionPlan plan, int lanes) {
  cuda::RowsPlan& rows = plan.rows;
  const int64_t channels = cuda::kThreads / lanes;
  rows.lanes = lanes;
  rows.channels = static_cast<int>(channels);
  rows.tiles = (rows.view.channels + channels - 1) / channels;
  rows.outer_step = lanes / rows.row_vectors;
  rows.vector_step = lanes % rows.row_vectors;
  return plan;
}

// The plan as a pipelined launch of this many blocks, with `window` tiles reduced before the first is applied.
inline cuda::ReductionPlan pipelined(cuda::ReductionPlan plan, int64_t window, int64_t blocks) {
  plan.rows.single = false;
  plan.rows.window = window;
  plan.rows.blocks = blocks;
  return plan;
}

// The plan as a persistent launch of this many blocks.
inline cuda::ReductionPlan persistent(cuda::ReductionPlan plan, int64_t blocks) {
  cuda::ColumnsPlan& columns = plan.columns;
  const int64_t vectors = (columns.chunk + columns.height - 1) / columns.height;
  columns.single = false;
  columns.staged = {vectors, cuda::kThreads, vectors * cuda::kThreads * cuda::kAccessBytes};
  columns.blocks = blocks;
  return plan;
}

}  // namespace normfused::testing
