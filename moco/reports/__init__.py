"""Reports: what an encoder has learnt, for people to look at, to search and to choose from.

Comes in: a run directory or a checkpoint, and images with labels or without. Goes out: one page
that needs no network (`page`), pictures of views (`pairs`), and files that others read: `embed`
writes the features of any images as a Parquet file, which `search` and `select` use.
"""
