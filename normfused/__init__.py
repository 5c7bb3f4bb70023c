"""Fast normalization for PyTorch: batch, group, instance, layer, RMS and local response norm, and channel statistics.

Example:
    >>> import torch, normfused
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), normfused.BatchNormAct2d(8, "relu"))
    >>> model(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 8, 6, 6])
"""

from normfused import functional, quantization, reference, transforms
from normfused._extension import info
from normfused._version import __version__
from normfused.conversion import (
    ConversionReport,
    conversion_report,
    convert,
    convert_sync_batchnorm,
    register_conversion,
    revert,
)
from normfused.conversion.folding import fold_bn
from normfused.cuda_plans import CudaPlan, explain
from normfused.data.dataset import dataset_stats
from normfused.data.stats import ChannelStats
from normfused.distributed.layers import SyncBatchNorm, SyncBatchNormAct
from normfused.distributed.running_stats import sync_running_stats
from normfused.functional import (
    channel_moments,
    channel_sums,
    normalize,
    normalize_,
)
from normfused.layer_norm_layers import LayerNorm, LayerNorm2d, RMSNorm, RMSNorm2d
from normfused.memory import empty_cache, memory_stats
from normfused.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LocalResponseNorm,
    no_stats_update,
)
from normfused.results import ChannelMoments, ChannelSums
from normfused.sample_norm_layers import (
    GroupNorm,
    GroupNormAct,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    InstanceNormAct1d,
    InstanceNormAct2d,
    InstanceNormAct3d,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "ChannelMoments",
    "ChannelStats",
    "ChannelSums",
    "ConversionReport",
    "CudaPlan",
    "GroupNorm",
    "GroupNormAct",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "InstanceNormAct1d",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
    "LayerNorm",
    "LayerNorm2d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LocalResponseNorm",
    "RMSNorm",
    "RMSNorm2d",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "__version__",
    "channel_moments",
    "channel_sums",
    "conversion_report",
    "convert",
    "convert_sync_batchnorm",
    "dataset_stats",
    "empty_cache",
    "explain",
    "fold_bn",
    "functional",
    "info",
    "memory_stats",
    "no_stats_update",
    "normalize",
    "normalize_",
    "quantization",
    "reference",
    "register_conversion",
    "revert",
    "sync_running_stats",
    "transforms",
]
