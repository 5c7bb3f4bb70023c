"""Batch norm across processes: synchronized layers, what ranks exchange, consistency checks and DTensors.

This file imports nothing, because :mod:`normfused.functional` imports :mod:`normfused.distributed.dtensor`. The public
names are :class:`normfused.SyncBatchNorm`, :class:`normfused.SyncBatchNormAct` and
:func:`normfused.sync_running_stats`.
"""
