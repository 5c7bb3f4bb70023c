"""Images and data sets: layouts, normalization by constants, channel statistics and files.

This file imports nothing, because :mod:`normfused.functional` imports
:mod:`normfused.data.normalization`. The public names are :class:`normfused.ChannelStats`,
:func:`normfused.dataset_stats`, :func:`normfused.normalize` and :mod:`normfused.transforms`.
"""
