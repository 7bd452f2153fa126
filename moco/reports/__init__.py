"""Reports: what an encoder has learnt, for people to look at and to use.

Comes in: a run directory or a checkpoint, and images with labels or without.
Goes out: one page that needs no network, and pictures of views.
"""
