// Units of the tensor, and lane layouts: which units are processed as rows of lanes.
//
// A row of lanes is a contiguous run of values in which lane i belongs to the same channel in row after row. Loops over
// it use full vectors even where a channel has only a few contiguous values.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/vec.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// A range of channels [c0, c1) and a range of positions [m0, m1).
struct Unit {
  int64_t c0, c1;
  int64_t m0, m1;
};

NF_FN Unit unit_of(const Plan& plan, const ChannelView& view, int64_t index) {
  const int64_t c0 = index % plan.channel_units * plan.channel_block;
  const int64_t m0 = index / plan.channel_units * plan.position_block;
  return {c0, minimum(c0 + plan.channel_block, view.channels), m0, minimum(m0 + plan.position_block, view.positions())};
}

// Task `index` of the apply phase. It may be empty at the end of the tensor.
NF_FN Unit apply_task_of(const Plan& plan, const ChannelView& view, int64_t index) {
  Unit task = unit_of(plan, view, index / plan.apply_blocks());
  task.m0 += index % plan.apply_blocks() * plan.apply_block;
  task.m1 = minimum(task.m0 + plan.apply_block, task.m1);
  return task;
}

// Offset of position m of channel c.
NF_FN int64_t offset_of(const ChannelView& view, int64_t c, int64_t m) {
  return (m / view.inner * view.channels + c) * view.inner + m % view.inner;
}

// A row of lanes: `positions` positions of each of `channels` channels. Channels last, the channels of a position are
// contiguous; channels first, the positions of a channel are.
struct LaneLayout {
  int64_t channels, positions;
  bool channels_last;

  int64_t lanes() const { return channels * positions; }
  int64_t channel_of(int64_t lane) const { return channels_last ? lane % channels : lane / positions; }

  // Copies each of the first `channels` entries of the array to all lanes of its channel, in place.
  template <class S>
  void broadcast_to_lanes(S* values) const {
    if (channels_last) {
      for (int64_t lane = channels; lane < lanes(); ++lane) values[lane] = values[lane - channels];
      return;
    }
    for (int64_t c = channels; c-- > 0;) {
      const S value = values[c];
      for (int64_t i = 0; i < positions; ++i) values[c * positions + i] = value;
    }
  }
  // The inverse: moves the first lane of each channel to entry c.
  template <class S>
  void compact_to_channels(S* values) const {
    if (channels_last) return;
    for (int64_t c = 0; c < channels; ++c) values[c] = values[c * positions];
  }
};

// Channels last: number of positions in a row of lanes, so that a row fills at least four vectors, without a tail.
template <class S>
NF_FN int64_t positions_per_row(int64_t channels) {
  constexpr int64_t kEnough = 4 * kLanes<S>;
  if (channels >= kEnough) return 1;
  return channels % kLanes<S> == 0 ? kEnough / channels : kLanes<S> * ((kEnough / kLanes<S> + channels - 1) / channels);
}

// Channels first: minimum number of outer indices. Fewer rows do not amortize copying the coefficients to all lanes and
// joining the lanes' sums.
inline constexpr int64_t kMinShortRows = 8;

// Calls f(part, layout) for parts of the unit, if it is to be processed as rows of lanes. Returns whether it is:
//   channels last    always
//   channels first   if a channel has at most `longest` contiguous values, which would end in a tail each. The rows of
//                    neighbouring channels are contiguous and form one row of lanes.
template <class V, class F>
NF_FN bool walk_as_lanes(const ChannelView& view, const Unit& unit, int64_t longest, const F& f) {
  const int64_t channels = unit.c1 - unit.c0;
  if (view.inner == 1) {
    f(unit, LaneLayout{channels, channels == view.channels ? positions_per_row<typename V::S>(channels) : 1, true});
    return true;
  }
  const bool full_rows = unit.m0 % view.inner == 0 && unit.m1 % view.inner == 0;
  if (view.inner > longest || !full_rows || unit.m1 - unit.m0 < kMinShortRows * view.inner) return false;
  const int64_t fitting = kMaxLanes / view.inner;
  for (int64_t c0 = unit.c0; c0 < unit.c1; c0 += fitting) {
    const int64_t c1 = minimum(c0 + fitting, unit.c1);
    f(Unit{c0, c1, unit.m0, unit.m1}, LaneLayout{c1 - c0, view.inner, false});
  }
  return true;
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
