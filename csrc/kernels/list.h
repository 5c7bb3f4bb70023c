// The list of kernels: name and argument struct of each. The CPU's table and dispatch, the declarations in
// kernels/cpu/kernels.h and kernels/cuda/kernels.h, and ops::Backend with its three instances are generated from it.
//
// Define NF_KERNEL(name, Args), or some of the macros below, and include this file; it undefines them. It has no
// include guard, because it is included once for each thing that is generated.
//   NF_DTYPE_KERNEL: on the CPU a template over the input's dtype. Dispatch instantiates it and selects by args.dtype.
//   NF_UNTYPED_KERNEL: on the CPU one function for each instruction set, which distinguishes dtypes itself.
//   NF_PORTABLE_KERNEL: on the CPU one function, whose results are bitwise identical on all machines.
#if !defined(NF_DTYPE_KERNEL)
#define NF_DTYPE_KERNEL NF_KERNEL
#endif
#if !defined(NF_UNTYPED_KERNEL)
#define NF_UNTYPED_KERNEL NF_KERNEL
#endif
#if !defined(NF_PORTABLE_KERNEL)
#define NF_PORTABLE_KERNEL NF_KERNEL
#endif
#if !defined(NF_KERNEL)
#define NF_KERNEL(name, Args)
#endif

// Normalizes with the statistics of the batch, writes them to mean and invstd, and updates running statistics and
// counters. Precondition: at least two values per channel.
NF_DTYPE_KERNEL(batch_norm_training, BatchNormForward)

// Normalizes with running_mean and running_var, or with mean and invstd if these are absent.
NF_DTYPE_KERNEL(batch_norm_inference, BatchNormForward)

// Writes the gradients whose pointers are not null.
NF_DTYPE_KERNEL(batch_norm_backward, BatchNormBackward)

// Mean, sum of squared deviations, minimum and maximum per channel, in one read.
NF_DTYPE_KERNEL(channel_moments, ChannelStats)

// Sum, sum of squares, minimum and maximum per channel, in one read, in double.
NF_DTYPE_KERNEL(channel_sums, ChannelStats)

// The same for integers, exact.
NF_UNTYPED_KERNEL(integer_sums, IntegerSums)

// The moments of one rank's share of a batch, in one read.
NF_DTYPE_KERNEL(pack_moments, PackMoments)

// The statistics of the whole batch from the moments of all ranks; bitwise identical on all ranks.
NF_PORTABLE_KERNEL(merge_ranks, MergeRanks)

// Mean and std are read from host memory, on CUDA too, with one launch per 128 channels.
NF_UNTYPED_KERNEL(standardize, Standardize)

// Forward, or backward if grad_output is not null. On CUDA only for windows that plan_windows() has a plan for.
NF_DTYPE_KERNEL(local_response_norm, LocalResponseNorm)

// Normalizes each group of channels of each sample with its own statistics, which are written to mean and invstd. The
// results of a sample do not depend on the other samples.
NF_DTYPE_KERNEL(group_norm, GroupNormForward)

// Writes the gradients whose pointers are not null.
NF_DTYPE_KERNEL(group_norm_backward, GroupNormBackward)

// Layer norm and RMS norm, over the channels of each position. The results of a position do not depend on the others.
NF_DTYPE_KERNEL(layer_norm, LayerNormForward)

// Writes the gradients whose pointers are not null.
NF_DTYPE_KERNEL(layer_norm_backward, LayerNormBackward)

#undef NF_DTYPE_KERNEL
#undef NF_UNTYPED_KERNEL
#undef NF_PORTABLE_KERNEL
#undef NF_KERNEL
