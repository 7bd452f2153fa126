"""Images: where they come from, and how they become views on a device.

Comes in: data settings, folders, shards and data sets. Goes out: uint8 images, pairs of views, and
labelled images for evaluation. Order and views are functions of (seed, epoch, image), never of
state.
"""
