"""Whole models: replace norms and back, fuse them with the operations around them, fold batch norms into layers."""

from normfused.conversion.api import convert, convert_sync_batchnorm, revert
from normfused.conversion.classes import register_conversion
from normfused.conversion.report import ConversionReport, bytes_saved_for_backward, conversion_report

__all__ = [
    "ConversionReport",
    "bytes_saved_for_backward",
    "conversion_report",
    "convert",
    "convert_sync_batchnorm",
    "register_conversion",
    "revert",
]
