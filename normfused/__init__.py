"""Fast normalization for PyTorch: batch norm, its relatives and per-channel statistics in hand-written C++."""

from normfused import functional, reference
from normfused._extension import info
from normfused._version import __version__
from normfused.convert import Conversion, convert, fold_bn, revert
from normfused.functional import ChannelMoments, ChannelSums, channel_moments, channel_sums
from normfused.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, LocalResponseNorm, no_stats_update

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ChannelMoments",
    "ChannelSums",
    "Conversion",
    "LocalResponseNorm",
    "__version__",
    "channel_moments",
    "channel_sums",
    "convert",
    "fold_bn",
    "functional",
    "info",
    "no_stats_update",
    "reference",
    "revert",
]
