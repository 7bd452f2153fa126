"""Reports: what an encoder makes of images, to look at, to search, and to choose from.

Comes in: a checkpoint and images of any kind. Goes out: files that others read. `embed` writes the
features of any images as a Parquet file (`table`) with a map of them (`projection`); `index`
searches it, `search` answers questions about it, `select` chooses which images to label first.
"""
