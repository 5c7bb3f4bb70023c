"""Whole models: batch norms replaced by ours and back, and fused with what follows them."""

from normfused.conversion.api import convert, convert_sync_batchnorm, revert
from normfused.conversion.classes import register_conversion
from normfused.conversion.report import ConversionReport, conversion_report, kept_for_backward

__all__ = [
    "ConversionReport",
    "conversion_report",
    "convert",
    "convert_sync_batchnorm",
    "kept_for_backward",
    "register_conversion",
    "revert",
]
