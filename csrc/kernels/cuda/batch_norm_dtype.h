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
};

}  // namespace normfused::cuda
