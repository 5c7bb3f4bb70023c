// Where the values of a unit lie, and which of them are walked as rows of lanes: neighbours in memory whose channels
// and places are the same in row after row, so that all that is done with a row is done with whole vectors.

// A range of channels and a range of positions.
struct Unit {
  int64_t c0, c1;
  int64_t m0, m1;
};

NF_FN int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
NF_FN int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

NF_FN Unit unit_of(const Plan& plan, const ChannelView& view, int64_t index) {
  const int64_t c0 = index % plan.channel_units * plan.channel_block;
  const int64_t m0 = index / plan.channel_units * plan.position_block;
  return {c0, minimum(c0 + plan.channel_block, view.channels), m0, minimum(m0 + plan.position_block, view.positions())};
}

// Offset of position m of channel c.
NF_FN int64_t offset_of(const ChannelView& view, int64_t c, int64_t m) {
  return (m / view.inner * view.channels + c) * view.inner + m % view.inner;
}

// Some positions of each of a unit's channels. Channels last, a position's channels are neighbours; channels first, a
// channel's positions are.
struct LaneLayout {
  int64_t channels, positions;
  bool channels_last;

  int64_t lanes() const { return channels * positions; }
  int64_t channel_of(int64_t lane) const { return channels_last ? lane % channels : lane / positions; }

  // Each channel's value, which is in the first places, to all of its lanes.
  template <class S>
  void broadcast_to_lanes(S* row) const {
    if (channels_last) {
      for (int64_t lane = channels; lane < lanes(); ++lane) row[lane] = row[lane - channels];
      return;
    }
    for (int64_t c = channels; c-- > 0;) {
      const S value = row[c];
      for (int64_t i = 0; i < positions; ++i) row[c * positions + i] = value;
    }
  }
  // And back.
  template <class S>
  void compact_to_channels(S* row) const {
    if (channels_last) return;
    for (int64_t c = 0; c < channels; ++c) row[c] = row[c * positions];
  }
};

// Rows of a channels-last tensor that are walked as one: as many as it takes to fill four vectors, if that can be.
template <class S>
NF_FN int64_t positions_per_row(int64_t channels) {
  constexpr int64_t kEnough = 4 * kLanes<S>;
  if (channels >= kEnough) return 1;
  return channels % kLanes<S> == 0 ? kEnough / channels : kLanes<S> * ((kEnough / kLanes<S> + channels - 1) / channels);
}

// Channels first, rows of a few values each follow each other in memory. One by one they would end in part of a vector:
// those of up to `longest` values are walked together, and those of the next outer index with the same lanes. It
// takes so many rows to pay for spreading constants to lanes and joining their sums.
inline constexpr int64_t kMinShortRows = 8;

// Calls f(part, row) for parts of a unit that are to be walked in rows of lanes; false where it is not.
template <class V, class F>
NF_FN bool walk_as_lanes(const ChannelView& view, const Unit& unit, int64_t longest, const F& f) {
  const int64_t channels = unit.c1 - unit.c0;
  if (view.inner == 1) {
    f(unit, LaneLayout{channels, channels == view.channels ? positions_per_row<typename V::S>(channels) : 1, true});
    return true;
  }
  const bool whole_rows = unit.m0 % view.inner == 0 && unit.m1 % view.inner == 0;
  if (view.inner > longest || !whole_rows || unit.m1 - unit.m0 < kMinShortRows * view.inner) return false;
  const int64_t fitting = kMaxLanes / view.inner;
  for (int64_t c0 = unit.c0; c0 < unit.c1; c0 += fitting) {
    const int64_t c1 = minimum(c0 + fitting, unit.c1);
    f(Unit{c0, c1, unit.m0, unit.m1}, LaneLayout{c1 - c0, view.inner, false});
  }
  return true;
}
