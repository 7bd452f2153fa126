"""Algorithm: Momentum Contrast as the papers have it, and nothing about files or runs.

Comes in: batches of views that somebody else has made (`batch`). Goes out: losses, keys, encoders.
`pretrain` is the page to start with; it needs no other wing to be understood.
"""
