// What a caller of the kernels gives them, and plans that no caller makes.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/cuda/launch.cuh"

namespace normfused::testing {

// Memory as a caller gives it: scratch with anything in it, tickets that are zero before and after.
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

// The plan with so many splits, and `idle` more which have nothing to do, merged in groups.
inline cuda::ReductionPlan cut(cuda::ReductionPlan plan, int64_t splits, int idle, int group) {
  const auto cut_units = [&](auto& part, int64_t units, int64_t together) {
    const int64_t chunk = (units + splits - 1) / splits;
    part.chunk = (chunk + together - 1) / together * together;
    part.splits = static_cast<int>((units + part.chunk - 1) / part.chunk) + idle;
  };
  if (plan.by_rows)
    cut_units(plan.rows, plan.rows.units(), plan.rows.lanes);
  else
    cut_units(plan.columns, plan.columns.rows, plan.columns.height);
  plan.group = group;
  return plan;
}

// The plan with so many threads for a channel.
inline cuda::ReductionPlan with_lanes(cuda::ReductionPlan plan, int lanes) {
  cuda::RowsPlan& rows = plan.rows;
  const int64_t channels = cuda::kThreads / lanes;
  rows.lanes = lanes;
  rows.tiles = (rows.view.channels + channels - 1) / channels;
  rows.outer_step = lanes / rows.row_vectors;
  rows.vector_step = lanes % rows.row_vectors;
  return plan;
}

}  // namespace normfused::testing
