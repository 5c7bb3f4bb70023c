// Group norm of channels-first tensors whose statistics fit into the registers or the shared memory of a block (see
// resident_rows.cuh).
#pragma once

#include "kernels/cuda/group_norm.cuh"
#include "kernels/cuda/resident_rows.cuh"

namespace normfused::cuda {

// Op of normalize_rows(). Each vector belongs to one channel or to two.
template <class T_, bool kFused>
struct GroupRowsOp {
  using T = T_;
  using Normalize = NormalizeOp<T, kFused>;
  using S = typename Normalize::S;

  GroupNormForward args;
  Normalize normalize;                // its table is not read
  int64_t width = args.view.width();  // computed once: a 64-bit division is slow on a GPU
  int64_t count = args.view.count();
  Divider<uint64_t> by_inner{static_cast<uint64_t>(args.view.inner)};
  Divider<uint64_t> by_groups{static_cast<uint64_t>(args.view.groups)};

  NF_DEVICE int64_t rows() const { return args.view.statistics(); }
  NF_DEVICE int64_t channels() const { return count; }
  NF_DEVICE double eps() const { return args.eps; }
  NF_DEVICE const T* input() const { return static_cast<const T*>(args.input); }
  NF_DEVICE double* mean() const { return args.mean; }
  NF_DEVICE double* invstd() const { return args.invstd; }
  NF_DEVICE void prologue() const { normalize.prologue(); }

  template <int kValues, int kVectors>
  NF_DEVICE void load(const RowPart<kValues>& part, bool, Vector<T, kValues> (&x)[kVectors]) const {
    load_row(args.input, channels(), part, x);
  }
  NF_DEVICE LayerStatistics finish(const Moments& moments) const { return layer_statistics(moments, true, args.eps); }
  template <int kValues, int kVectors>
  NF_DEVICE void write(const RowPart<kValues>& part, const LayerStatistics& statistics, bool streaming,
                       const Vector<T, kValues> (&x)[kVectors]) const {
    const GroupView& view = args.view;
    const auto sample = static_cast<int64_t>(by_groups(static_cast<uint64_t>(part.row)));
    const GroupParameters of_group{(part.row - sample * view.groups) * width, part.row * width};
    Vector<T, kValues> residual[kVectors]{};
    if (kFused && args.residual != nullptr) load_row(args.residual, channels(), part, residual);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!part.has(v)) continue;
      const int64_t place = part.channel(v), j = static_cast<int64_t>(by_inner(static_cast<uint64_t>(place)));
      const int64_t left = (j + 1) * view.inner - place;
      const Coefficients<Normalize> current = coefficients_of_channel(statistics, of_group, j);
      const Coefficients<Normalize> next =
          left < kValues ? coefficients_of_channel(statistics, of_group, j + 1) : current;
      const auto coefficients_of = [&](int i) {
        Coefficients<Normalize> chosen = current;
#pragma unroll
        for (int k = 0; k < Normalize::kCoefficients; ++k) chosen.k[k] = i < left ? chosen.k[k] : next.k[k];
        return chosen;
      };
      Inputs<Normalize, kValues> inputs;
      inputs[0] = x[v];
      if constexpr (kFused) inputs[1] = residual[v];
      apply_vector<Normalize, kValues>(normalize, inputs, coefficients_of, part.row * channels() + place,
                                       kAllValid<kValues>, streaming);
    }
  }

 private:
  // The indices of the first channel of a group: in its sample, and counted over all samples.
  struct GroupParameters {
    int64_t first, first_of_all;

    NF_DEVICE double read_entry(const SampleParameter& parameter, int64_t j, double absent) const {
      return read(parameter, (parameter.by_sample ? first_of_all : first) + j, absent);
    }
  };
  NF_DEVICE Coefficients<Normalize> coefficients_of_channel(const LayerStatistics& statistics,
                                                            const GroupParameters& of_group, int64_t j) const {
    const double weight = of_group.read_entry(args.weight, j, 1), bias = of_group.read_entry(args.bias, j, 0);
    const auto k = forward_coefficients<S>({statistics.mean, statistics.invstd, weight, bias});
    return {{k.pivot, k.scale, k.shift}};
  }
};

}  // namespace normfused::cuda
