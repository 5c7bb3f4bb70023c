// Batch norm for one dtype of the data. Every function and dtype has its own source file, so that they compile in
// parallel.
#pragma once

#include "kernels/cuda/kernels.h"

namespace normfused::cuda {

template <class T>
struct BatchNormOf {
  static cudaError_t training(const BatchNormForward& args, Resources& resources);
  static cudaError_t inference(const BatchNormForward& args, Resources& resources);
  static cudaError_t backward(const BatchNormBackward& args, Resources& resources);

  static constexpr int kForwardRows = 3, kBackwardRows = 5;

  // The parts of training and of backward, for norms whose coefficients are not those of batch norm. `table` has
  // kForwardRows or kBackwardRows rows with an entry of compute_t<T> for each statistic of the view, which may have
  // several samples.
  //
  // Normalizes with coefficients that the previous launch computes.
  static cudaError_t normalize(const BatchNormForward& args, void* table, Resources& resources);
  // Writes grad_weight and grad_bias, and coefficients as those of batch norm in training.
  static cudaError_t grad_sums(const BatchNormBackward& args, void* table, Resources& resources);
  // Writes grad_input and grad_residual with coefficients that the previous launch computes.
  static cudaError_t grad_input(const BatchNormBackward& args, void* table, Resources& resources);
};

}  // namespace normfused::cuda
