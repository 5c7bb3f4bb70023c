#include "kernels/cuda/batch_norm_launch.cuh"

template struct normfused::cuda::BatchNorm<__half>;
